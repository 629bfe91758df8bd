"""What an image set says about itself: `manifest.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from synthquant.core.errors import DataError, InputError
from synthquant.core.files import read_sealed_json, write_sealed_json
from synthquant.core.settings import Settings, is_unset, parse_settings

MANIFEST_NAME = "manifest.json"
TRAJECTORY_NAME = "trajectory.json"
"""The manifest of what a diffusion model was given, which is no set of images."""
FORMAT_VERSION = 2
"""Since 2 a manifest carries the hash of its own content (`core.files.write_sealed_json`)."""
_UNSEALED_VERSION = 1

ImageDtype = Literal["uint8", "float16"]
Framing = Literal["cropped", "raw"]


class Part(Settings):
    """One Parquet file of a set."""

    name: str = Field(pattern=r"^part-[0-9]+\.parquet$")
    """File name, in the folder of the manifest."""
    count: int = Field(ge=0)
    """Images in it."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Hash of the file."""


class SetAside(Settings):
    """An image that was left out."""

    name: str
    """Its path or its place in the source."""
    reason: str
    """Why it was left out."""


class Statistics(Settings):
    """Pixel statistics over all finite images, in pixel space (0..1 nominal)."""

    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    min: float
    """Smallest value."""
    max: float
    """Largest value."""
    outside: float | None = Field(default=None, ge=0, le=1, exclude_if=is_unset)
    """Share of the values that lie outside 0..1, beyond black and white; none in sets of older releases."""


class Manifest(Settings):
    """What is in a set and how it came about. Holds no times, so equal runs write equal bytes."""

    version: int = FORMAT_VERSION
    """Version of the format."""
    count: int = Field(ge=0)
    """Images in the set."""
    dtype: ImageDtype = "uint8"
    """Pixel type: `uint8`, or `float16` where values may leave 0..1."""
    framing: Framing = "raw"
    """`cropped`: each image is what a network of `image_size` sees; `raw`: to be resized and cropped first."""
    image_size: tuple[int, int] | None = None
    """Height and width, if all images share them."""
    method: str | None = None
    """What made the images."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The method's settings."""
    seed: int | None = None
    """The seed they were made with."""
    model_fingerprint: str | None = None
    """Fingerprint of the network they were made from."""
    class_names: tuple[str, ...] | None = None
    """What the labels mean, in their order, where they are positions of named folders; none: they are class numbers."""
    statistics: Statistics | None = None
    """Pixel statistics; none if not measured."""
    parts: tuple[Part, ...] = ()
    """Files, in order; empty for images kept elsewhere."""
    set_aside: tuple[SetAside, ...] = ()
    """Images that were left out, with reasons."""
    quality: dict[str, Any] = Field(default_factory=dict)
    """Findings of the quality checks: positions of suspicious images by kind."""
    measured: dict[str, Any] = Field(default_factory=dict, exclude_if=is_unset)
    """What the method measured of the network before it began, and made the images with; each method says what."""
    redrawn: dict[str, int] = Field(default_factory=dict)
    """How many images the method made and did not take, by reason; each was made again."""

    @field_validator("parts")
    @classmethod
    def _check_each_part_once(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is listed more than once")
        return parts


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an image set; raises `DataError` if it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder} is not a finished image set: it has no {MANIFEST_NAME}")
    return read_manifest_file(path)


def read_manifest_file(path: Path) -> Manifest:
    """Read what `write_manifest_file` wrote; raises `DataError` if it is missing, damaged or of another version."""
    try:
        content = read_sealed_json(path, unsealed={"version": _UNSEALED_VERSION})
        if content.get("version") not in (_UNSEALED_VERSION, FORMAT_VERSION):
            raise DataError(
                f"{path} has format version {content.get('version')!r}, this release reads versions"
                f" {_UNSEALED_VERSION} to {FORMAT_VERSION}"
            )
        return parse_settings(Manifest, {**content, "version": FORMAT_VERSION}, str(path))
    except DataError:
        raise
    except InputError as error:
        raise DataError(str(error)) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes the set a finished one; raises `OutputError`."""
    write_manifest_file(folder / MANIFEST_NAME, manifest)


def write_manifest_file(path: Path, manifest: Manifest) -> None:
    """Write a manifest that carries the hash of its own content; raises `OutputError`."""
    write_sealed_json(path, manifest.model_dump(mode="json"))
