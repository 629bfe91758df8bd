"""Peak memory of the commands on ImageNet networks, on a machine that has little.

    python benchmarks/memory_peaks.py --photographs SAMPLE --network torchvision/mobilenet_v2 --weights FILE

Each command is a process of its own whose data may take `--limit` GiB (`ulimit -d`): of 8 GiB a system and what else
runs leave about 6. What is above the limit fails as it would there. Few iterations do: the peak does not depend on
them. `--label before` with `PYTHONPATH` at an older version adds rows of that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthquant.core.record import environment

COMMAND = [sys.executable, "-c", "import sys; from synthquant.cli import main; main(sys.argv[1:])"]
IMAGES = 64
JOBS = {"inversion": ["--count", "128", "--set", "iterations=1"], "W4A4": []}


def measured(command: list[str], limit_gib: float, folder: Path) -> dict[str, Any]:
    """Run a command with a limit; returns its peak, processor time, and what it said about memory."""
    limit = int(limit_gib * 2**30)
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    said = folder / "said"
    with said.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, *command],
            stderr=file,
            stdout=subprocess.DEVNULL,
            env=own,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        _, status, usage = os.wait4(process.pid, 0)
    peaks = [usage.ru_maxrss * 1024]
    # A stage of a run starts a new count, which the system's own figure follows.
    record = folder / "out" / "run.json"
    if record.exists():
        stages = json.loads(record.read_text())["stages"]
        peaks += [stage["peak_memory_bytes"] or 0 for stage in stages.values()]
    lines = [line for line in said.read_text().splitlines() if re.search(r"GiB|ran out", line)]
    return {
        "ok": status == 0,
        "peak_bytes": max(peaks),
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "said": lines[-2:],
    }


def command_of(job: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of a job."""
    network = [args.network, "--weights", args.weights, "--out", str(folder / "out"), "--device", "cpu"]
    if job != "W4A4":
        return ["synthesize", *network, *JOBS[job]]
    recipe = folder / "recipe.json"  # JSON is YAML
    recipe.write_text(json.dumps({
        "version": 1, "model": {"source": args.network, "weights": args.weights},
        "images": {"source": args.photographs, "count": IMAGES},
        "quantize": {"method": "genie_m", "scheme": "W4A4", "iterations": 3}, "device": "cpu",
    }))  # fmt: skip
    return ["run", str(recipe), "--out", str(folder / "out")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--limit", type=float, default=6.0, help="GiB")
    parser.add_argument("--label", default="now")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--folder", type=Path, default=Path("results/memory/peaks"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"{args.network.split('/')[-1]}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for job in args.jobs:
        with tempfile.TemporaryDirectory() as folder:
            row = measured(command_of(job, args, Path(folder)), args.limit, Path(folder))
        row = {"label": args.label, "job": job, **row}
        print(json.dumps(row), flush=True)
        rows = [other for other in rows if (other["label"], other["job"]) != (args.label, job)] + [row]
        result = {
            "benchmark": "memory_peaks", "network": args.network, "images": IMAGES, "limit_gib": args.limit,
            "rows": rows, "environment": environment(),
        }  # fmt: skip
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
