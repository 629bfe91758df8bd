"""What all commands do beside their own work: end early in one line."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from synthquant.cli.endings import ENDINGS, Ending
from synthquant.cli.stop import STOP
from synthquant.core.memory import ran_out


class Stopped(Exception):
    """A signal ended the command; the message says what is kept."""


class MemoryRanOut(Exception):
    """The command needs more memory than there is; the message says what to lower."""


class Command(TyperCommand):
    """A command that says what it leaves when a signal or the memory ends it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raises `Stopped`, `MemoryRanOut`, and what the command raises."""
        ending = ENDINGS.get(self.name or "", Ending(""))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped(ending.kept(ctx.params)) from error
        except Exception as error:
            # Libraries in which a signal struck may have made an error of their own of it.
            if STOP.received is not None:
                raise Stopped(ending.kept(ctx.params)) from error
            place = ran_out(error)
            if place is None:
                raise
            advice = "or use --device cpu" if place == "device memory" and "device" in ctx.params else ""
            raise MemoryRanOut(
                f"{place} ran out; {' '.join(filter(None, (ending.lower, advice)))}; {ending.kept(ctx.params)}"
            ) from error
