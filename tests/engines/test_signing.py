"""The user's key and what is signed with it."""

from __future__ import annotations

import pytest

from qdiff.engines import signing
from qdiff.errors import IntegrityError


def test_the_key_is_private_and_made_once(own_home):
    tag = signing.sign(b"payload", "test")
    key = own_home / "engine-key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    assert signing.sign(b"payload", "test") == tag
    assert [path.name for path in own_home.iterdir()] == ["engine-key"]
    assert signing.is_signed(b"payload", tag, "test")
    for payload, purpose in [(b"payloae", "test"), (b"payload", "tess")]:
        assert not signing.is_signed(payload, tag, purpose)
    assert not signing.is_signed(b"payload", "\u00e4" * 64, "test")


@pytest.mark.parametrize("attack", ["readable", "short", "link"])
def test_a_key_that_others_may_know_is_refused(attack, own_home):
    signing.sign(b"", "test")
    key = own_home / "engine-key"
    if attack == "readable":
        key.chmod(0o644)
    elif attack == "short":
        key.write_bytes(b"short")
    else:
        key.rename(own_home / "elsewhere")
        key.symlink_to(own_home / "elsewhere")
    with pytest.raises(IntegrityError, match="engine-key") as caught:
        signing.sign(b"", "test")
    assert caught.value.exit_code == 5 and "rm " in caught.value.fix


def test_seal(tmp_path):
    path = tmp_path / "kernels.cache"
    assert signing.unseal(path, "a") is None
    signing.seal(path, b"kernels", "a")
    assert signing.unseal(path, "a") == b"kernels"
    assert signing.unseal(path, "b") is None
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert signing.unseal(path, "a") is None
    path.write_bytes(b"")
    assert signing.unseal(path, "a") is None
