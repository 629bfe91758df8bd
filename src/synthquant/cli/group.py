"""The commands by name: where each one is, and its help in a line, without loading what it works with.

PyTorch takes seconds to load. A command's module is imported when the command is called, or when its own help is asked
for; the list of commands and completion of their names read the docstrings from the source.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from synthquant.cli.stop import STOP, MemoryRanOut
from synthquant.core.memory import ran_out

COMMANDS = {
    "demo": "run.demo",
    "run": "run.run",
    "synthesize": "stages.synthesize",
    "select": "select.select",
    "quantize": "stages.quantize",
    "finetune": "finetune.finetune",
    "evaluate": "stages.evaluate",
    "sample": "sample.sample",
    "compare": "compare.compare",
    "export": "export.export",
    "benchmark": "export.benchmark",
    "report": "show.report",
    "card": "show.card",
    "show": "show.show",
    "list": "show.list_methods",
    "export-images": "images.export_images",
    "tune-prompt": "tune_prompt.tune_prompt",
    "doctor": "doctor.doctor",
}
"""Names of the commands, in the order of the help, with module and function in `synthquant.cli`."""

LOADING_RAN_OUT = "main memory ran out while packages were loaded; end other programs or raise its limit"


class Commands(TyperGroup):
    """The commands, which are loaded when they are called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=_docstring(place)) for name, place in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return name, command and arguments of a call; raises `UsageError` for a name that there is not."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = load_command(name)
            STOP.loaded()
        return name, command, rest


@cache
def load_command(name: str) -> Any:
    """Return the command of this name; raises `MemoryRanOut` if it cannot be loaded for want of memory."""
    module, _, function = COMMANDS[name].partition(".")
    try:
        from synthquant.cli.command import Command

        callback = getattr(import_module(f"synthquant.cli.{module}"), function)
    except (ImportError, MemoryError, OSError) as error:
        if ran_out(error) is None:
            raise
        raise MemoryRanOut(LOADING_RAN_OUT) from error
    one = typer.Typer(add_completion=False, rich_markup_mode=None)
    one.command(name, cls=Command)(callback)
    return typer.main.get_command(one)


def _docstring(place: str) -> str | None:
    """The docstring of a function, read from its module's source."""
    module, _, function = place.partition(".")
    name = f"synthquant.cli.{module}"
    spec = find_spec(name)
    source = spec.loader.get_source(name) if spec is not None and spec.loader is not None else None  # type: ignore[attr-defined]
    found = ast.walk(ast.parse(source or ""))
    (defined,) = (one for one in found if isinstance(one, ast.FunctionDef) and one.name == function)
    return ast.get_docstring(defined)
