"""A trajectory recorded by a real Ray on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests import small_diffusion as small

from synthquant.core.errors import InputError
from synthquant.core.files import sha256_file
from synthquant.core.progress import QUIET
from synthquant.core.rng import Rng
from synthquant.distributed.ray_trajectory import Recorder, RecorderTask, require_same_pipeline
from synthquant.distributed.ray_workers import RayWorkers
from synthquant.models.float_model import ModelSource
from synthquant.models.open import open_model
from synthquant.synthesize.self_sampling import SelfSampling, denoiser_of

METHOD = SelfSampling(sampler_steps=4, steps=2, batch_size=2)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_the_trajectory_is_that_of_one_process(cluster: None, tmp_path: Path) -> None:
    model = open_model(str(small.saved(small.ddim(), tmp_path / "pipeline")))
    writer = METHOD.open_writer(tmp_path / "ray", QUIET)
    found = RayWorkers("local", 2).record(METHOD, model, 14, Rng(0), writer, QUIET)
    METHOD.synthesize(model, 14, Rng(0), writer=METHOD.open_writer(tmp_path / "one", QUIET))
    assert len(found) == 14 and hashes(tmp_path / "ray") == hashes(tmp_path / "one")


def test_a_finished_trajectory_needs_no_cluster(tmp_path: Path) -> None:
    model = open_model(str(small.saved(small.ddim(), tmp_path / "pipeline")))
    METHOD.synthesize(model, 4, Rng(0), writer=METHOD.open_writer(tmp_path / "set", QUIET))
    writer = METHOD.open_writer(tmp_path / "set", QUIET)
    assert len(RayWorkers("host.invalid:1").record(METHOD, model, 4, Rng(0), writer, QUIET)) == 4


def test_workers_record_and_other_pipelines_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    model = open_model(str(small.saved(small.ddim(), tmp_path / "pipeline")))
    task = METHOD.task(model, 4, Rng(0))
    worker = Recorder(RecorderTask(model.source, task), 1)
    assert worker.fingerprint() == denoiser_of(model).pipeline.fingerprint
    form, repeats, tensors = worker.record(task.piece(0))
    assert form == task.manifest.arguments and repeats == 1 and tensors["sample"].shape == (2, 2, 1, 3, 8, 8)
    other = Recorder(RecorderTask(ModelSource(source=str(tmp_path / "none")), task), 1)
    with pytest.raises(InputError, match="is not of a known form"):
        other.fingerprint()
    with pytest.raises(InputError, match="a worker opens another pipeline under the name"):
        require_same_pipeline(["0" * 64], model)
