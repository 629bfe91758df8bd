"""Where the bundled diffusion models lie: folders that diffusers opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from synthquant.core.errors import ModelError, UnknownNameError

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


def pipeline_card(name: str) -> dict[str, Any]:
    """Return how the diffusion model was trained and what it reached.

    Raises `UnknownNameError` as `pipeline_folder` does, and `ModelError` if the card is missing.
    """
    path = pipeline_folder(name) / "card.json"
    if not path.is_file():
        raise ModelError(f"the card of {name} is missing at {path}; install synthquant again")
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card
