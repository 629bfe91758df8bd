"""A real Ray on this machine with two workers, one of which is really killed."""

from __future__ import annotations

import builtins
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from synthquant.core.errors import InputError, MissingExtraError
from synthquant.core.files import sha256_file
from synthquant.core.progress import QUIET
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.store import ImageSetWriter
from synthquant.distributed.ray_cluster import ray_session
from synthquant.distributed.ray_synthesis import Drawer, DrawerPool, DrawerTask
from synthquant.distributed.ray_workers import RayWorkers
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.synthesize.batches import open_writer
from synthquant.synthesize.noise import Noise
from synthquant.synthesize.text_to_image import TextToImage

COUNT = 21


@pytest.fixture(scope="module")
def network() -> FloatModel:
    return open_model("zoo/cifar10-resnet20")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_a_worker_is_killed_and_the_set_is_that_of_one_process(
    cluster: None, generator_folder: Path, network: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = TextToImage(generator=str(generator_folder), steps=2, batch_size=2)
    pools: list[DrawerPool] = []
    killed: list[int] = []
    original = DrawerPool.__init__

    def remember(self: DrawerPool, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        pools.append(self)

    def append(self: ImageSetWriter, *args: Any) -> None:
        write(self, *args)
        if not killed:  # after the first part, with batches of both workers under way
            killed.append(pools[0].get(pools[0].workers[1].pid.remote()))
            os.kill(killed[0], signal.SIGKILL)

    write = ImageSetWriter.append
    with monkeypatch.context() as patch:
        patch.setattr(DrawerPool, "__init__", remember)
        patch.setattr(ImageSetWriter, "append", append)
        writer = open_writer(tmp_path / "ray", "text_to_image", method, COUNT, 0, network)
        images = RayWorkers("local", 2).synthesize(method, network, COUNT, Rng(0), writer, QUIET)
    (pool,) = pools
    assert len(pool.workers) == 2 and killed
    assert pool.get(pool.workers[1].pid.remote()) != killed[0]  # another process is in its place

    alone = open_writer(tmp_path / "one", "text_to_image", method, COUNT, 0, network)
    expected = method.synthesize(network, COUNT, Rng(0), writer=alone)
    assert len(images) == COUNT and len(set(images.column("seed"))) == COUNT
    assert images.column("seed") == expected.column("seed")
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "one")
    _redrawing_is_the_same(pool, method, network)


def _redrawing_is_the_same(pool: DrawerPool, method: TextToImage, network: FloatModel) -> None:
    local = method.task(network, Rng(0)).drawing(method.open_generator("cpu"), None)
    batches = [next(iter(source.batches([range(4)]))) for source in (pool, local)]
    for batch, source in zip(batches, (pool, local), strict=True):
        batch.rejected[1].append("duplicate")
        source.redraw(batch, [1])  # type: ignore[attr-defined]
    of_pool, of_process = batches
    assert of_pool.prompts == of_process.prompts and of_pool.rejected == of_process.rejected
    assert torch.equal(of_pool.pixels, of_process.pixels)
    of_pool.rejected[2] = ["unsafe"] * 100  # an error of a worker is an error here
    with pytest.raises(InputError, match=r"gives no usable image for .* 100 unsafe"):
        pool.redraw(of_pool, [2])


def test_more_workers_than_there_is_room_for(cluster: None, network: FloatModel, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "set", "text_to_image", TextToImage(), 3, 0, network)
    with pytest.raises(InputError, match=r"1000 workers on a Ray cluster of .* ask for fewer"):
        RayWorkers("local", 1000).synthesize(TextToImage(), network, 3, Rng(0), writer, QUIET)


def test_a_worker_keeps_what_was_wrong_for_the_one_who_asks(network: FloatModel, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    task = TextToImage(generator=str(tmp_path / "none")).task(network, Rng(0))
    with pytest.raises(InputError, match="there is no pipeline folder"):
        Drawer(DrawerTask(task, None), torch.get_num_threads()).fingerprint()


def test_a_finished_set_needs_no_cluster(network: FloatModel, generator_folder: Path, tmp_path: Path) -> None:
    method = TextToImage(generator=str(generator_folder), steps=1)
    method.synthesize(network, 2, Rng(0), writer=open_writer(tmp_path, "text_to_image", method, 2, 0, network))
    writer = open_writer(tmp_path, "text_to_image", method, 2, 0, network)
    images = RayWorkers("host.invalid:1").synthesize(method, network, 2, Rng(0), writer, QUIET)
    assert images.fingerprint == ImageSet.open(tmp_path).fingerprint


def test_other_methods_are_refused(network: FloatModel, tmp_path: Path) -> None:
    writer = open_writer(tmp_path, "noise", Noise(), 2, 0, network)
    with pytest.raises(InputError, match="only text_to_image and self_sampling are spread over a Ray cluster"):
        RayWorkers("local").synthesize(Noise(), network, 2, Rng(0), writer, QUIET)


def test_addresses_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the cluster of other tests would be used
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(InputError, match=f"no Ray cluster answers at '{address}'"), ray_session(address):
                pass
    with pytest.raises(InputError, match="'somewhere' is not of the form HOST:PORT"), ray_session("somewhere"):
        pass


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'synthquant\[ray\]'"), ray_session("local"):
        pass
