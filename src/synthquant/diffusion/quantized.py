"""Quantized pipelines: which folders hold one, and how they behave as pipelines of diffusers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from synthquant.core.errors import InputError, ModelError
from synthquant.core.files import atomic_folder, read_json, read_sealed_json, write_json, write_sealed_json
from synthquant.core.record import RunRecord
from synthquant.core.registry import Registry
from synthquant.data.manifest import TRAJECTORY_NAME
from synthquant.diffusion.library import DENOISERS, INDEX, Precision, quiet
from synthquant.diffusion.trajectory_manifest import read_trajectory_manifest
from synthquant.nn.quant_model import QuantModel

if TYPE_CHECKING:
    from synthquant.diffusion.pipelines import DiffusionPipeline

CALIBRATION = "calibration.json"
"""Beside the checkpoint of an exported folder: what it was calibrated for."""

QUANT_CONFIG = "quant_config.json"
"""The file by which a folder is known to hold a quantized network."""

Sampler = Callable[[], AbstractContextManager[None]]
"""Gives what one call of a pipeline runs in."""

Loader = Callable[[str, torch.device], Any]

LOADERS: Registry[Loader] = Registry("loader of quantized pipelines", home="synthquant.export.diffusers_folder")
"""`quantized`: from a folder to a pipeline of diffusers on a device. It lies above this room."""

# Where diffusers and transformers say that a part was loaded from: a path of this machine.
_ORIGIN = "_name_or_path"

_CLASSES: dict[type, type] = {}


def checkpoint_of(source: str) -> Path | None:
    """Return where the quantized network of a run, a checkpoint or a folder that `--to diffusers` wrote lies."""
    folder = Path(source.removeprefix("diffusers/")).expanduser()
    for place in (folder, folder / "model", *(folder / name for name in DENOISERS)):
        if (place / QUANT_CONFIG).is_file():
            return place
    return None


def is_saved_pipeline(source: str) -> bool:
    """Return whether a folder has all parts of a pipeline, as `--to diffusers` writes it."""
    return (Path(source.removeprefix("diffusers/")).expanduser() / INDEX).is_file()


def load_quantized(source: str, device: torch.device, dtype: Precision) -> Any:
    """Return the quantized pipeline in a folder; raises `InputError` for a precision that it does not compute in."""
    if dtype not in ("auto", "float32"):
        raise InputError(f"{source} holds a quantized network, which computes in float32, not {dtype}; leave dtype out")
    return LOADERS.get("quantized")(source, device)


def require_float(source: str) -> None:
    """Raise `ModelError` if a quantized pipeline is named where the float one is meant."""
    if is_saved_pipeline(source) and checkpoint_of(source) is not None:
        raise ModelError(
            f"{source} holds a quantized denoiser, no float weights; name the pipeline that it was made from, or sample"
            " this one"
        )


@dataclass(frozen=True)
class Calibration:
    """What the ranges of a quantized denoiser were set for."""

    sampler_steps: int
    """Steps of the sampler that its calibration set was recorded at."""
    scheduler: str
    """Class of that sampler."""


def calibration_of(source: str) -> Calibration | None:
    """Return what a quantized pipeline was calibrated for; none where that is not known any more.

    A run names its trajectory, which may lie elsewhere; a folder that `--to diffusers` wrote says it by itself.
    """
    checkpoint = checkpoint_of(source)
    if checkpoint is None:
        return None
    if (checkpoint / CALIBRATION).is_file():
        found = read_sealed_json(checkpoint / CALIBRATION)
        return Calibration(int(found["sampler_steps"]), str(found["scheduler"]))
    run = checkpoint.parent
    if not (run / "run.json").is_file():
        return None
    given = RunRecord.load(run / "run.json").image_source
    folder = run / "images" if given is None else Path(given).expanduser()
    if not (folder / TRAJECTORY_NAME).is_file():
        return None
    manifest = read_trajectory_manifest(folder / TRAJECTORY_NAME)
    return Calibration(manifest.sampler_steps, str(manifest.scheduler["class"]))


def static_timesteps(pipeline: DiffusionPipeline) -> list[float]:
    """Return the times of the steps whose differences a quantized pipeline has static ranges for; none: of any."""
    network = getattr(pipeline.denoiser, "module", None)
    modulation = network.modulation if isinstance(network, QuantModel) else None
    return [] if modulation is None else [float(time) for time in modulation.run.timesteps.tolist()]


def write_calibration(found: Calibration, checkpoint: Path) -> None:
    """Write it beside a checkpoint; raises `OutputError`."""
    write_sealed_json(checkpoint / CALIBRATION, asdict(found))


def as_quantized(
    pipeline: Any, sampling: Callable[[], AbstractContextManager[None]], save: Callable[[Any, Path], None]
) -> Any:
    """Make a pipeline of diffusers one whose every call is a trajectory of its own, and which is saved quantized.

    Args:
        pipeline: it keeps its class's name, parameters and parts.
        sampling: what a call runs in.
        save: writes it into an empty folder.
    """
    cls = type(pipeline)
    if cls not in _CLASSES:
        _CLASSES[cls] = _quantized_class(cls)
    pipeline.__class__ = _CLASSES[cls]
    pipeline.__dict__["_synthquant"] = (sampling, save)
    return pipeline


def save_parts(pipeline: Any, folder: Path, denoiser_name: str, denoiser: nn.Module) -> None:
    """Write all parts of a pipeline but its denoiser, of which only the architecture is written, and their index.

    `denoiser` is the pipeline's own one, of diffusers, whatever stands in its place.
    """
    with quiet():
        for name, part in pipeline.components.items():
            if name != denoiser_name and hasattr(part, "save_pretrained"):
                part.save_pretrained(folder / name)
        denoiser.save_config(folder / denoiser_name)  # type: ignore[operator]
        twin = copy.copy(pipeline)
        setattr(twin, denoiser_name, denoiser)  # the index names its class
        twin.save_config(folder)
    for path in folder.rglob("*.json"):
        found = read_json(path)
        if isinstance(found, dict) and found.pop(_ORIGIN, None) is not None:
            write_json(path, found)


def _quantized_class(cls: Any) -> type:
    """A class of the same name whose calls run in what `as_quantized` was given."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__["_synthquant"][0]():
            return cls.__call__(self, *args, **kwargs)

    def save_pretrained(self: Any, save_directory: str | Path, **options: Any) -> None:
        """Write the quantized pipeline, for `synthquant.load_pipeline`; options of diffusers mean nothing here."""
        if options:
            raise InputError(f"a quantized pipeline is saved without options; leave {', '.join(options)} out")
        with atomic_folder(Path(save_directory), replace=True) as temporary:
            self.__dict__["_synthquant"][1](self, temporary)

    members = {
        "__call__": call,
        "save_pretrained": save_pretrained,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), members)
