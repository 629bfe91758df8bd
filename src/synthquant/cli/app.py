"""The commands together, and the one place where errors become a line on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Annotated

import typer
from typer.exceptions import TyperException

from synthquant.cli.group import Commands
from synthquant.cli.stop import STOP, MemoryRanOut, Stopped, show_cursor
from synthquant.core.errors import OtherProcessError, SynthquantError
from synthquant.core.version import DISTRIBUTION, package_version

app = typer.Typer(name=DISTRIBUTION, cls=Commands, pretty_exceptions_enable=False, rich_markup_mode=None)

_LONGEST_LINE = 2000
_commands = cache(partial(typer.main.get_command, app))


@app.callback(invoke_without_command=True)
def synthquant(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Quantize a trained network without its training data, and measure the result."""
    if version:
        print(DISTRIBUTION, package_version())
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit status; errors become one line on standard error."""
    # Broken images are set aside with a reason of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not sys.warnoptions:  # what libraries will do in future is for those who develop with them
        warnings.simplefilter("ignore", FutureWarning)
    try:
        status = _commands()(args=arguments, prog_name=DISTRIBUTION, standalone_mode=False)
    except TyperException as error:
        return _fail(f"{error.format_message()} (see synthquant --help)", 2)
    except Stopped as stopped:
        show_cursor()
        if _is_first():
            print(STOP.line(str(stopped)), file=sys.stderr)
        return STOP.status
    except OtherProcessError as error:
        return _fail(str(error)) if _is_first() else 1
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


def _is_first() -> bool:
    """Whether this is the first of the processes that a launcher started; loaded late, for it loads PyTorch."""
    from synthquant.core.processes import launched

    return launched().is_first
