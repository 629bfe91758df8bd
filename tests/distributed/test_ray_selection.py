"""Scores from two workers of a real Ray, one of which is really killed, beside those of one process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.small_networks import small_float_model, small_images

from synthquant.core.errors import DataError, InputError, ModelError, UnsupportedModelError
from synthquant.core.files import sha256_file
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.distributed.ray_cluster import WorkerPool
from synthquant.distributed.ray_selection import Looker, LookerTask, look_with, require_same_network
from synthquant.distributed.ray_workers import RayWorkers
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.select import BatchNormSensitivity, Energy, LearnedBatchNormDistance, write_selection
from synthquant.select.batch_norm import BatchNormProbe
from synthquant.select.scan import scan

COUNT = 40
FILTERS = [Energy(keep=0.7), BatchNormSensitivity(keep=20), LearnedBatchNormDistance(keep=10, sample=16, set_size=4)]


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


@pytest.fixture
def pool(tmp_path: Path) -> ImageSet:
    return small_images(COUNT).save(tmp_path / "pool")


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: sha256_file(path) for path in folder.glob("part-*")}
    return found | {"selection": json.loads((folder / "selection.json").read_text())}


def test_a_worker_is_killed_and_the_choice_is_that_of_one_process(
    cluster: None, model: FloatModel, pool: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[WorkerPool] = []
    killed: list[int] = []
    answer = WorkerPool.get
    original = WorkerPool.__init__

    def remember(self: WorkerPool, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        pools.append(self)
        killed.append(answer(self, self.workers[1].pid.remote()))

    def kill(self: WorkerPool, promised: Any) -> Any:
        result = answer(self, promised)
        if pools and len(killed) == 1:  # after the first batch, with batches of both workers under way
            killed.append(killed[0])
            os.kill(killed[0], signal.SIGKILL)
        return result

    calls: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    options: dict[str, Any] = {"real": pool.subset(range(9)), "batch_size": 4}
    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "__init__", remember)
        patch.setattr(WorkerPool, "get", kill)
        workers = RayWorkers("local", 2)
        kept = write_selection(tmp_path / "ray", pool, model, FILTERS, Rng(0), workers=workers, **options)
        (workers_used,) = pools
        assert len(killed) == 2 and answer(workers_used, workers_used.workers[1].pid.remote()) != killed[0]
    # Here only 9 real images ran, the corrupted ones, and 2 of noise; the batch norms are asked for by two filters.
    assert sum(calls) == 9 + 4 * 16 + 2
    handle.remove()
    alone = write_selection(tmp_path / "one", pool, model, FILTERS, Rng(0), **options)
    assert len(kept) == 10 and kept.fingerprint == alone.fingerprint
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_images_travel_with_their_bytes(pool: ImageSet, tmp_path: Path) -> None:
    batch = pool.detached(range(32, 40))
    files = batch_of_files(tmp_path / "files", 3)
    for path in (*(tmp_path / "pool").glob("part-*"), *(tmp_path / "files").iterdir()):
        path.unlink()
    expected = small_images(COUNT)
    for images, indices in ((batch, range(32, 40)), (files, range(3)), (expected.detached([5, 3]), (5, 3))):
        assert images.labels is None and images.column_names == ()
        found = [images[place].image for place in range(len(images))]
        assert all(torch.equal(image, expected[index].image) for image, index in zip(found, indices, strict=True))
    assert batch.manifest.framing == pool.manifest.framing
    assert len({images.fingerprint for images in (batch, files, expected.detached([0]))}) == 3
    with pytest.raises(DataError, match="image set has no column 'seed'"):
        batch.column("seed")


def batch_of_files(folder: Path, count: int) -> ImageSet:
    folder.mkdir()
    for index in range(count):
        Image.fromarray(small_images(COUNT)[index].image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return open_images(folder).detached(range(count))


class InThisProcess(WorkerPool):
    """A pool of one looker that is not sent anywhere."""

    def __init__(self, looker: Looker) -> None:
        self.looker = looker

    def in_order(self, method: str, pieces: Iterable[Any]) -> Iterator[Any]:
        return (getattr(self.looker, method)(piece) for piece in pieces)


def test_rows_of_others_are_those_of_this_process_and_broken_images_are_named(
    model: FloatModel, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    batch_of_files(tmp_path / "files", 12)
    for index in (4, 5, 6, 7, 9):  # a whole batch, and one of another
        (tmp_path / "files" / f"{index}.png").write_bytes(b"no image")
    here, there = (open_images(tmp_path / "files") for _ in range(2))
    probe, other = BatchNormProbe(model.module), BatchNormProbe(model.module)
    seen = scan(here, model, [probe], batch_size=4)
    looker = Looker(LookerTask(model.source, model.preprocess, (BatchNormSensitivity(),), True, 4), 1)
    blocks = look_with(InThisProcess(looker), there, 4)
    gathered = scan(there, model, [other], batch_size=4, blocks=blocks)
    assert len(seen.positions) == 7 and torch.equal(gathered.positions, seen.positions)
    assert torch.equal(gathered.pixels, seen.pixels) and torch.equal(gathered.finite, seen.finite)
    assert torch.equal(gathered.tables[probe.name], seen.tables[probe.name])
    assert other.norms.names == probe.norms.names and torch.equal(other.norms.values, probe.norms.values)
    assert there.set_aside == here.set_aside and len(there.set_aside) == 5


def task_of(model: FloatModel, source: ModelSource) -> LookerTask:
    return LookerTask(source, model.preprocess, (Energy(),), False, 4)


def test_what_a_worker_cannot_open_is_said_to_the_one_who_asks(model: FloatModel, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    source = ModelSource(source=str(tmp_path / "none.py:build"))
    with pytest.raises(ModelError, match=r"none\.py"):
        Looker(task_of(model, source), torch.get_num_threads()).fingerprint()


def test_a_worker_with_other_weights_is_refused(model: FloatModel) -> None:
    assert require_same_network([model.fingerprint] * 2, model) is None
    with pytest.raises(InputError, match=r"a worker opens other weights under the name .*small_network\.py:build"):
        require_same_network([model.fingerprint, "0" * 64], model)


def test_an_unfit_network_is_refused_before_a_cluster_is_asked_for(tmp_path: Path) -> None:
    model = open_model("zoo/cifar10-vit")
    workers = RayWorkers("host.invalid:1")
    with pytest.raises(UnsupportedModelError, match="no batch norm"):
        write_selection(tmp_path / "set", small_images(8), model, [BatchNormSensitivity()], Rng(0), workers=workers)
    assert not (tmp_path / "set").exists()
