"""What keeping freed memory gives: processor time, page faults and memory of inversion, with and without, in turns.

    python benchmarks/allocator.py --model torchvision/mobilenet_v2 --weights FILE --count 8 --iterations 10

Each run is a process of its own that makes the same images several times; its resident memory after each time shows
whether it grows, and the fingerprint of the images whether anything else changed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from synthquant.core.allocator import ALLOCATOR
from synthquant.core.record import environment, peak_memory_bytes


def child(args: argparse.Namespace) -> None:
    """Make images and print what it took."""
    if args.keep:
        ALLOCATOR.keep_freed()
    from synthquant.core.rng import Rng
    from synthquant.models.open import open_model
    from synthquant.synthesize.genie_d import GenieD

    model = open_model(args.model, weights=args.weights)
    method = GenieD(batch_size=args.count, iterations=args.iterations)
    began = resource.getrusage(resource.RUSAGE_SELF)
    resident = []
    fingerprints = set()
    for _ in range(args.times):
        fingerprints.add(method.synthesize(model, args.count, Rng(0)).fingerprint)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(round(pages * resource.getpagesize() / 2**20))
    ended = resource.getrusage(resource.RUSAGE_SELF)
    steps = args.count * args.iterations * args.times
    peak = peak_memory_bytes()
    print(json.dumps({
        "kept": args.keep, "allocator": ALLOCATOR.state,
        "user_ms": 1000 * (ended.ru_utime - began.ru_utime) / steps,
        "system_ms": 1000 * (ended.ru_stime - began.ru_stime) / steps,
        "minor_faults": (ended.ru_minflt - began.ru_minflt) / steps,
        "resident_mib": resident, "peak_mib": None if peak is None else round(peak / 2**20),
        "images": sorted(fingerprints),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/cifar10-resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--times", type=int, default=3, help="how often a process makes the images")
    parser.add_argument("--repeats", type=int, default=2, help="processes of either kind")
    parser.add_argument("--out", type=Path, default=Path("results/memory/allocator.json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    shared = ["--model", args.model, "--count", str(args.count), "--iterations", str(args.iterations)]
    shared += ["--times", str(args.times), *(["--weights", args.weights] if args.weights else [])]
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    rows = []
    for _ in range(args.repeats):
        for kind in ([], ["--keep"]):
            line = [sys.executable, __file__, "--child", *kind, *shared]
            rows.append(json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, env=own).stdout))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "allocator", "model": args.model, "count": args.count, "iterations": args.iterations,
        "rows": rows, "same_images": len({image for row in rows for image in row["images"]}) == 1,
        "environment": environment(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
