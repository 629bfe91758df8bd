"""What the commands are tried on: images, a selection, a run, an exported file and a token, all made by commands."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from commands import NETWORK, copy, run, start
from synthquant.cli import main
from synthquant.data.sources import open_images

RECIPE = {
    "model": {"source": NETWORK},
    "images": {"method": "genie_d", "count": 12, "batch_size": 4, "iterations": 6},
    "select": ["energy:8"],
    "quantize": {"method": "genie_m", "scheme": "W4A4", "iterations": 4, "batch_size": 4},
    "evaluate": {"data": "data"},
}
SYNTHESIZE = ("synthesize", NETWORK, "--count", 12, "--set", "batch_size=4", "--set", "iterations=6")
SELECT = ("select", "images", "--model", NETWORK, "--by", "energy:8", "--by", "bn_distance:4")
QUANTIZE = ("quantize", NETWORK, "--images", "images", "--set", "iterations=4", "--set", "batch_size=4")
EXPORT = ("export", "run", "--preset", "simulate")
TUNE = (
    *("tune-prompt", "zoo/cifar10-text2image", "--images", "data", "--classes", "cifar10", "--set", "iterations=6"),
    *("--set", "checkpoint_every=2", "--set", "batch_size=2", "--set", "initial_word=photo"),
)
DRAW = (
    *("synthesize", NETWORK, "--method", "text_to_image", "--count", 6, "--set", "generator=zoo/cifar10-text2image"),
    *("--set", "classes=cifar10", "--set", "steps=2", "--set", "batch_size=2"),
)
LEARNED = ("--set", "embedding=token.safetensors", "--set", 'templates=["a photo of a {} {}"]')


@dataclass(frozen=True)
class Made:
    """A folder that holds one of everything."""

    folder: Path

    def trial(self, target: Path, *names: str) -> Path:
        """A folder with copies of some of it."""
        target.mkdir(parents=True)
        for name in names:
            copy(self.folder / name, target / name)
        return target

    @classmethod
    def make(cls, folder: Path) -> Made:
        """Make everything by the commands a person would type; stops if one of them fails."""
        folder.mkdir(parents=True)
        # In a child, like all work: a process whose libraries have started threads cannot be forked.
        nothing = Path(os.devnull)
        os.waitpid(start(lambda: _save_data(folder / "data"), folder, nothing, nothing), 0)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        for arguments in (
            (*SYNTHESIZE, "--out", "images"),
            (*SELECT, "--out", "chosen"),
            ("run", "recipe.yaml", "--out", "run"),
            (*EXPORT, "--out", "model.onnx"),
            (*TUNE, "--out", "token.safetensors"),
        ):
            outcome = run(arguments, folder)
            if outcome.status != 0:
                raise SystemExit(f"{' '.join(map(str, arguments))}: {outcome.err}")
        made = cls(folder)
        unfinished(made, QUANTIZE, "units", "work/**/unit-*", 4)
        unfinished(made, SYNTHESIZE, "parts", "part-*", 2)
        return made


def _save_data(folder: Path) -> None:
    open_images("bundled/cifar10-test").subset(range(32)).save(folder)


def unfinished(made: Made, arguments: tuple[object, ...], name: str, pattern: str, count: int) -> None:
    """Leave in `name` what a command had made when it was killed after `count` files of a pattern were there."""
    words, nothing = [str(argument) for argument in (*arguments, "--out", name)], Path(os.devnull)
    child = start(lambda: main(words), made.folder, nothing, nothing)
    while len(list((made.folder / name).glob(pattern))) < count:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(f"{arguments[0]} ended before {count} files matched {pattern}")
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def row(kind: str, verdict: str, **fields: object) -> dict[str, object]:
    """One case of the result; everything in it can be written as JSON."""
    found = {"kind": kind, "verdict": verdict, **fields}
    json.dumps(found)
    return found
