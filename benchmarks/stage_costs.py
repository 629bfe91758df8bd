"""What each stage of two versions of the code takes: the same commands, in turns, each in a process of its own.

    git worktree add ../before 1f392dc
    python benchmarks/stage_costs.py --before ../before --network mobilenetv2 --weights FILE --data PHOTOGRAPHS

Processor and wall seconds and peak memory of whole commands at one thread, with start-up and loading: `synthesize`,
`quantize` (W4A4, Genie-M), `evaluate` and `export`, with few iterations, so that ratios understate what long runs gain.
Each version quantizes and exports what it made itself. The result goes to `results/stage_costs/NETWORK.json`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from synthquant.core.files import write_json
from synthquant.core.record import environment

ROOT = Path(__file__).parent.parent
NETWORKS = {
    "mobilenetv2": "torchvision/mobilenet_v2",
    "efficientnet-lite0": "timm/tf_efficientnet_lite0",
    "cifar10-resnet20": "zoo/cifar10-resnet20",
}
STAGES = ["synthesize", "quantize", "evaluate", "export"]
COMMAND = [sys.executable, "-c", "from synthquant.cli import main; main()"]


def stages(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The commands of one version, in order."""
    model = [NETWORKS[args.network], *(["--weights", args.weights] if args.weights else [])]
    images, run, batch = str(folder / "images"), str(folder / "run"), str(args.count)
    made = ["--set", f"iterations={args.iterations}", "--set", f"batch_size={batch}"]
    learned = ["--set", f"iterations={args.unit_iterations}", "--set", "batch_size=16"]
    return {
        "synthesize": ["synthesize", *model, "--count", batch, *made, "--out", images],
        "quantize": ["quantize", *model, "--images", images, "--scheme", "W4A4", *learned, "--out", run],
        "evaluate": ["evaluate", run, "--data", args.data],
        "export": ["export", run, "--out", str(folder / "network.onnx"), "--preset", "simulate"],
    }


def measure(command: list[str], checkout: Path) -> dict[str, float]:
    """Seconds and peak memory of a command with the code of a checkout; raises `SystemExit` if it fails."""
    variables = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    for name in [name for name in variables if name.startswith("MALLOC_")]:
        del variables[name]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, *command], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{checkout}: {' '.join(command)} failed: {errors.strip().splitlines()[-1:]}")
    return {
        "user_seconds": round(used.ru_utime, 1),
        "system_seconds": round(used.ru_stime, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
    }


def main() -> None:
    """Run all commands of both versions, in turns, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the older code")
    parser.add_argument("--after", type=Path, default=ROOT)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True, help="labelled images to evaluate on")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--unit-iterations", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="each needs those before it")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "stage_costs")
    args = parser.parse_args()
    checkouts = {"before": args.before, "after": args.after}
    commits = {
        version: subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for version, checkout in checkouts.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("count", "iterations", "unit_iterations")}
    rows: list[dict[str, Any]] = []
    content = {"network": args.network, "commits": commits, **settings, "rows": rows, "environment": environment()}
    for repeat in range(args.repeats):
        with TemporaryDirectory() as folder:
            plans = {version: stages(args, Path(folder) / version) for version in checkouts}
            for version in checkouts:
                (Path(folder) / version).mkdir()
            for stage in args.stages:
                for version, checkout in checkouts.items():
                    found = measure(plans[version][stage], checkout)
                    rows.append({"stage": stage, "version": version, "repeat": repeat, **found})
                    print(rows[-1], flush=True)
        write_json(args.out / f"{args.network}.json", content)


if __name__ == "__main__":
    main()
