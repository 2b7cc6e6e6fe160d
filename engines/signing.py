"""The user's own signature: an HMAC-SHA256 whose key never leaves the user's data folder.

An engine file is a program for the GPU; a hash beside it only says that both were changed together. The key lies where only
the user writes (``~/.local/share/qdiff/engine-key``, mode 0600), so a file that carries a right tag was written by this user's
qdiff. An engine that someone else sends has none, and is built here from its ONNX graph instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

from qdiff.errors import IntegrityError, option
from qdiff.files import write_atomically

_KEY_BYTES = 32
_TAG_BYTES = 32


def home() -> Path:
    """Return qdiff's folder in the user's data: ``$QDIFF_HOME``, else ``~/.local/share/qdiff``."""
    return Path(os.environ.get("QDIFF_HOME") or Path.home() / ".local" / "share" / "qdiff")


def _key() -> bytes:
    """Return the user's key; made at the first use."""
    path = home() / "engine-key"
    if not path.is_symlink() and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first: its key is the key
                os.link(temporary, path)
        finally:
            os.unlink(temporary)
    status = path.lstat()
    private = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    key = path.read_bytes() if private else b""
    if len(key) != _KEY_BYTES:
        message = f"the key {path} is not a private file of {_KEY_BYTES} bytes that you own: others may know it"
        raise IntegrityError(message, f"delete it (rm {path}) and build your engines anew with {option('force', True)}")
    return key


def sign(payload: bytes, purpose: str) -> str:
    """Return the tag of ``payload`` in hexadecimal; ``purpose`` keeps a tag for one use from being valid for another.

    Raises:
        IntegrityError: the key file is readable by others, a link, or cut off.
    """
    return hmac.new(_key(), purpose.encode() + b"\0" + payload, hashlib.sha256).hexdigest()


def is_signed(payload: bytes, tag: str, purpose: str) -> bool:
    """Return whether ``tag`` is this user's tag of ``payload`` for ``purpose``."""
    return hmac.compare_digest(sign(payload, purpose).encode(), tag.encode())


def seal(path: Path, payload: bytes, purpose: str) -> None:
    """Write ``payload`` with its tag before it, whole or not at all: for caches that change after the build."""
    tag = bytes.fromhex(sign(payload, purpose))

    def write(temporary: Path) -> None:
        temporary.write_bytes(tag + payload)

    write_atomically(path, write)


def unseal(path: Path, purpose: str) -> bytes | None:
    """Return what :func:`seal` wrote, or ``None`` when there is nothing or its tag is wrong: a cache is made again, not
    argued about.
    """
    if path.is_symlink() or not path.is_file():
        return None
    blob = path.read_bytes()
    payload = blob[_TAG_BYTES:]
    return payload if is_signed(payload, blob[:_TAG_BYTES].hex(), purpose) else None
