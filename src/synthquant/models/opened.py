"""What an opener of networks returns, and how it says that it could not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from synthquant.core.errors import ModelError
from synthquant.core.registry import Registry
from synthquant.core.settings import parse_settings
from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import FloatModel, ModelSource, Task
from synthquant.models.signature import Inputs
from synthquant.models.weights import one_line

# What building or running a foreign network may raise: its code is not ours, so this is wide, but Ctrl-C still works.
FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Opened:
    """What the library of origin knows about a model."""

    module: nn.Module
    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] | None = None
    example: Inputs | None = None
    """Of its inputs, for a network that takes something else than images."""
    task: Task | None = None
    """What it is for, where that is known of its library; none: what was asked for."""
    make: Callable[..., FloatModel] = FloatModel
    """The class of the model, with what it has beside the fields of every model."""


Opener = Callable[[str, ModelSource, bool], Opened]
"""Opens the rest of a name for a request; the last argument tells whether published weights are loaded."""

OPENERS: Registry[Opener] = Registry("library of networks", home="synthquant.diffusion.denoiser")
"""Openers, by what a name starts with, that lie above this room."""


def known_preprocess(request: ModelSource, **values: Any) -> Preprocess:
    """Return what a library says about preprocessing; raises `RecipeError` if it is none of ours."""
    return parse_settings(Preprocess, values, where=f"preprocessing of {request.source}")


def failed(request: ModelSource, error: BaseException) -> ModelError:
    """Return the error for what a library or a user's own code raised."""
    kind = type(error).__name__
    hint = "; is there a network connection, or give --weights FILE" if isinstance(error, OSError) else ""
    return ModelError(f"{request.source} cannot be opened: {kind}: {one_line(error)}{hint}")
