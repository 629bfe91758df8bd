"""How fast an exported network runs beside the float export of the same architecture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from synthquant.core.cpu import has_vnni
from synthquant.core.progress import QUIET, Progress
from synthquant.core.record import environment
from synthquant.export.flat import input_names, output_names
from synthquant.export.onnx.build import export_module
from synthquant.export.onnx.runtime import ort_function, read_metadata, session
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.runtimes import SpeedTest

T = TypeVar("T")

_WARM_UP = 3
# Seconds of a turn.
_TURN = 0.25


def measure_speed(
    path: Path,
    test: SpeedTest,
    *,
    model: str | None = None,
    trust_code: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Measure latency and throughput in ONNX Runtime, the two networks in turns, so that both see the same machine.

    The float network is the same architecture exported as it is; its weights do not change its speed, so they are
    random and nothing is downloaded.

    Args:
        path: a file that `Onnx` wrote.
        test: how it is measured.
        model: the name of the network that was quantized, which lets code of its run.
        trust_code: whether code that the file names as its network may run.
        progress: messages.

    Returns:
        `float` and `quantized` (median `milliseconds` of a call, `images_per_second`, `bytes`, `calls`), `speedup`,
        `size_ratio`, `batch`, `threads`, `vnni`, `environment`.

    Raises:
        ModelError: the file is not one of ours, its architecture cannot be built again, or it names code.
    """
    metadata = read_metadata(path)
    source = metadata.float_model.source.confirmed(str(path), model=model, trust_code=trust_code)
    float_model = open_model(source, pretrained=False)
    with TemporaryDirectory() as folder:
        reference = Path(folder) / "float.onnx"
        progress.say(f"export float {float_model.name}")
        export_float(float_model, reference)
        files = {"float": reference, "quantized": path}
        networks = {
            name: ort_function(session(file, threads=test.threads, exact=False)) for name, file in files.items()
        }
        progress.say(f"measure for {2 * test.seconds:.0f} seconds")
        times = in_turns(networks, float_model.example(test.batch).tensors, test.seconds)
        rows = {name: _row(times[name], test.batch, file.stat().st_size) for name, file in files.items()}
    return {
        **rows,
        "speedup": rows["float"]["milliseconds"] / rows["quantized"]["milliseconds"],
        "size_ratio": rows["quantized"]["bytes"] / rows["float"]["bytes"],
        "batch": test.batch,
        "threads": test.threads,
        "vnni": has_vnni(),
        "environment": environment(),
    }


def export_float(model: FloatModel, path: Path) -> Path:
    """Write the float network as ONNX, batch norms left to the runtime, which folds them.

    What it takes and gives has the names that it has in the quantized network's file.

    Raises:
        UnsupportedModelError: an operation has no ONNX form.
    """
    import onnx_ir as ir

    from synthquant.export.onnx.graph import name_ends

    graph = export_module(model.module, model)
    name_ends(graph, input_names(model), output_names(model))
    ir.save(graph, path)
    return path


def in_turns(
    networks: Mapping[str, Callable[[T], object]],
    inputs: T,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the times of single calls [s] of each network, in turns of a fraction of a second, `seconds` each in all.

    A turn begins with calls that are not counted: the threads of the network before it still wait for work, busily,
    and the caches hold its weights. `clock` times the calls: `time.process_time` compares networks of one thread beside
    other work on the machine.
    """
    times: dict[str, list[float]] = {name: [] for name in networks}
    end = time.perf_counter() + seconds * len(networks)
    while time.perf_counter() < end or not all(times.values()):
        for name, network in networks.items():
            for _ in range(_WARM_UP):
                network(inputs)
            turn = time.perf_counter() + _TURN
            while True:
                start = clock()
                network(inputs)
                times[name].append(clock() - start)
                if time.perf_counter() >= turn:
                    break
    return times


def _row(times: list[float], batch: int, size: int) -> dict[str, Any]:
    middle = statistics.median(times)
    return {
        "milliseconds": 1000 * middle,
        "images_per_second": batch / middle,
        "bytes": size,
        "calls": len(times),
    }
