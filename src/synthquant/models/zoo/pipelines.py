"""Where the bundled diffusion models lie: folders that diffusers opens."""

from __future__ import annotations

from pathlib import Path

from synthquant.core.errors import UnknownNameError

PIPELINES = {
    "cifar10-ddpm": "unconditional denoiser of 32x32 images, a diffusers DDIMPipeline",
    "cifar10-text2image": "text to 32x32 images, a diffusers StableDiffusionPipeline",
}
"""All diffusion models that `training/` knows how to train, with what each is."""

_FOLDER = Path(__file__).parent / "pipelines"


def installed_pipelines() -> tuple[str, ...]:
    """Return the names whose folder is in the package, sorted."""
    return tuple(name for name in sorted(PIPELINES) if (_FOLDER / name / "model_index.json").is_file())


def pipeline_folder(name: str) -> Path:
    """Return the folder of the bundled diffusion model `name`, in the layout `DiffusionPipeline.from_pretrained` reads.

    Raises `UnknownNameError` if there is none, or if it is not in this package.
    """
    if name not in installed_pipelines():
        raise UnknownNameError("bundled diffusion model", name, installed_pipelines())
    return _FOLDER / name
