"""Commands that a launcher starts several times: one of them writes and tells."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.small_networks import SOURCE, small_images

from synthquant.cli import main
from synthquant.core.record import RunRecord
from synthquant.finetune.state_file import StateFile, TrainingState

SMALL = ("--set=iterations=6", "--set=batch_size=4", "--set=evaluations=3", "--device=cpu", "--trust-code")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["synthquant.cli", "synthquant.pipeline", "torch._dynamo", "matplotlib.pyplot"])


def command(rank: int, port: int, arguments: list[str], folder: Path, dying: bool) -> None:
    """What a launcher does, with output in files; dying as soon as there is something to go on from."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()}
    sys.stdout, sys.stderr = (open(folder / f"{rank}.{kind}", "w") for kind in ("out", "err"))  # noqa: SIM115
    if dying and rank == 0:
        save = StateFile.save

        def save_and_die(self: StateFile, state: TrainingState) -> None:
            save(self, state)
            os.kill(os.getpid(), signal.SIGKILL)

        StateFile.save = save_and_die  # type: ignore[method-assign]
    main(arguments)


def launched(folder: Path, *each: list[object], dying: bool = False) -> tuple[list[int | None], list[str]]:
    """Exit statuses of two processes, and what they printed (out, err, of the first and of the second)."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    started: list[Any] = []
    for rank, arguments in enumerate(each if len(each) == 2 else each * 2):
        texts = [str(one) for one in arguments]
        started.append(_CONTEXT.Process(target=command, args=(rank, port, texts, folder, dying)))
        started[-1].start()
    for process in started:
        process.join(200)
    names = (f"{rank}.{kind}" for rank in (0, 1) for kind in ("out", "err"))
    return [process.exitcode for process in started], [(folder / name).read_text() for name in names]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "small_network.py").write_text(SOURCE)
    small_images(24).save(folder / "images")
    source = f"source: '{folder}/small_network.py:build'"
    model = f"{{{source}, input_size: [16, 16], mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}"
    (folder / "recipe.yaml").write_text(
        f"model: {model}\nimages: {{source: {folder}/images, count: 20}}\n"
        "quantize: {method: rtn, scheme: W3A3, calibration_images: 16}\n"
        "finetune: {method: distill, iterations: 6, batch_size: 4, evaluations: 3}\n"
        f"evaluate: {folder}/images\ndevice: cpu\n"
    )
    return folder / "recipe.yaml"


def weights(run: Path) -> list[bytes]:
    return [(run / name / "model.safetensors").read_bytes() for name in ("model", "last")]


def test_one_process_does_the_run_and_the_others_train_with_it(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, (out, _, silent_out, silent_err) = launched(tmp_path, ["run", recipe, "--out", whole])
    assert status == [0, 0] and "agreement" in out and silent_out == silent_err == ""
    record = RunRecord.load(whole / "run.json")
    assert record.stages["finetune"].metrics["steps"] == 6 and (whole / "report.html").is_file()
    status, (_, _, silent_out, silent_err) = launched(tmp_path, ["run", recipe, "--out", killed], dying=True)
    assert status == [-signal.SIGKILL, 1] and silent_out == silent_err == ""
    assert not (killed / "last").exists()
    assert launched(tmp_path, ["run", recipe, "--out", killed])[0] == [0, 0]
    assert weights(killed) == weights(whole)
    tuned = tmp_path / "tuned"
    status, _ = launched(tmp_path, ["finetune", whole, "--out", tuned, *SMALL])
    assert status == [0, 0] and (tuned / "model").is_dir()


def test_what_fails_ends_all_with_one_line_of_the_first(recipe: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    lines = recipe.read_text().splitlines()
    bare.write_text("\n".join(line for line in lines if not line.startswith("finetune")))
    out = tmp_path / "out"
    run: list[object] = ["run", recipe, "--out", out]
    for each, expected in (
        ([[*run, "--set=finetune.iterations=5"], run], "process 1 has other finetune.iterations than process 0"),
        ([["run", bare, "--out", out]], "only fine-tuning is shared by several"),
        ([[*run, "--set=images.count=99"]], "images.count is 99 but"),
    ):
        status, (_, error, _, silent) = launched(tmp_path, *each)
        assert status == [1, 1] and silent == ""
        assert expected in error and error.count("error:") == 1 and "Traceback" not in error
    assert not out.exists()
