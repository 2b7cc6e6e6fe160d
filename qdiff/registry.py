"""Tables of named things: families, methods, observers, engines.

To add an entry is to write one file whose class or function carries ``@TABLE.register("name")`` and to import that file
in the package's ``__init__``. Nothing is found by walking folders: an entry that is not imported does not exist, and
an import error is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from qdiff.errors import QdiffError, UsageError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of one kind by name. Registering a name twice is an error: it means a module was imported twice.

    Args:
        kind: what the entries are, for messages.
        error: raised for a name that there is not.
        meant: names that people write for an entry that is called something else; they are not taken, but answered with its name.
    """

    def __init__(self, kind: str, error: type[QdiffError] = UsageError, meant: Mapping[str, str] | None = None) -> None:
        self.kind, self.meant = kind, meant or {}
        self._error = error
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class or function under ``name``."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise RuntimeError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Return the entry of that name.

        Raises:
            UsageError: (or the error class of this registry) with the nearest names when there is none.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries, self._error, self.meant.get(name))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
