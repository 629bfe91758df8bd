"""The command line: parse, call, print. Every command is a function of the library with options around it.

- `app`: the commands together, and the one place where errors become a line on standard error.
- `command`: what all commands do beside their own work.
- `compare`: `compare`: drawn images beside reference images.
- `doctor`: `doctor`: what this machine and installation have.
- `endings`: what a command says when it ends early: what is kept, and what to lower where memory ran out.
- `export`: `export` and `benchmark`: files for runtimes, and how fast they run.
- `finetune`: `finetune`: train the quantized network of a run.
- `group`: the commands by name, each loaded when it is called.
- `images`: `export-images`: an image set as files that everything opens.
- `options`: options that several commands share; their help is the docstring of the setting they stand for.
- `output`: results on standard output: a table for people, JSON for programs.
- `run`: `run` and `demo`: the whole flow.
- `sample`: `sample`: a diffusion pipeline, float or quantized, draws a set of images.
- `select`: `select`: keep what resembles the training data.
- `show`: `list`, `show` and `report`: what there is, and what came out.
- `stages`: `synthesize`, `quantize` and `evaluate`: one stage at a time.
- `stop`: Ctrl-C and SIGTERM, from a program's first moment to its last.
- `tune_prompt`: `tune-prompt`: learn a token for a text-to-image generator from a few real images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from synthquant.cli.stop import STOP
from synthquant.core.allocator import ALLOCATOR

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 if all that was promised is there, 2 for a wrong command line, 1 for other errors.

    130 and 143 after Ctrl-C and SIGTERM, which are answered from here on: the commands are loaded only now.
    """
    STOP.listen()
    ALLOCATOR.keep_freed()
    from synthquant.cli.app import run

    sys.exit(run(arguments))
