"""Top-1 of exported networks in ONNX Runtime and OpenVINO beside the quantized network in torch, by the command line.

    python benchmarks/onnx_accuracy.py --name cifar10-resnet20 --model zoo/cifar10-resnet20 --images IMAGES \
        --data bundled/cifar10-test --work FOLDER

For each case of `CASES` it types what a user would: `quantize`, `export`, `evaluate` of the run and of the file in both
runtimes, and writes results/onnx_accuracy/NAME.json. IMAGES is what is quantized with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from synthquant.core.files import write_json
from synthquant.core.record import environment

ROOT = Path(__file__).parent.parent
FULL = ["--set", "scheme.deploy=full", "--set", "scheme.weights.symmetric=true"]
CASES = {
    "W8A8, deploy full": ("W8A8", "ort-cpu", FULL),
    "W4A4": ("W4A4", "simulate", []),
    "W2A4": ("W2A4", "simulate", []),
}


def synthquant(*arguments: str | Path) -> dict[str, Any]:
    """Run one command; what it prints."""
    command = [str(Path(sys.executable).with_name("synthquant")), *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def row_of(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case."""
    scheme, preset, extra = CASES[name]
    run = arguments.work / f"{arguments.name}-{scheme}"
    file = arguments.work / f"{arguments.name}-{scheme}.onnx"
    model = [arguments.model, *(["--weights", arguments.weights] if arguments.weights else [])]
    settings = ["--set", f"iterations={arguments.iterations}"] if arguments.method != "rtn" else []
    synthquant(
        *("quantize", *model, "--images", arguments.images, "--scheme", scheme, "--method", arguments.method),
        *("--out", run, *settings, *extra),
    )
    data = ["--data", arguments.data]
    export = synthquant("export", run, "--to", "onnx", "--preset", preset, "--out", file, *data)
    measured = {
        "torch": synthquant("evaluate", run, *data),
        "onnxruntime": synthquant("evaluate", file, *data),
        "openvino": synthquant("evaluate", file, *data, "--runtime", "openvino"),
    }
    return {
        "case": name,
        "preset": preset,
        "top1": {where: found["top1"] for where, found in measured.items()},
        "count": measured["torch"]["count"],
        "verification": export["verification"],
        "bytes": {"onnx": file.stat().st_size, "checkpoint": (run / "model" / "model.safetensors").stat().st_size},
    }


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="names the result file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--images", required=True, help="what to quantize with")
    parser.add_argument("--data", required=True, help="labelled images")
    parser.add_argument("--method", default="genie_m")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    out = ROOT / "results" / "onnx_accuracy"
    out.mkdir(parents=True, exist_ok=True)
    rows = [row_of(name, arguments) for name in arguments.cases]
    budget = {"method": arguments.method, "iterations": arguments.iterations}
    result = {"network": arguments.name, "model": arguments.model, **budget, "rows": rows, "environment": environment()}
    write_json(out / f"{arguments.name}.json", result)
    for row in rows:
        print(row["case"], row["top1"], row["bytes"])


if __name__ == "__main__":
    main()
