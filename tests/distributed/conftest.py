"""A real Ray on this machine, one for all tests of this folder: it takes long to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from synthquant.distributed.ray_cluster import ray_session


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers take as many each
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else a busy machine leaves them next to nothing
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # two workers on the CPU, whatever else the machine has
        with ray_session("local"):
            yield
    torch.set_num_threads(threads)
