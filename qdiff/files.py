"""Files of ours: written whole or not at all, read with errors that a person can act on, never a pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdiff.errors import InputError, IntegrityError, MemoryExhaustedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Json = Mapping[str, "Json"] | Sequence["Json"] | str | int | float | bool | None
"""A JSON value that is read or passed on, not changed."""


class TensorSlice(Protocol):
    """A tensor of an open file that is not read yet."""

    def get_shape(self) -> list[int]: ...


class TensorFile(Protocol):
    """An open safetensors file of ours: tensors by name, read one by one, and the texts in its header."""

    def keys(self) -> list[str]: ...

    def metadata(self) -> dict[str, str]: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def get_slice(self, name: str) -> TensorSlice: ...


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn "no space left on device" into the error that a user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MemoryExhaustedError(
                f"no space left on the disk while writing {what}",
                "free some space and run the same command again: finished parts are kept",
            ) from error
        raise


MOST_TEXT = 64_000_000  # bytes of a file that a user names
LONGEST_NAME, LONGEST_PATH = 255, 4_096  # bytes, of Linux and of its file systems


def path_of(text: str | Path) -> Path:
    """Return a path that a user named.

    Raises:
        UsageError: it is empty, holds NUL, or is longer than file systems take.
    """
    name = str(text)
    if not name:
        raise UsageError("an empty path was given", "name a file or a folder; . is the current folder")
    if "\x00" in name:
        raise UsageError(f"the path {name!r} holds a NUL character", "leave it out")
    longest = max(len(os.fsencode(part)) for part in name.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(name)) >= LONGEST_PATH:
        raise UsageError(
            f"the path {name[:60]}… is too long ({len(name):,} characters, a name in it {longest:,} bytes)",
            f"a name has at most {LONGEST_NAME} bytes, a whole path {LONGEST_PATH - 1:,}",
        )
    return Path(name)


def read_user_text(path: Path, what: str, most: int = MOST_TEXT) -> str:
    """Return the UTF-8 text of a file that a user named, without a byte order mark.

    Args:
        path: of the file.
        what: it is, for messages: ``the prompts file``.
        most: bytes that it may have.

    Raises:
        InputError: missing, unreadable, no regular file (a device has no end), too large, or no text.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{what} {path} is no regular file", "name a plain text file")
        if status.st_size > most:
            raise InputError(
                f"{what} {path} has {status.st_size / 1e6:,.0f} MB, at most {most / 1e6:,.0f} MB are read",
                "is it the right file?",
            )
        with open(path, "rb") as file:
            data = file.read(most + 1)  # files of /proc say that they are empty
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {what} {path}: {reason}", "check the path") from None
    if len(data) > most:
        raise InputError(f"{what} {path} has more than {most / 1e6:,.0f} MB", "is it the right file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\x00"
    if "\x00" in text:
        raise InputError(f"{what} {path} is not a text file in UTF-8", "save it as plain UTF-8 text")
    return text


def break_links(path: Path) -> None:
    """Make a file that has several names (``cp -al``, ``rsync --link-dest``) one of its own with the same bytes, where
    its folder can be written: libraries that refuse hard links then read it, and what is written there changes no other
    folder.
    """
    if path.lstat().st_nlink < 2:
        return
    with contextlib.suppress(PermissionError), contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(str(path)))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        stack.callback(Path(name).unlink, missing_ok=True)
        shutil.copy2(path, name)
        os.replace(name, path)


