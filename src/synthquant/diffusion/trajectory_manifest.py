"""What a trajectory says about itself: `trajectory.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from synthquant.core.errors import DataError, InputError
from synthquant.core.files import read_sealed_json, write_sealed_json
from synthquant.core.settings import Settings, parse_settings

UNFINISHED_NAME = "trajectory.parts.json"
"""The same while parts are missing: it is what a killed run goes on from."""
FORMAT_VERSION = 1

Storage = Literal["float32", "float16"]


class TrajectoryPart(Settings):
    """One safetensors file."""

    name: str = Field(pattern=r"^part-[0-9]+\.safetensors$")
    """File name, in the folder of the manifest."""
    images: int = Field(ge=1)
    """Images in it."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of the file."""


class TrajectoryManifest(Settings):
    """What is in a trajectory and how it came about. Holds no times, so equal runs write equal bytes."""

    version: int = FORMAT_VERSION
    """Version of the format."""
    method: str
    """What recorded it."""
    settings: dict[str, Any]
    """The method's settings."""
    seed: int
    """The seed of the run."""
    source: str
    """The pipeline, as it was named."""
    pipeline: str = Field(pattern="^[0-9a-f]{64}$")
    """Fingerprint of the pipeline as it was opened."""
    scheduler: dict[str, Any]
    """Class and settings of the scheduler that it was sampled with."""
    sampler_steps: int = Field(ge=1)
    """Steps that were asked for."""
    timesteps: tuple[float, ...] = Field(min_length=1)
    """The time of each step that the sampler made."""
    steps: tuple[int, ...] = Field(min_length=1)
    """Steps that were recorded, counted from 0, ascending."""
    guidance: float | None
    """Classifier-free guidance scale; none: the pipeline has no guidance."""
    count: int = Field(ge=1)
    """Pairs of image and step."""
    repeats: int = Field(ge=1)
    """Rows of each pair: 2 with guidance, without condition and with it."""
    rows: int = Field(ge=1)
    """Rows of the set."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Of the noise of each image."""
    conditions: tuple[str, ...] | tuple[int, ...] | None
    """Prompt or label of each image; none: the pipeline is unconditional."""
    storage: Storage
    """Precision of what is not a time."""
    arguments: dict[str, Any]
    """How the denoiser's arguments are made of the tensors in a part (`trajectory_form`)."""
    parts: tuple[TrajectoryPart, ...] = ()
    """Files, in order."""


def read_trajectory_manifest(path: Path) -> TrajectoryManifest:
    """Read a manifest; raises `DataError` if it is missing, damaged or of another version."""
    try:
        content = read_sealed_json(path)
        if content.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {content.get('version')!r}, this release reads version {FORMAT_VERSION}"
            )
        return parse_settings(TrajectoryManifest, content, str(path))
    except DataError:
        raise
    except InputError as error:
        raise DataError(str(error)) from error


def write_trajectory_manifest(path: Path, manifest: TrajectoryManifest) -> None:
    """Write a manifest that carries the hash of its own content; raises `OutputError`."""
    write_sealed_json(path, manifest.model_dump(mode="json"))
