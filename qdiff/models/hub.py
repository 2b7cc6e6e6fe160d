"""A model of the Hub, at one commit.

What the Hub calls ``main`` moves. So a name is resolved to a commit once; that commit is loaded and recorded, and a later stage
asks for the commit and never for the name again. A copy in the local cache will do where there is no network.
"""

from __future__ import annotations

import re
from pathlib import Path

from qdiff.errors import InputError, option
from qdiff.models.folders import files_that_count

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")  # ./x and ../x are paths
_FILES = ["*.json", "*/*.safetensors", "*.txt", "*.model"]


def is_id(weights: str) -> bool:
    """Return whether a name can be that of a repository: ``owner/name``."""
    return bool(_ID.match(weights))


def download(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """Return a local folder with what is needed of a repository, and the commit.

    Args:
        hub_id: ``owner/name``.
        revision: a commit, a branch or a tag; ``None``: the default branch.

    Raises:
        InputError: no such repository or revision, or neither network nor a local copy.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(hub_id, revision=revision)
        if info.sha is None:
            raise InputError(f"the Hub names no commit for {hub_id}", f"give one with {option('revision')}")
        files = files_that_count(file.rfilename for file in info.siblings or [])
        return Path(snapshot_download(hub_id, revision=info.sha, allow_patterns=files or _FILES)), info.sha
    except InputError:
        raise
    except Exception as error:
        try:  # without network, a copy that is complete in the local cache will do
            folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
            return folder, folder.name
        except Exception:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"cannot load {hub_id}{f' at {revision}' if revision else ''} from the Hub: {reason[:200]}",
                f"check the id, {option('revision')} and the network, or copy the model here and give {option('weights')}",
            ) from None
