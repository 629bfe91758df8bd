"""Wrong arguments, generated from the commands and their options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from commands import NETWORK, contents, run
from made import EXPORT, QUANTIZE, SELECT, SYNTHESIZE, Made, row
from synthquant.cli.group import COMMANDS, load_command

VALID: dict[str, tuple[object, ...]] = {
    "demo": ("--out", "out"),
    "run": ("recipe.yaml", "--out", "out"),
    "synthesize": (*SYNTHESIZE[1:], "--out", "out"),
    "select": (*SELECT[1:], "--out", "out"),
    "quantize": (*QUANTIZE[1:], "--out", "out"),
    "evaluate": (NETWORK, "--data", "data"),
    "export": (*EXPORT[1:], "--out", "out.onnx"),
    "benchmark": ("model.onnx",),
    "report": ("run", "--out", "out.html"),
    "show": ("genie_d",),
    "list": (),
    "tune-prompt": ("zoo/cifar10-text2image", "--images", "data", "--classes", "cifar10", "--out", "out.safetensors"),
}
"""Arguments of each command that work, to which a wrong one is added: the last one given counts."""

NUMBERS = ("", "x", "1e400", "1" + "0" * 30, "-1", "nan", "true", "1.5.2", "0x10", "None", "1 2")
TEXTS = ("", "nope", "../..", "a\nb", "é" * 300, "W0A0", "W99A99", "cuda:99", "cpu:7", "energy:-1", "energy:5e9", "{}")
INPUTS = ("", "nowhere", "nowhere/at/all", "a" * 5000, "recipe.yaml/inside", "/proc/self/mem", "/dev/null")
OUTPUTS = ("", "/proc/nowhere/out", "recipe.yaml/inside", "a" * 5000, "/dev/null/x")
SETTINGS = ("", "=", "=1", "x", "nope=1", "a.b.c=1", "count=true", "iterations=nan", "iterations=1e99", "batch_size=-1",
            "iterations=[1", "seed=99999999999999999999999", "batch_size={a: b}", "iterations=")  # fmt: skip
TRIPLES = ("", "1", "1,2,3,4", "a,b,c", "nan,nan,nan", "1e300,1e300,1e300", "inf,0,0")


def wrong_values(name: str, kind: type) -> tuple[str, ...]:
    """Values that no command takes for a parameter of this name and type."""
    if name == "settings":
        return SETTINGS
    if name in ("mean", "std"):
        return TRIPLES
    if name == "input_size":
        return ("", "0", "-1", "x", "1,2,3", "1e9", "99999999999999999999", "nan")
    if name in ("count", "seed", "batch_size", "num_classes", "ray_workers", "batch", "threads", "seconds"):
        return NUMBERS
    if name == "out":
        return OUTPUTS
    if name == "ray":
        return ("", "nowhere", "127.0.0.1:1", "local:x")
    if kind is Path or name in ("images", "data", "weights", "model", "run", "recipe", "file", "runs", "generator"):
        return INPUTS
    return TEXTS


def wrong_calls() -> list[tuple[str, str, list[str]]]:
    """Command, what is wrong, and its arguments, for every parameter and value."""
    root: Any = SimpleNamespace(commands={name: load_command(name) for name in COMMANDS})
    calls = []
    for command, valid in VALID.items():
        words = [str(word) for word in valid]
        for parameter in root.commands[command].params:
            if getattr(parameter, "is_flag", False) or parameter.name == "help":
                calls.append((command, f"{parameter.name} with a value", [*words, f"{parameter.opts[0]}=maybe"]))
                continue
            for value in wrong_values(parameter.name, parameter.bare_type):
                if parameter.param_type_name == "argument":
                    given = [value, *words[1:]] if words and not words[0].startswith("-") else [value, *words]
                else:
                    given = [*words, f"{parameter.opts[0]}={value}"]
                calls.append((command, f"{parameter.name} = {value[:40]!r}", given))
        calls.append((command, "unknown option", [*words, "--nope"]))
        calls.append((command, "one argument too many", [*words, "one", "--", "two", "three"]))
    return calls


def trials(made: Made, work: Path, count: int, seed: int) -> Iterator[dict[str, object]]:
    """Type `count` of the wrong calls and yield a row for each."""
    names = ("data", "images", "recipe.yaml", "run", "model.onnx")
    folder = made.trial(work / "trial-0", *names)
    before = contents(folder)
    for command, what, words in random.Random(seed).sample(wrong_calls(), count):
        outcome = run((command, *words), folder, limit=60)
        after = contents(folder)
        left = sorted(after.keys() ^ before.keys())
        verdict = "refused" if outcome.refused and after == before else "wrong"
        yield row(command, verdict, case=what, traceback=outcome.traceback, leftovers=left, said=outcome.brief())
        if after != before:
            folder = made.trial(work / f"trial-{len(list(work.iterdir()))}", *names)
            before = contents(folder)