def require_writable(folder: Path, *, make: bool = False) -> None:
    """Try whether files can be written into ``folder``, before the work whose result goes there. Nothing of the trial
    stays.

    Args:
        folder: which need not be there.
        make: whether the folder, and those above it, may have to be made.

    Raises:
        UsageError: it cannot be made or written to.
        MemoryExhaustedError: the disk is full.
    """
    missing = [place for place in [folder, *folder.parents] if make and not place.exists()]
    try:
        with disk_errors(str(folder)), contextlib.ExitStack() as stack:
            for place in reversed(missing):
                place.mkdir()
                stack.callback(place.rmdir)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise UsageError(
            f"nothing can be written into the folder {folder}: {error.strerror}",
            "make it writable, or choose another place",
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path in the same folder)``, flush the file to disk and rename it to ``path``.

    Raises:
        InputError: a folder is in the file's place.
        MemoryExhaustedError: the disk is full.
    """
    if path.is_dir() and not path.is_symlink():
        raise InputError(f"{path} is a folder, and a file has to be written there", "remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name[:40]  # with what is added it has to stay a name
    handle, name = tempfile.mkstemp(prefix=f".{short}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with disk_errors(str(path)):
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_beside(path: Path, data: bytes) -> Iterator[Path]:
    """Write a file with ``data`` into the folder of ``path``, and remove it when the context ends: for a graph that
    reads another's weights.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    beside = Path(name)
    try:
        with disk_errors(name), os.fdopen(handle, "wb") as file:
            file.write(data)
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, value: object) -> None:
    """Write JSON that a person can read (indented, key order kept) whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_plain(path: Path, what: str) -> None:
    """Refuse what is there in a file's place. A pipe would keep its reader waiting, a folder is an error of the system.

    Raises:
        FileNotFoundError: nothing is there.
        IntegrityError: a folder, a pipe, a device; a link to one.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        kind = "a folder" if path.is_dir() else "no plain file"
        raise IntegrityError(f"{what} at {path} is {kind}", "remove it and run its stage again")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file of ours.

    Raises:
        InputError: when it is missing.
        IntegrityError: when it is not JSON (cut off or edited), or no plain file.
    """
    try:
        require_plain(path, what)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{what} is missing: there is no {path}", "run the stage that makes it, or check the path"
        ) from None
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(
            f"{what} at {path} is not valid JSON: {error}", "delete it and run its stage again"
        ) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all. ``metadata`` goes into its header."""
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except Exception as error:  # the library wraps ENOSPC into its own error type
            if "os error 28" in str(error) or "No space left" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise

    write_atomically(path, write)


@contextlib.contextmanager
def open_tensors(path: Path, what: str) -> Iterator[TensorFile]:
    """Open a safetensors file of ours lazily (``safetensors.safe_open``).

    Raises:
        InputError: when it is missing.
        IntegrityError: when it is cut off or not safetensors, or no plain file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        require_plain(path, what)
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{what}: there is no {path}", "run the stage that makes it") from None
    except SafetensorError as error:
        raise IntegrityError(f"{what} at {path} is damaged: {error}", "delete it and run its stage again") from None


def open_lock(path: Path) -> int:
    """Return a descriptor of the lock file at ``path``, made where it is not there; its content is left alone. A link
    is not followed: what it leads to is not ours to open for writing.

    Raises:
        IntegrityError: a link, a folder or a pipe is in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise IntegrityError(f"{path} is a link or a folder, not the lock of a run folder", "remove it") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise IntegrityError(f"{path} is no plain file, so it is not the lock of a run folder", "remove it")
    return handle


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Return the hexadecimal sha256 of a JSON value in canonical form: equal values have equal hashes, whatever their
    key order.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def safe_child(root: Path, name: str) -> Path:
    """Return ``root / name`` for a name that came from a file, refused when it would leave ``root`` (also by a symbolic
    link).

    Raises:
        IntegrityError: absolute names, ``..``, NUL, links that point outside.
    """
    base = root.resolve()
    if "\x00" in name or not name:
        raise IntegrityError(f"a file names the path {name!r} inside {root}", "this run folder was tampered with")
    path = (base / name).resolve()
    if not path.is_relative_to(base) or path == base:
        raise IntegrityError(
            f"a file names the path {name!r}, which is outside {root}", "this run folder was tampered with"
        )
    return path
