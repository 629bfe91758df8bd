"""What all commands do beside their own work: look at their arguments as texts, and end early in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand

from synthquant.cli.endings import ENDINGS, Ending, seen
from synthquant.cli.stop import STOP, MemoryRanOut, Stopped
from synthquant.core.memory import ran_out
from synthquant.core.settings import text_problem

# What Linux takes: bytes between two slashes, and of all of a path.
_LONGEST_NAME, _LONGEST_PATH = 255, 4000


class Command(TyperCommand):
    """A command that refuses texts of no use, and says what it leaves when a signal or the memory ends it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; raises `UsageError` for a text that can be no name, path or setting."""
        # Before they become paths: Path("") is the working folder.
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        for parameter in self.params:
            value = given.get(parameter.name)
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and (problem := _problem(text, parameter)):
                    name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
                    raise BadParameter(f"the value {problem}", ctx=ctx, param_hint=repr(name or parameter.name))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raises `Stopped`, `MemoryRanOut`, and what the command raises."""
        ending = ENDINGS.get(self.name or "", Ending(""))
        before = seen(ctx.params.get("out"))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped(ending.kept(ctx.params, before)) from error
        except Exception as error:
            # Libraries in which a signal struck may have made an error of their own of it.
            if STOP.received is not None:
                raise Stopped(ending.kept(ctx.params, before)) from error
            place = ran_out(error)
            if place is None:
                raise
            advice = "or use --device cpu" if place == "device memory" and "device" in ctx.params else ""
            raise MemoryRanOut(
                f"{place} ran out; {' '.join(filter(None, (ending.lower, advice)))}; {ending.kept(ctx.params, before)}"
            ) from error


def _problem(text: str, parameter: Any) -> str | None:
    if not text.strip():
        return "is empty"
    if problem := text_problem(text):
        return problem
    names = text.split("/") if parameter.type_descriptor.annotation is Path else []
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in names) or (len(text) > _LONGEST_PATH and names):
        return "is longer than the name of a file can be"
    return None
