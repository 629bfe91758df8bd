"""Every error synthquant raises on purpose.

    SynthquantError
    +-- InputError (ValueError)             something the caller gave is wrong
    |   +-- UnknownNameError                a name that no registry holds
    |   +-- RecipeError                     a recipe or a setting
    |   +-- ModelError                      a model, its weights or its checkpoint
    |   |   +-- UnsupportedModelError       the model is fine, the method cannot work with it
    |   +-- DataError                       images, labels, an image set
    |   +-- SchemeError                     a quantization scheme
    +-- OutputError (OSError)               a result could not be written
    +-- MissingExtraError (ImportError)     an optional package is not installed
    +-- VerificationError                   a result was written and is not what was promised
    +-- OtherProcessError                   another of several processes that work together failed

Each message is one line: what is wrong, where, and what to do.

Memory that runs out is none of them: `MemoryError`, `torch.OutOfMemoryError` and what else libraries raise pass as they
are, and `core.memory.ran_out` tells them from others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Colours and the like that other libraries write into their messages.
_ESCAPE_CODES = re.compile(r"\x1b(\[[0-9;:?]*[ -/]*[@-~])?")


def plain_line(text: str) -> str:
    """Return `text` as a single line, without the escape codes of a terminal."""
    return " ".join(_ESCAPE_CODES.sub("", text).split())


class SynthquantError(Exception):
    """Base of all errors of this package; the message is always a single line."""

    def __init__(self, message: str) -> None:
        # Messages often quote another library's error, which may span lines.
        super().__init__(plain_line(message))

    def __str__(self) -> str:
        """Return the message (OSError and ImportError would format it in their own ways)."""
        return str(self.args[0])


class InputError(SynthquantError, ValueError):
    """Something the caller gave is wrong."""


class UnknownNameError(InputError):
    """A name that is not in a registry; suggests the nearest one and lists all."""

    def __init__(self, kind: str, name: str, available: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.available = tuple(available)
        listed = ", ".join(self.available) or "(none)"
        super().__init__(f"unknown {kind} {name!r};{did_you_mean(name, self.available)} available: {listed}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, tuple[str, ...]]]:
        """Pickle by the three constructor arguments, so that the error crosses process borders."""
        return type(self), (self.kind, self.name, self.available)


class RecipeError(InputError):
    """A recipe or a setting that cannot be used as written."""


class ModelError(InputError):
    """A model, its weights or its checkpoint that cannot be used."""


class UnsupportedModelError(ModelError):
    """A model in good order for which the chosen method does not work."""


class DataError(InputError):
    """Images, labels or an image set that cannot be used."""


class SchemeError(InputError):
    """A quantization scheme that makes no sense."""


class OutputError(SynthquantError, OSError):
    """A result that could not be written."""


class MissingExtraError(SynthquantError, ImportError):
    """An optional package is not installed; names the extra that brings it, and what it is needed for."""

    def __init__(self, package: str, extra: str, purpose: str = "") -> None:
        self.package = package
        self.extra = extra
        self.purpose = purpose
        start = f"{purpose}: " if purpose else ""
        super().__init__(
            f"{start}package {package!r} is not installed; install it with: pip install 'synthquant[{extra}]'"
        )

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        """Pickle by the constructor's arguments."""
        return type(self), (self.package, self.extra, self.purpose)


class VerificationError(SynthquantError):
    """A result was written and does not hold what was promised."""


class OtherProcessError(SynthquantError):
    """Another of several processes that work together failed, or is gone; the first of them says what it was."""


def did_you_mean(name: str, available: Iterable[str]) -> str:
    """Return `" did you mean 'x'?"` for the nearest of the available names, or an empty string."""
    nearest = difflib.get_close_matches(name, list(available), n=1)
    return f" did you mean {nearest[0]!r}?" if nearest else ""
