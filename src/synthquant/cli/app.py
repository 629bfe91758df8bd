"""The commands together, and the one place where errors become a line on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache, partial

import typer
from typer.exceptions import TyperException

from synthquant.cli import compare, export, finetune, sample, select, show, stages, tune_prompt
from synthquant.cli import run as run_commands
from synthquant.cli.command import Command, MemoryRanOut, Stopped
from synthquant.cli.stop import STOP, show_cursor
from synthquant.core.errors import OtherProcessError, SynthquantError
from synthquant.core.processes import launched

app = typer.Typer(
    name="synthquant",
    help="Quantize a trained network without its training data, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(run_commands.demo, run_commands.run, stages.synthesize, select.select, stages.quantize),
    *(finetune.finetune, stages.evaluate, sample.sample, compare.compare),
    *(export.export, export.benchmark, show.report, show.show),
):
    app.command(cls=Command)(command)
app.command("list", cls=Command)(show.list_methods)
app.command("tune-prompt", cls=Command)(tune_prompt.tune_prompt)

_LONGEST_LINE = 2000
_commands = cache(partial(typer.main.get_command, app))


def run(arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit status; errors become one line on standard error."""
    # Broken images are set aside with a reason of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not sys.warnoptions:  # what libraries will do in future is for those who develop with them
        warnings.simplefilter("ignore", FutureWarning)
    try:
        status = _commands()(args=arguments, prog_name="synthquant", standalone_mode=False)
    except TyperException as error:
        return _fail(f"{error.format_message()} (see synthquant --help)", 2)
    except Stopped as stopped:
        show_cursor()
        if launched().is_first:
            print(STOP.line(str(stopped)), file=sys.stderr)
        return STOP.status
    except OtherProcessError as error:
        return _fail(str(error)) if launched().is_first else 1
    except (SynthquantError, MemoryRanOut) as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output, for example `head`, has seen enough
        sys.stdout = None  # else the interpreter complains when it flushes on exit
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except typer.Abort:
        return _fail("aborted", 130)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int = 1) -> int:
    line = " ".join(message.split())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    return status
