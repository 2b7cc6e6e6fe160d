"""The ONNX file as a thing with a fingerprint: which files belong to it, and one hash over all of them.

The weights of a large graph lie in files beside it that the graph names itself. A name inside a file is input from
outside: history has absolute names, ``..``, symbolic links and hard links (CVE-2026-27489, CVE-2026-34446), each a way to make
a reader open a file that its user did not mean. Every backend checks some of it; here all of it is checked before any backend
sees the graph. (A hard link is refused for one more reason: ``onnx.load`` refuses it too. Copies of a run that are made of hard
links still work: :meth:`qdiff.runs.run.Run.verify` breaks the link of a file whose hash is right.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from qdiff.errors import InputError, IntegrityError, command
from qdiff.files import safe_child, sha256_file, temporary_beside
from qdiff.graphs.walk import nodes, tensors


def external_files(onnx: Path) -> list[Path]:
    """Return the files beside ``onnx`` that hold its weights, sorted by name.

    Raises:
        InputError: ``onnx`` or a file that it names is missing.
        IntegrityError: ``onnx`` is not ONNX, or names a file outside its folder, a link, or something not a file.
    """
    import onnx as library
    from google.protobuf.message import DecodeError

    if not onnx.is_file():
        raise InputError(f"there is no ONNX graph at {onnx}", f"run: {command('export', 'RUN')}")
    try:
        model = library.load(onnx, load_external_data=False)
    except DecodeError as error:
        raise IntegrityError(
            f"{onnx} is not an ONNX file: {error}", f"run: {command('export', 'RUN', force=True)}"
        ) from error
    names = set()
    for part in [model.graph, *model.functions]:
        for tensor in tensors(part):
            if tensor.data_location == library.TensorProto.EXTERNAL:
                names |= {entry.value for entry in tensor.external_data if entry.key == "location"} or {""}
    return [_external(onnx, name) for name in sorted(names)]


def _external(onnx: Path, name: str) -> Path:
    path = safe_child(onnx.parent, name)
    if "\\" in name or path != onnx.parent.resolve() / name:
        raise IntegrityError(
            f"{onnx} names its weights {name!r}: not a plain path", f"run: {command('export', 'RUN', force=True)}"
        )
    if not path.exists():
        raise InputError(
            f"{onnx} names the weights file {name!r}, which is missing", f"run: {command('export', 'RUN', force=True)}"
        )
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(
            f"{path} is a link or not a plain file", f"export the graph anew: {command('export', 'RUN', force=True)}"
        )
    if status.st_nlink != 1:
        fix = "let qdiff write in the folder, or copy the run without hard links: cp -a, or rsync without --link-dest"
        raise IntegrityError(f"{path} has other names (hard links), which onnx refuses to read", fix)
    return path


def graph_digest(onnx: Path) -> str:
    """Return the sha256, in hexadecimal, of the graph file and its weights files (names and bytes)."""
    files = [[path.relative_to(onnx.parent.resolve()).as_posix(), sha256_file(path)] for path in external_files(onnx)]
    return hashlib.sha256(json.dumps([sha256_file(onnx), files]).encode()).hexdigest()


def graph_bytes(onnx: Path) -> int:
    """Return the size on disk of the graph and its weights."""
    return sum(path.stat().st_size for path in [onnx, *external_files(onnx)])


@contextlib.contextmanager
def inlined(onnx: Path, kept: Collection[str] = ()) -> Iterator[Path]:
    """Yield the graph with every call of a function in the file replaced by its nodes, beside ``onnx`` (whose weights
    it reads) until the context ends; ``onnx`` itself where there is nothing to replace. For runtimes that know no
    functions.

    Args:
        onnx: checked by :func:`external_files`.
        kept: names of functions of the domain ``qdiff`` whose calls stay. What they stand for is not in the graph any more: a
            runtime has to know it.
    """
    import onnx as library
    import onnx.inliner as inliner

    model = library.load(onnx, load_external_data=False)
    if not model.functions:
        yield onnx
        return
    model = inliner.inline_selected_functions(model, [("qdiff", name) for name in kept], exclude=True)
    del model.functions[:]
    with temporary_beside(onnx, model.SerializeToString()) as graph:
        yield graph


def simulates(onnx: Path) -> bool:
    """Return whether quantizers of the graph are written out in float arithmetic (functions of the domain ``qdiff``,
    but for those that unpack codes), which has to run in float32: in 16 bit the scales themselves would be rounded.
    """
    import onnx as library

    functions = library.load(onnx, load_external_data=False).functions
    return any(each.domain == "qdiff" and not each.name.startswith("Unpack_") for each in functions)


def multiplies_integers(onnx: Path) -> bool:
    """Return whether the graph has quantizers of activations to INT8, which runtimes turn into products of integers."""
    import onnx as library

    graph = library.load(onnx, load_external_data=False).graph
    return any(node.op_type == "QuantizeLinear" for node in nodes(graph))
