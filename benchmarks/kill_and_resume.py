"""Kill a run in the middle of synthesis and of reconstruction, start it again, and compare every byte.

    python benchmarks/kill_and_resume.py --work FOLDER

Runs the same recipe twice through the command line: once undisturbed, once killed (SIGKILL) after the first part
of images and again after the third unit. Exits with 1 if any image part, manifest or checkpoint file differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from synthquant.core.files import sha256_file
from synthquant.core.record import environment

RECIPE = """
version: 1
model: {source: zoo/cifar10-resnet20}
images: {method: genie_d, count: 200, batch_size: 50, iterations: 40}
quantize: {method: genie_m, scheme: W4A4, iterations: 40}
evaluate: {data: bundled/cifar10-test}
"""


def command(recipe: Path, out: Path) -> list[str]:
    """The command a user would type."""
    return [str(Path(sys.executable).with_name("synthquant")), "run", str(recipe), "--out", str(out), "--json"]


def kill_when(recipe: Path, out: Path, pattern: str, count: int) -> int:
    """Start the run, kill it as soon as `count` files match `pattern`; returns how many there were when it died."""
    process = subprocess.Popen(command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob(pattern))) < count:
        time.sleep(0.01)
    if process.poll() is not None:
        raise SystemExit(f"the run ended before {count} files matched {pattern}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list(out.glob(pattern)))


def hashes(out: Path) -> dict[str, str]:
    """Hash of every image and checkpoint file."""
    files = [*sorted((out / "images").iterdir()), *sorted((out / "model").iterdir())]
    return {str(path.relative_to(out)): sha256_file(path) for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/resume/kill-and-resume.json"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = args.work / "recipe.yaml"
    recipe.write_text(RECIPE)
    whole, killed = args.work / "whole", args.work / "killed"
    subprocess.run(command(recipe, whole), check=True, stdout=subprocess.DEVNULL)
    parts = kill_when(recipe, killed, "images/part-*.parquet", 1)
    units = kill_when(recipe, killed, "work/**/unit-*.safetensors", 3)
    subprocess.run(command(recipe, killed), check=True, stdout=subprocess.DEVNULL)
    expected, found = hashes(whole), hashes(killed)
    result = {
        "benchmark": "kill_and_resume", "killed_after_parts": parts, "killed_after_units": units,
        "files": expected, "identical": expected == found,
        "different": sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)),
        "environment": environment(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps({key: result[key] for key in ("killed_after_parts", "killed_after_units", "identical", "different")})
    )
    raise SystemExit(0 if result["identical"] else 1)


if __name__ == "__main__":
    main()
