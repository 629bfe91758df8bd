"""Tables from a name to the thing that carries it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Generic, TypeVar

from synthquant.core.errors import InputError, UnknownNameError

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9][a-z0-9_./-]*")


class Registry(Generic[T]):
    """Named entries of one kind; a clash is an error and an unknown name is answered with a suggestion.

    Args:
        kind: what the entries are, for errors.
        home: a module that enters the package's own entries by being imported, which the first question does.
    """

    def __init__(self, kind: str, home: str | None = None) -> None:
        self.kind = kind
        self._home = home
        self._own: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters what it decorates under `name`.

        Raises `InputError` if the name is taken by something else or is not lower case.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"{self.kind} name {name!r} must be lower-case letters, digits, '_', '-', '.' or '/'")

        def enter(entry: T) -> T:
            if name in self._own:
                raise InputError(f"{self.kind} name {name!r} is already taken by {self._own[name]!r}; choose another")
            self._own[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the entry called `name`; raises `UnknownNameError` with a suggestion."""
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self.names()) from None

    def name_of(self, entry: T) -> str:
        """Return the name of an entry; raises `KeyError` if it is none."""
        return {id(known): name for name, known in self._entries.items()}[id(entry)]

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        return tuple(sorted(self._entries))

    def items(self) -> tuple[tuple[str, T], ...]:
        """Return all names with their entries, sorted by name."""
        return tuple((name, self._entries[name]) for name in self.names())

    @property
    def _entries(self) -> dict[str, T]:
        if self._home is not None:
            home, self._home = self._home, None
            import_module(home)
        return self._own

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)
