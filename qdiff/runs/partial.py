"""Finished parts of a long stage, kept on disk until the stage is done, so that a killed run goes on with the next part.

Every part is one safetensors file that is whole or absent and carries the fingerprint of what it was made from and a hash of
what it holds; parts of other work and changed ones are refused. What comes out of a part is what went in, so a run that was cut
off ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.errors import IntegrityError, option
from qdiff.files import open_tensors, save_tensors


def sha256_tensors(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    """Return the hexadecimal sha256 over names, element types, shapes and bytes of tensors, and over the text beside
    them.
    """
    digest = hashlib.sha256(json.dumps(dict(notes), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Scratch:
    """Parts in one folder.

    Args:
        folder: made when the first part is saved.
        owner: fingerprint of everything that decides the parts.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self.folder, self.owner = folder, owner

    def save(self, part: str, tensors: dict[str, Tensor], facts: object) -> None:
        """Write one part: its tensors, and ``facts`` as JSON."""
        self.folder.mkdir(parents=True, exist_ok=True)
        notes = {"owner": self.owner, "facts": json.dumps(facts)}
        save_tensors(self._path(part), tensors, {**notes, "sha256": sha256_tensors(tensors, notes)})

    def load(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors and facts of a part, or ``None`` when it is not there.

        Raises:
            IntegrityError: damaged, or made from something else.
        """
        path = self._path(part)
        if not path.exists():
            return None
        with open_tensors(path, "a finished part") as file:
            notes = file.metadata() or {}
            if notes.get("owner") != self.owner:
                raise IntegrityError(
                    f"{path} is a part of other work", f"begin the stage anew with {option('force', True)}"
                )
            digest = notes.pop("sha256", None)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if digest != sha256_tensors(tensors, notes):
            raise IntegrityError(f"{path} was changed after it was written (its sha256 differs)", "delete it")
        return tensors, json.loads(notes["facts"])

    def clear(self) -> None:
        """Remove the parts: the stage is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"
