"""Two processes on one machine (gloo) beside one: the same training up to the rounding of sums."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model, small_images

from synthquant.core.errors import InputError
from synthquant.core.processes import ALONE, Processes, joined
from synthquant.core.rng import Rng
from synthquant.core.tensor_file import digest_of
from synthquant.data.image_set import ImageSet
from synthquant.finetune import GDFQ, Distill, batches
from synthquant.finetune import fine_tuning as loop
from synthquant.finetune.fine_tuning import FineTuning
from synthquant.methods import FineTuned
from synthquant.nn.quant_model import QuantModel

# Labels, because adamw makes steps of a gradient that is as small as the rounding of sums.
SMALL: dict[str, Any] = {"iterations": 6, "batch_size": 8, "evaluations": 3, "cross_entropy": 0.5}
RENEWAL = {"every": 2, "images": 4, "iterations": 2}
WAYS: dict[str, FineTuning] = {
    "distill": Distill(**SMALL, label_doubt=0.9, clip=1.0, average=0.5),
    "streamed": Distill(**SMALL, optimizer="sgd"),
    "renewed": Distill(**SMALL, renewal=RENEWAL),
    "gdfq": GDFQ(**SMALL, generator_warm_up=2, latent_size=6),
}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["synthquant.cli", "synthquant.pipeline", "torch._dynamo", "tests.small_networks"])


def found(tuned: FineTuned) -> dict[str, Any]:
    points = [point.model_dump(mode="json", exclude_none=True) for point in tuned.report.points or ()]
    return {"points": points, "state": {name: value.float().tolist() for name, value in tuned.last.state().items()}}


def trained(way: str, quant_model: QuantModel, images: ImageSet, workdir: Path | None = None) -> FineTuned:
    batches._IN_MEMORY = 0 if way == "streamed" else 2**30
    return WAYS[way].train(quant_model, images, Rng(0), workdir=workdir)


def as_launched(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)


def two_processes(rank: int, port: int, folder: Path) -> None:
    as_launched(rank, port)
    own = folder / str(rank)
    own.mkdir()
    quant_model = calibrated_model(small_float_model(own), "W3A3")
    results: dict[str, Any] = {}
    with joined("cpu") as (processes, _):
        assert processes == Processes(rank, 2)
        decoded = watch_decoding()
        for way in WAYS:
            results[way] = found(trained(way, quant_model, small_images(20)))
        results["decoded"] = decoded
        results["refused"] = []
        other_start = quant_model if rank == 0 else calibrated_model(quant_model.float_model, "W4A4")
        for images, start, method in (
            (small_images(20, seed=rank), quant_model, WAYS["distill"]),
            (small_images(20), other_start, WAYS["distill"]),
            (small_images(20), quant_model, Distill(**SMALL, temperature=1.0 + rank)),
            (small_images(20), quant_model, Distill(**{**SMALL, "batch_size": 7})),
            (small_images(20 if rank == 0 else 1), quant_model, WAYS["distill"]),
        ):
            with pytest.raises(Exception) as refused:
                method.train(start, images, Rng(0), workdir=folder / "refused")
            results["refused"].append(f"{refused.typename}: {refused.value}")
        results["killed"] = killed_and_resumed(quant_model, folder / "killed")
    (own / "results.json").write_text(json.dumps(results))


def watch_decoding() -> list[int]:
    decoded: list[int] = []
    original = batches.input_batches

    def watch(images: Any, preprocess: Any, size: int, positions: Any) -> Any:
        for batch in original(images, preprocess, size, positions):
            if size == SMALL["batch_size"] // 2:  # not where a state is looked at, on all images held out
                decoded.extend(batch.indices)
            yield batch

    batches.input_batches = watch
    return decoded


def killed_and_resumed(quant_model: QuantModel, workdir: Path) -> list[str]:
    whole = trained("distill", quant_model, small_images(20))
    step = loop._Training._step

    def die(self: Any, number: int, batch: Any) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number, batch)

    loop._Training._step = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trained("distill", quant_model, small_images(20), workdir)
    loop._Training._step = step  # type: ignore[method-assign]
    resumed = trained("distill", quant_model, small_images(20), workdir)
    return [digest_of(model.state()) for model in (whole.last, resumed.last, whole.best, resumed.best)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    processes = [_CONTEXT.Process(target=two_processes, args=(rank, port, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in (folder / "killed").iterdir()] == ["training.safetensors"]
    return [json.loads((folder / str(rank) / "results.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one_does(results: list[dict[str, Any]], way: str, tmp_path: Path) -> None:
    assert results[0][way] == results[1][way]
    in_memory = batches._IN_MEMORY
    alone = found(trained(way, calibrated_model(small_float_model(tmp_path), "W3A3"), small_images(20)))
    batches._IN_MEMORY = in_memory
    assert len(alone["points"]) == 4
    for one, two in zip(alone["points"], results[0][way]["points"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    for name, value in alone["state"].items():
        torch.testing.assert_close(
            torch.tensor(results[0][way]["state"][name]), torch.tensor(value), rtol=1e-5, atol=1e-5, msg=name
        )


def test_no_process_decodes_images_of_another(results: list[dict[str, Any]]) -> None:
    own = [one["decoded"] for one in results]
    assert len(own[0]) == len(own[1]) >= 4 * SMALL["iterations"]
    for start in range(0, 4 * SMALL["iterations"], 4):
        assert not set(own[0][start : start + 4]) & set(own[1][start : start + 4])


def test_what_differs_is_refused_everywhere_and_told_by_the_first(results: list[dict[str, Any]]) -> None:
    first, second = (one["refused"] for one in results)
    for line, what in zip(first, ("images", "quantized networks", "settings"), strict=False):
        assert line == f"InputError: process 1 has other {what} than process 0; give all of them the same"
    assert "2 processes do not divide 7" in first[3]
    assert first[4].startswith("OtherProcessError: process 1: 1 samples are too few")
    assert all(line.startswith("OtherProcessError: process ") for line in second)


def test_a_killed_training_of_two_goes_on_to_the_same_bytes(results: list[dict[str, Any]]) -> None:
    last, resumed, best, resumed_best = results[0]["killed"]
    assert last == resumed and best == resumed_best
    assert results[0]["killed"] == results[1]["killed"]


def test_alone_nothing_is_sent() -> None:
    assert Processes.current() == ALONE
    with pytest.raises(InputError):
        ALONE.together(lambda: (_ for _ in ()).throw(InputError("mine")))
    rows = torch.arange(6)
    assert ALONE.share(rows) is rows and Processes(1, 3).share(rows).tolist() == [2, 3]
