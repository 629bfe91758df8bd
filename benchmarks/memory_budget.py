"""Peak memory of reconstruction under two budgets, each in a process of its own.

    python benchmarks/memory_budget.py --images IMAGES --count 1024 --budgets 4 0.1

Reports for each budget (GiB of cache in main memory) what the caches held by place, how far the process grew from just
before reconstruction, and a hash of the result: the budget must not change it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from synthquant.core.progress import QUIET
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.sources import open_images
from synthquant.methods import MemoryBudget
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.genie_m import GenieM
from synthquant.quantize.reconstruct import Reconstruction


def resident() -> int:
    """Bytes of main memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def child(args: argparse.Namespace) -> None:
    """Reconstruct under one budget and print what it took."""
    model = open_model(args.model, weights=args.weights)
    images = open_images(args.images)
    images = images.subset(range(min(args.count, len(images))))
    quant_model = QuantModel.build(model, "W4A4")
    settings = GenieM(iterations=args.iterations, batch_size=args.batch_size)
    calibration = CalibrationSet(quant_model, images)
    calibrate_weights(quant_model, settings.observer)
    count = settings.calibration_images
    calibrate_activations(quant_model, calibration, count, settings.observer, quantized_weights=False)
    before, highest, stop = resident(), resident(), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.is_set():
            highest = max(highest, resident())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        budget = MemoryBudget(host_gib=args.budgets[0])
        engine = Reconstruction(quant_model, calibration, "block", budget, Path(folder))
        (phase,) = settings.phases()
        began = time.perf_counter()
        engine.run(phase, Rng(0), QUIET)
        seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    digest = hashlib.sha256()
    for name, tensor in sorted(quant_model.state().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    print(json.dumps({
        "budget_gib": args.budgets[0], "cache_mib": {k: v / 2**20 for k, v in engine.store.peak.items()},
        "growth_mib": (highest - before) / 2**20, "seconds": seconds, "result": digest.hexdigest(),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/cifar10-resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0, 0.1], help="GiB")
    parser.add_argument("--out", type=Path, default=Path("results/memory/budget.json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    shared = ["--model", args.model, "--images", args.images, "--count", str(args.count)]
    shared += ["--iterations", str(args.iterations), "--batch-size", str(args.batch_size)]
    shared += ["--weights", args.weights] if args.weights else []
    rows = []
    for budget in args.budgets:
        line = [sys.executable, __file__, "--child", *shared, "--budgets", str(budget)]
        rows.append(json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "memory_budget", "model": args.model, "count": args.count, "rows": rows,
        "same_result": len({row["result"] for row in rows}) == 1, "environment": environment(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
