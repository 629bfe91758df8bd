"""The commands together, and the one place where errors become a line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import typer
from typer.exceptions import TyperException

from synthquant.cli import export, run, select, show, stages, tune_prompt
from synthquant.core.errors import SynthquantError

app = typer.Typer(
    name="synthquant",
    help="Quantize a trained network without its training data, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(run.demo, run.run, stages.synthesize, select.select, stages.quantize, stages.evaluate),
    *(export.export, export.benchmark, show.report, show.show),
):
    app.command()(command)
app.command("list")(show.list_methods)
app.command("tune-prompt")(tune_prompt.tune_prompt)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 if all that was promised is there, 2 for a wrong command line, 1 for other errors."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status = app(args=arguments, prog_name="synthquant", standalone_mode=False)
    except TyperException as error:
        return _fail(f"{error.format_message()} (see synthquant --help)", 2)
    except SynthquantError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output, for example `head`, has seen enough
        sys.stdout = None  # else the interpreter complains when it flushes on exit
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except torch.OutOfMemoryError:
        return _fail("out of device memory; lower the batch size, set memory.device_gib, or use --device cpu")
    except typer.Abort:
        return _fail("aborted", 130)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int = 1) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
