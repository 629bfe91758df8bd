"""What a command says when it ends early: what is kept, and what to lower where memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthquant.core.errors import InputError
from synthquant.core.record import RunRecord
from synthquant.core.run_metrics import METRICS

_AGAIN = "the same command starts again"
_GOES_ON = "the same command goes on from there"


def kept_in_folder(out: Path) -> str:
    """Return what a run's folder, an image set's or the demo's holds for the next call."""
    found = []
    for record in sorted(out.glob("run.json")) + sorted(out.glob("*/run.json")):
        if done := _finished_stages(record):
            name = record.parent.relative_to(out)
            found.append(f"{'' if name == Path() else f'{name}: '}{', '.join(done)}")
    kinds = (
        ("part-*.parquet", "part of images", "parts of images"),
        ("part-*.safetensors", "part of a trajectory", "parts of a trajectory"),
        ("unit-*", "unit", "units"),
        ("training.safetensors", "state of training", "states of training"),
    )
    for pattern, one, many in kinds:
        if count := len(list(out.rglob(pattern))):
            found.append(f"{count} {one if count == 1 else many}")
    return f"{out} keeps {'; '.join(found)}; {_GOES_ON}" if found else f"nothing was finished yet; {_AGAIN}"


def kept_beside_token(out: Path) -> str:
    """Return what a tuning leaves for the next call."""
    state = out.with_name(f"{out.stem}.state.safetensors")
    if not state.is_file() and out.is_file():
        return f"{out} is finished"
    return f"{state} keeps the steps so far; {_GOES_ON}" if state.is_file() else f"nothing was finished yet; {_AGAIN}"


def seen(out: Path | None) -> tuple[int, int] | None:
    """Return what tells whether a file or folder takes the place of another; none if there is none."""
    try:
        status = out.stat() if out is not None else None
    except OSError:
        return None
    return status and (status.st_ino, status.st_mtime_ns)


def _finished_stages(record: Path) -> list[str]:
    try:
        stages = RunRecord.load(record).stages
    except InputError:  # the next call will say what is wrong with it
        return []
    return [name for name in dict.fromkeys((*METRICS, *stages)) if name in stages and stages[name].status == "done"]


@dataclass(frozen=True)
class Ending:
    """How one command ends early."""

    lower: str
    """What makes it need less memory."""
    keeps: Callable[[Path], str] | None = None
    """Tells what its `--out` holds; none: nothing before all is done."""

    def kept(self, options: Mapping[str, Any], before: tuple[int, int] | None) -> str:
        """Return what is kept, and what the same command does with it; `before` is what was `seen` of `--out`."""
        if self.keeps is not None:
            return self.keeps(options["out"])
        out = options.get("out")
        if seen(out) != before:
            return f"{out} was finished already"
        return f"nothing is kept{'' if out is None else f', {out} is as it was'}; {_AGAIN}"


_RUN = (
    "set memory.host_gib lower, which a run that has begun takes; or choose another --out and a lower batch_size,"
    " images.count or model.input_size"
)

ENDINGS = {
    "demo": Ending(_RUN, kept_in_folder),
    "run": Ending(_RUN, kept_in_folder),
    "synthesize": Ending("lower --set batch_size, --input-size or --count", kept_in_folder),
    "sample": Ending("lower --set batch_size or --set height and width", kept_in_folder),
    "select": Ending("lower --batch-size, --set table_gib or the number of images"),
    "quantize": Ending(
        "choose another --out and lower --set batch_size, --input-size or the number of images", kept_in_folder
    ),
    "finetune": Ending("choose another --out and lower --set batch_size", kept_in_folder),
    "evaluate": Ending("lower --set batch_size or --input-size"),
    "compare": Ending("lower --set batch_size or --set subset_size"),
    "export": Ending("verify on fewer images with --data, or leave that out with --no-verify"),
    "benchmark": Ending("lower --batch or --threads"),
    "report": Ending("give fewer runs"),
    "tune-prompt": Ending("lower --set batch_size, or --dtype bfloat16", kept_beside_token),
}
"""By the name of the command; those that are not here do nothing that takes long."""
