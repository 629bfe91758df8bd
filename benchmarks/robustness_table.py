"""The page about kills, damaged files, hostile images and wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TITLES = {
    "kills": "SIGKILL at a random moment of a command that writes, then the same command again",
    "flips": "One byte changed, or the end cut off, in a file that a command wrote, then a command that reads it",
    "images": "Folders and Parquet files with something in them that is no image, or an odd one",
    "arguments": "Wrong arguments, generated from the commands and their options",
}


def page(results: list[dict[str, Any]], table: Callable[[list[str], list[list[str]]], str]) -> str:
    """docs/results/robustness.md from the four files of `benchmarks/robustness`."""
    lines = [
        "# What becomes of killed commands, damaged files, hostile images and wrong arguments",
        "",
        "Written by `benchmarks/tables.py` from `results/robustness/*.json`,",
        "the output of `python benchmarks/robustness`.",
        "*Identical*: the result is that of undisturbed work (of images: what is no image is set aside and said).",
        "*Refused*: the command ends with one line that says why. *Wrong*: anything else.",
    ]
    for result in sorted(results, key=lambda result: list(TITLES).index(result["part"])):
        total = result["summary"]
        names = ("identical", "refused", "wrong")
        body = [[kind, *(str(found.get(name, 0)) for name in names)] for kind, found in sorted(total["kinds"].items())]
        body.append(["together", *(str(total[name]) for name in names)])
        lines += [
            "",
            f"## {TITLES[result['part']]}",
            "",
            f"{total['cases']} cases, seed {result['seed']}; tracebacks: {total['tracebacks']};"
            f" leftover files: {total['leftovers']}.",
            "",
            table(["what", *names], body),
        ]
    return "\n".join(lines) + "\n"
