"""A byte changed or the end cut off in every kind of file that a command wrote, then a command that reads it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import Outcome, contents, run, stable
from made import DRAW, LEARNED, QUANTIZE, SELECT, SYNTHESIZE, Made, row


@dataclass(frozen=True)
class Target:
    """A kind of file, a command that reads it, and what of its result must not change."""

    files: str
    arguments: tuple[object, ...]
    needed: tuple[str, ...]
    result: Callable[[Path, Outcome], Any]


def printed(folder: Path, outcome: Outcome) -> Any:
    """What `--json` printed."""
    del folder
    return stable(json.loads(outcome.out)) if outcome.status == 0 else None


def written(name: str) -> Callable[[Path, Outcome], Any]:
    """What the command left below a name; damaged intermediate files are made again, so that all of it counts."""
    return lambda folder, outcome: contents(folder / name) if outcome.status == 0 else None


def page(folder: Path, outcome: Outcome) -> Any:
    """A report of a selection, in which no times stand."""
    return (folder / "out.html").read_bytes() if outcome.status == 0 else None


EVALUATE_RUN = ("evaluate", "run", "--data", "data", "--json")
TARGETS = {
    "image part": Target("images/part-*", (*SELECT, "--out", "out"), ("images",), written("out")),
    "manifest": Target("images/manifest.json", (*SELECT, "--out", "out"), ("images",), written("out")),
    "selection": Target("chosen/selection.json", ("report", "chosen", "--out", "out.html"), ("chosen", "images"), page),
    "unit": Target("units/work/**/unit-*", (*QUANTIZE, "--out", "units"), ("units", "images"), written("units")),
    "unfinished part": Target("parts/part-*", (*SYNTHESIZE, "--out", "parts"), ("parts",), written("parts")),
    "journal": Target("parts/parts.json", (*SYNTHESIZE, "--out", "parts"), ("parts",), written("parts")),
    "checkpoint tensors": Target("run/model/model.safetensors", EVALUATE_RUN, ("run", "data"), printed),
    "quant_config": Target("run/model/quant_config.json", EVALUATE_RUN, ("run", "data"), printed),
    "run.json": Target("run/run.json", ("run", "recipe.yaml", "--out", "run", "--json"),
                       ("run", "recipe.yaml", "data"), printed),
    "recipe": Target("recipe.yaml", ("run", "recipe.yaml", "--out", "run", "--json"),
                     ("run", "recipe.yaml", "data"), printed),
    "ONNX": Target("model.onnx", ("evaluate", "model.onnx", "--data", "data", "--json"),
                   ("model.onnx", "data"), printed),
    "token": Target("token.safetensors", (*DRAW, *LEARNED, "--out", "out"), ("token.safetensors",), written("out")),
}  # fmt: skip


def trials(made: Made, work: Path, count: int, seed: int) -> Iterator[dict[str, object]]:
    """Damage `count` files in turn and yield a row for each."""
    source = random.Random(seed)
    expected = {name: reference(made, work / "sound" / name.replace(" ", "-"), name) for name in TARGETS}
    for number in range(count):
        name = list(TARGETS)[number % len(TARGETS)]
        target = TARGETS[name]
        folder = made.trial(work / f"flip-{number:03d}", *target.needed)
        file = source.choice(sorted(folder.glob(target.files)))
        case = damage(file, source)
        outcome = run(target.arguments, folder)
        same = target.result(folder, outcome) == expected[name] and outcome.status == 0
        verdict = "identical" if same else "refused" if outcome.refused else "wrong"
        yield row(name, verdict, case=f"{file.relative_to(folder)}: {case}", traceback=outcome.traceback,
                  warned="warning:" in outcome.err, said=outcome.brief())  # fmt: skip


def damage(file: Path, source: random.Random) -> str:
    """Change one byte, or in one of three cases cut the file off; returns what was done."""
    data = bytearray(file.read_bytes())
    place = source.randrange(len(data))
    if source.random() < 1 / 3:
        file.write_bytes(data[:place])
        return f"cut off at {place} of {len(data)} bytes"
    change = source.randrange(1, 256)
    data[place] ^= change
    file.write_bytes(data)
    return f"byte {place} of {len(data)} changed by {change:#04x}"


def reference(made: Made, folder: Path, name: str) -> Any:
    """The result with sound files."""
    target = TARGETS[name]
    made.trial(folder, *target.needed)
    outcome = run(target.arguments, folder)
    if outcome.status != 0:
        raise SystemExit(f"{name}: {outcome.err}")
    return target.result(folder, outcome)
