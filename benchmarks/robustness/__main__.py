"""Kill commands, damage their files, give them hostile images and wrong arguments, and count what happens.

    python benchmarks/robustness --work FOLDER [--only kills flips images arguments] [--seed 0]

Everything is made and read by commands, each in a process of its own, on the bundled networks with budgets of seconds.
A case is *identical* if the result is that of undisturbed work (of images: if what is no image is set aside and said),
*refused* if the command ends with one line that says why, and *wrong* otherwise. Exits with 1 if any is wrong, if
anything is left over, or if anyone saw a traceback.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

import arguments
import flips
import images
import kills
from made import Made
from synthquant.core.record import environment

PARTS = {"kills": (kills.trials, 60), "flips": (flips.trials, 60), "images": (images.trials, 60),
         "arguments": (arguments.trials, 150)}  # fmt: skip


def summary(rows: list[dict[str, object]]) -> dict[str, object]:
    """Counts of verdicts over all kinds, and by kind."""
    kinds = dict.fromkeys(str(row["kind"]) for row in rows)
    return {
        "cases": len(rows),
        **{name: sum(row["verdict"] == name for row in rows) for name in ("identical", "refused", "wrong")},
        "leftovers": sum(len(row.get("leftovers", ())) for row in rows),
        "tracebacks": sum(bool(row["traceback"]) for row in rows),
        "kinds": {kind: Counter(str(row["verdict"]) for row in rows if row["kind"] == kind) for kind in kinds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for scratch; emptied at the start")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, help="cases of each part, instead of 60, 60, 60 and 150")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/robustness"))
    args = parser.parse_args()
    work = args.work.resolve() / "robustness"
    shutil.rmtree(work, ignore_errors=True)
    made = Made.make(work / "made")
    args.out.mkdir(parents=True, exist_ok=True)
    bad = 0
    for name in args.only:
        trials, usual = PARTS[name]
        rows = []
        for row in trials(made, work / name, args.count or usual, args.seed):
            rows.append(row)
            if row["verdict"] == "wrong" or row["traceback"] or row.get("leftovers"):
                print(json.dumps(row), flush=True)
        counts = summary(rows)
        bad += counts["wrong"] + counts["leftovers"] + counts["tracebacks"]
        print(name, json.dumps({key: counts[key] for key in counts if key != "kinds"}), flush=True)
        result = {"benchmark": "robustness", "part": name, "seed": args.seed, "environment": environment(),
                  "summary": counts, "rows": rows}  # fmt: skip
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
