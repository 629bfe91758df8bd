"""SIGKILL at a random moment of every command that writes, then the same command again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from commands import contents, leftovers, run
from made import DRAW, EXPORT, LEARNED, QUANTIZE, SELECT, SYNTHESIZE, TUNE, Made, row

COMMANDS: dict[str, tuple[tuple[object, ...], str, tuple[str, ...]]] = {
    "run": (("run", "recipe.yaml"), "out", ("data", "recipe.yaml")),
    "synthesize": (SYNTHESIZE, "out", ()),
    "synthesize text_to_image": ((*DRAW, *LEARNED), "out", ("token.safetensors",)),
    "select": (SELECT, "out", ("images",)),
    "quantize": ((*QUANTIZE, "--data", "data"), "out", ("images", "data")),
    "export onnx": (EXPORT, "out.onnx", ("run", "data")),
    "export torch": (("export", "run", "--to", "torch"), "out.pt2", ("run", "data")),
    "report": (("report", "run"), "out.html", ("run", "data")),
    "tune-prompt": (TUNE, "out.safetensors", ("data",)),
}
"""By name: the arguments, what is written, and what of `Made` it needs."""


def trials(made: Made, work: Path, count: int, seed: int) -> Iterator[dict[str, object]]:
    """Kill `count` commands in turn and yield a row for each."""
    source = random.Random(seed)
    whole = {name: undisturbed(made, work / "whole" / name.replace(" ", "-"), name) for name in COMMANDS}
    for number in range(count):
        name = list(COMMANDS)[number % len(COMMANDS)]
        expected, seconds = whole[name]
        moment = source.uniform(0, 1.05) * seconds
        arguments, out, needed = COMMANDS[name]
        folder = made.trial(work / f"kill-{number:03d}", *needed)
        first = run((*arguments, "--out", out), folder, kill_after=moment)
        second = run((*arguments, "--out", out), folder)
        found = contents(folder)
        left = leftovers(folder, expected)
        same = second.status == 0 and found == expected
        verdict = "identical" if same else "refused" if second.refused and not left else "wrong"
        different = sorted(key for key in expected if found.get(key) != expected[key])
        yield row(
            name, verdict, case=f"killed after {moment:.2f} of {seconds:.2f} s", killed=first.status == -9,
            traceback=second.traceback, leftovers=left, different=different, said=second.brief(),
        )  # fmt: skip


def undisturbed(made: Made, folder: Path, name: str) -> tuple[dict[str, object], float]:
    """What the command leaves when nobody disturbs it, and how long that takes."""
    arguments, out, needed = COMMANDS[name]
    made.trial(folder, *needed)
    outcome = run((*arguments, "--out", out), folder)
    if outcome.status != 0:
        raise SystemExit(f"{name}: {outcome.err}")
    return contents(folder), outcome.seconds
