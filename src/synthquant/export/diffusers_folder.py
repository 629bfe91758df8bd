"""A quantized pipeline of diffusers: a folder with all of its parts, its denoiser as packed codes; and loading it.

    FOLDER/model_index.json            as diffusers writes it
    FOLDER/scheduler, vae, ...         all other parts, as `save_pretrained` writes them
    FOLDER/unet/config.json            the denoiser's architecture (or `transformer/`)
    FOLDER/unet/model.safetensors      its packed codes, `export.checkpoint`
    FOLDER/unet/quant_config.json      what they mean
    FOLDER/README.md                   the model card

diffusers itself does not open it: there are no float weights, which it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.errors import ModelError, UnsupportedModelError, VerificationError
from synthquant.core.files import atomic_folder, write_text
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quality_file import read_quality
from synthquant.core.record import RunRecord
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.pipelines import Conditions, DiffusionPipeline, Sampling
from synthquant.diffusion.quantized import (
    LOADERS,
    as_quantized,
    calibration_of,
    checkpoint_of,
    is_saved_pipeline,
    load_quantized,
    save_parts,
    static_timesteps,
    write_calibration,
)
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.compare import row, run_beside
from synthquant.export.flat import flat_output
from synthquant.export.model_card import CARD_NAME, pipeline_card
from synthquant.export.quant_config import read_config
from synthquant.methods import EXPORTERS
from synthquant.models.float_model import ModelSource
from synthquant.models.open import open_model
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel

# Drawn with both to be sure that the pipelines around the networks are the same, too.
_SEEDS = (0, 1)
_CONDITIONS: Mapping[str, Conditions] = {"none": None, "prompts": ["a photo", "a drawing"], "labels": [0, 1]}


def load_pipeline(source: str | Path, *, device: torch.device | str = "cpu") -> Any:
    """Return a quantized pipeline of diffusers: its `unet` or `transformer` holds codes and quantizes activations.

    `source` is the folder of a run or checkpoint, whose other parts come from the pipeline that was quantized, or a
    folder that `--to diffusers` wrote, which has them all. It is called as any pipeline of its class, and
    `save_pretrained` writes such a folder. With modulation each call is a trajectory of its own.

    Raises:
        ModelError: there is no quantized network, it is damaged, or it is none of a diffusion pipeline.
        MissingExtraError: diffusers is not installed.
    """
    if checkpoint_of(str(source)) is None:
        raise ModelError(f"{source} holds no quantized network: give the folder of a run, or one of --to diffusers")
    return load_quantized(str(source), torch.device(device), "auto")


def quantized_pipeline(quant_model: QuantModel) -> Any:
    """Return the pipeline of diffusers around a quantized denoiser; raises `UnsupportedModelError` for another one."""
    model = _denoiser_of(quant_model)

    def save(pipeline: Any, folder: Path) -> None:
        _write(quant_model, pipeline, folder, None)

    return as_quantized(model.pipeline.replaced(quant_model).pipeline, quant_model.sampling, save)


@LOADERS.register("quantized")
def load(source: str, device: torch.device) -> Any:
    """Load what `load_pipeline` names; raises as it does."""
    checkpoint = checkpoint_of(source)
    assert checkpoint is not None
    entry = read_config(checkpoint).float_model
    if entry.task != "denoise":
        raise ModelError(f"{source} holds a quantized {entry.name}, which is no denoiser of a diffusion pipeline")
    if is_saved_pipeline(source):
        own = ModelSource(source=f"diffusers/{source.removeprefix('diffusers/')}")
        architecture = open_model(own, pretrained=False, device=device)
        return quantized_pipeline(load_checkpoint(checkpoint, architecture=architecture))
    return quantized_pipeline(load_checkpoint(checkpoint, device=device))


@EXPORTERS.register("diffusers")
class DiffusersFolder(Settings):
    """Folder of a diffusers pipeline whose denoiser is packed codes, with a model card, for `load_pipeline`."""

    suffix: ClassVar[str] = ""

    run: str | None = Field(default=None, min_length=1)
    """Run whose recipe and measured quality stand on the card; none: the one that is exported."""

    def of_run(self, run: Path) -> DiffusersFolder:
        """Return the exporter of this run's network."""
        return self if self.run is not None else self.model_copy(update={"run": str(run)})

    def export(self, quant_model: QuantModel, path: Path, *, origin: Mapping[str, str] | None = None) -> Path:
        """Write the folder and return it; a card has no room for an `origin`.

        Raises `UnsupportedModelError` if the network is no denoiser of a diffusion pipeline.
        """
        model = _denoiser_of(quant_model)
        with atomic_folder(path, replace=True) as temporary:
            _write(quant_model, model.pipeline.pipeline, temporary, None if self.run is None else Path(self.run))
        return path

    def check(self, quant_model: QuantModel) -> None:
        """Every scheme can be written; raises `UnsupportedModelError` if the network is no denoiser."""
        _denoiser_of(quant_model)

    def verify(
        self, quant_model: QuantModel, path: Path, images: ImageSet | Samples, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        """Load the folder, compare outputs on at most 128 samples, and draw two images: all must be the same.

        Raises:
            VerificationError: an output or an image differs.
        """
        pipelines = [quantized_pipeline(quant_model), load_pipeline(path, device=quant_model.device)]
        name = _denoiser_of(quant_model).pipeline.denoiser_name
        loaded: QuantModel = getattr(pipelines[1], name).module
        takes = loaded.float_model.example(1)

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            args, kwargs = takes.arguments([tensor.to(loaded.device) for tensor in tensors])
            return flat_output(loaded(*args, **kwargs))

        beside = run_beside(quant_model, {"loaded": run}, images, 128, progress)
        if not all(torch.equal(beside.outputs["loaded"][name], value) for name, value in beside.reference.items()):
            raise VerificationError("the folder's denoiser gives other outputs than the network it was made from")
        drawn = [self._draw(pipeline, quant_model) for pipeline in pipelines]
        if not torch.equal(drawn[0], drawn[1]):
            raise VerificationError("the folder's pipeline draws other images than the one it was made from")
        return {beside.noun: beside.count, "loaded": row(beside.differences("loaded")), "drawn": len(drawn[0])}

    def _draw(self, pipeline: Any, quant_model: QuantModel) -> Tensor:
        opened = DiffusionPipeline(pipeline, quant_model.float_model.name, quant_model.device)
        steps = len(static_timesteps(opened)) or 2
        return opened.draw(_CONDITIONS[opened.conditioning], _SEEDS, Sampling(steps=steps)).images


def _write(quant_model: QuantModel, pipeline: Any, folder: Path, run: Path | None) -> None:
    model = _denoiser_of(quant_model)
    name = model.pipeline.denoiser_name
    save_checkpoint(quant_model, folder / name, card=False)
    save_parts(pipeline, folder, name, model.pipeline.denoiser)
    calibration = None if run is None else calibration_of(str(run))
    if calibration is not None:
        write_calibration(calibration, folder / name)
    record = None if run is None or not (run / "run.json").is_file() else RunRecord.load(run / "run.json")
    quality = None if run is None else read_quality(run)
    size = (folder / name / "model.safetensors").stat().st_size
    parts = {
        part: type(module).__name__
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    card = pipeline_card(quant_model, name, model.pipeline.conditioning, parts, size, record, quality)
    write_text(folder / CARD_NAME, card)


def _denoiser_of(quant_model: QuantModel) -> Denoiser:
    model = quant_model.float_model
    if not isinstance(model, Denoiser):
        raise UnsupportedModelError(
            f"{model.name} is no denoiser of a diffusion pipeline; export it as {', '.join(_others())}"
        )
    return model


def _others() -> list[str]:
    return [name for name in EXPORTERS.names() if name != "diffusers"]
