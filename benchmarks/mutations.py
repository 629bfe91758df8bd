"""Change one thing at a time in an equation or in how it is wired, and see whether the tests notice.

    python benchmarks/mutations.py [--only NAME ...] [--missing] [--sample N --seed S] [--out FILE]

Every entry of mutations.toml replaces one piece of text, which occurs once, in a copy of the repository; the tests that
the entry's group names then run there until one fails. Writes a JSON row for each: caught, and by which test, or lived.
The unchanged copy is tested first. With `--missing` the rows of FILE stay, and what has none or lived is run. Exits
with 1 if one lived that is not said to compute the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("src", "tests", "training", "pyproject.toml")
PRELOADED = ("pytest", "torch", "torch._dynamo", "pydantic", "pyarrow.parquet", "PIL.Image", "safetensors.torch")
"""What every fork needs and this process may read once: nothing of the package."""
SECONDS = 600
"""After so long a change is taken to hang, which is noticed too."""


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        name: what it does, in a few words.
        file: where, below `src/synthquant`.
        old: text that occurs there once.
        new: what stands there instead.
        tests: files and folders of tests that should notice, the quickest first.
        same: why nothing can notice it, or empty.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    same: str = ""

    def apply(self, copy: Path) -> None:
        """Change the copy. Raises `ValueError` if the text is not there once."""
        path = copy / "src/synthquant" / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text occurs {text.count(self.old)} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def read_mutations(path: Path) -> list[Mutation]:
    """The entries of a file, each with its group's tests."""
    with path.open("rb") as file:
        groups: dict[str, Any] = tomllib.load(file)
    found = []
    for group in groups.values():
        tests = tuple(group["tests"])
        found += [Mutation(tests=tests, **entry) for entry in group["mutation"]]
    names = [mutation.name for mutation in found]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path.name} names {', '.join(sorted(repeated))} more than once")
    return found


class _FirstFailure:
    """A plugin that keeps the name of the first test that failed, or of the first file that could not be read."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._keep(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._keep(report)

    def _keep(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def _test(copy: Path, tests: tuple[str, ...], result: Any) -> None:
    """Run tests in a copy; to be called in a process of its own."""
    import pytest

    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy / "src")
    sys.dont_write_bytecode = True
    first = _FirstFailure()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy), "-c", str(copy / "pyproject.toml")]
        code = pytest.main([*options, *tests], plugins=[first])
    import synthquant

    if not Path(synthquant.__file__).is_relative_to(copy):
        raise RuntimeError(f"the tests read {synthquant.__file__}, not the copy")
    result.put((int(code), first.name))


def noticed(mutation: Mutation | None, tests: tuple[str, ...], original: Path) -> tuple[str, float]:
    """The test that fails first in a copy with the change made, or none; and the seconds it took.

    Raises:
        RuntimeError: the tests did not run.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder).resolve() / "repository"
        shutil.copytree(original, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            mutation.apply(copy)
        # A fork has what this process has read: nothing of the package, but PyTorch.
        context = multiprocessing.get_context("fork")
        result = context.SimpleQueue()
        process = context.Process(target=_test, args=(copy, tests, result))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return f"longer than {SECONDS} s", time.monotonic() - began
        if result.empty():
            return f"exit status {process.exitcode}", time.monotonic() - began
        code, first = result.get()
    if code not in (0, 1, 2) or (code != 0 and not first):
        raise RuntimeError(f"{mutation.name if mutation else 'unchanged'}: pytest ended with {code}")
    return first, time.monotonic() - began


def _original(folder: Path) -> Path:
    """A copy of what git knows of the repository, as it lies there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *COPIED],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _text_of(mutation: Mutation) -> dict[str, Any]:
    """What says which change it is."""
    return {key: value for key, value in asdict(mutation).items() if key != "tests"}


def _rows_of(mutations: list[Mutation], path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run that are of these changes as they are now, but of those that lived."""
    if not path.exists():
        return []
    texts = {one.name: _text_of(one) for one in mutations}
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    settled = [row for row in rows if row["caught"] or row["same"]]
    return [row for row in settled if row["name"] in texts and texts[row["name"]].items() <= row.items()]


def _write(rows: list[dict[str, Any]], mutations: list[Mutation], path: Path) -> None:
    """Write the rows in the order of the changes."""
    place = {one.name: index for index, one in enumerate(mutations)}
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: place[row["name"]])
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=Path, default=Path(__file__).with_name("mutations.toml"))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="those whose name or file has such a word"
    )
    parser.add_argument("--missing", action="store_true", help="those without a row in FILE, or that lived there")
    parser.add_argument("--sample", type=int, help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--out", type=Path, default=Path("results/mutations/mutations.json"))
    args = parser.parse_args()
    chosen = every = read_mutations(args.mutations)
    rows = _rows_of(every, args.out) if args.missing else []
    if args.missing:
        known = {row["name"] for row in rows}
        chosen = [one for one in every if one.name not in known]
    if args.only:
        chosen = [one for one in chosen if any(word in f"{one.name} {one.file}" for word in args.only)]
    if args.sample is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        original = _original(Path(folder))
        for one in chosen:  # all of them can be made before one is tested
            text = (original / "src/synthquant" / one.file).read_text(encoding="utf-8")
            if text.count(one.old) != 1:
                raise SystemExit(f"{one.name}: its text occurs {text.count(one.old)} times in {one.file}, not once")
        for tests in dict.fromkeys(one.tests for one in chosen):
            failed, _ = noticed(None, tests, original)
            if failed:
                raise SystemExit(f"without a change {failed} fails")
        for one in chosen:
            by, seconds = noticed(one, one.tests, original)
            rows.append({**_text_of(one), "caught": bool(by), "by": by, "seconds": round(seconds, 1)})
            _write(rows, every, args.out)
            print(
                f"{'caught' if by else 'LIVED ' if not one.same else 'same  '} {one.name}: {by or one.same}", flush=True
            )
    lived = [row for row in rows if not row["caught"] and not row["same"]]
    print(
        f"{sum(row['caught'] for row in rows)} of {len(rows)} caught, {len(lived)} lived, "
        f"{len(every) - len(rows)} of {len(every)} not run -> {args.out}"
    )
    raise SystemExit(1 if lived else 0)


if __name__ == "__main__":
    main()
