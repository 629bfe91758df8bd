"""Run the tutorials of `examples/` at their own size, and keep what they print for the documentation.

    python benchmarks/tutorials.py [NAME ...]

Writes `results/examples/NAME.json`; `docs/hooks.py` shows it below the code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthquant.core.record import environment

ROOT = Path(__file__).parent.parent
TUTORIALS = ("own_network", "segmentation_to_onnx", "text_to_image_data")


def main() -> None:
    for name in sys.argv[1:] or TUTORIALS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        found = {"printed": done.stdout, "seconds": time.perf_counter() - start, "environment": environment()}
        path = ROOT / "results" / "examples" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
