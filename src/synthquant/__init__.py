"""Quantize trained networks without their training data, and measure the result.

import synthquant as sq

recipe = sq.Recipe.parse({
    "model": "zoo/cifar10-resnet20",
    "images": {"method": "genie_d", "count": 256, "iterations": 200},
    "quantize": {"method": "genie_m", "scheme": "W4A4", "iterations": 200},
    "evaluate": "bundled/cifar10-test",
})
record = sq.run(recipe, "runs/first")
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthquant.api import *  # noqa: F403


# Everything is in synthquant.api and loaded when the first name is asked for: PyTorch takes seconds, in which a program
# that only just started, such as the command line, could not answer a Ctrl-C.
def __getattr__(name: str) -> Any:
    unknown = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("__") and name not in ("__all__", "__version__"):
        raise unknown
    if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
        raise unknown  # a module that nobody has imported yet
    api = import_module(f"{__name__}.api")
    if name not in ("__all__", *api.__all__):
        raise unknown
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(f"{__name__}.api").__all__})
