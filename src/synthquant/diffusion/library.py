"""The one door to diffusers: its classes, its schedulers, and pipelines as they are loaded from folders and the hub."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from synthquant.core.errors import MissingExtraError, ModelError, UnknownNameError, UnsupportedModelError
from synthquant.core.hub import hub_or_cache
from synthquant.models.weights import one_line
from synthquant.models.zoo.pipelines import PIPELINES, installed_pipelines, pipeline_folder

DEFAULT_GENERATOR = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Stable Diffusion v1-5, which GenQ uses, by its name on the hub."""

Precision = Literal["auto", "float32", "float16", "bfloat16"]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Samplers by their short names; the full name of any scheduler of diffusers does too."""

Conditioning = Literal["none", "prompts", "labels"]
"""What a pipeline wants to be told of an image: nothing, a prompt, or the number of a class."""

DENOISERS = ("unet", "transformer")
"""What pipelines call the network that predicts noise."""

INDEX = "model_index.json"
"""The file by which a folder is known to be a pipeline."""

# Loading and running a foreign pipeline may raise nearly anything, but Ctrl-C still works.
FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, SafetensorError),
)


# What every pipeline takes that makes images of noise, and what only other kinds take (image to image, video, sound).
_NEEDED = ("num_inference_steps", "generator", "output_type")
_NEEDED_OF_TEXT = ("prompt", "guidance_scale")
_OF_OTHER_KINDS = ("image", "video", "num_frames", "audio_length_in_s", "audio_end_in_s")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and the chatter of diffusers and transformers; both are as before afterwards."""
    loggers = [diffusers_library().utils.logging]
    try:
        import transformers
    except ImportError:
        pass  # diffusers says so itself, where it needs it
    else:
        loggers.append(transformers.utils.logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggers]
    for each in loggers:
        each.set_verbosity(logging.CRITICAL)  # what is wrong is raised as well
        each.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, (verbosity, bars) in zip(loggers, before, strict=True):
            each.set_verbosity(verbosity)
            if bars:
                each.enable_progress_bar()


def diffusers_library() -> Any:
    """Return diffusers; raises `MissingExtraError` if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "diffusion", "diffusion models") from error
    return diffusers


def pipeline_location(source: str) -> str:
    """Return the folder, or the name on the hub, that is meant; raises `ModelError` if there is no such folder."""
    kind, _, name = source.partition("/")
    if kind == "zoo":
        if name in PIPELINES and name not in installed_pipelines():
            raise ModelError(f"{source} is not bundled with this version; give the folder of a pipeline")
        return str(pipeline_folder(name))
    where = name if kind == "diffusers" and "/" in source else source
    if not where:
        raise ModelError(f"{source} names no pipeline; give diffusers/FOLDER or diffusers/OWNER/NAME")
    path = Path(where).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelError(
            f"{where} is a file; give the folder of a diffusers pipeline, which save_pretrained writes of one that"
            " from_single_file has read"
        )
    if where.startswith((".", "/", "~")) or where.count("/") != 1:
        raise ModelError(
            f"there is no pipeline folder {where}; give the folder of a diffusers pipeline or a name such as"
            f" {DEFAULT_GENERATOR}"
        )
    return where


def pipeline_index(location: str, source: str) -> Mapping[str, Any]:
    """Return what a pipeline says of its parts; raises `ModelError` if it is none or cannot be read."""
    if Path(location).is_dir() and not (Path(location) / INDEX).is_file():
        raise ModelError(f"{source} is no diffusers pipeline: it has no {INDEX}")
    try:
        with quiet(), nullcontext() if Path(location).is_dir() else hub_or_cache():
            index = diffusers_library().DiffusionPipeline.load_config(location)
    except FOREIGN_ERRORS as error:
        raise not_opened(source, error) from error
    if not isinstance(index, Mapping):
        raise ModelError(f"{source} is no diffusers pipeline: its {INDEX} does not name the parts of one")
    return index


def pipeline_class(index: Mapping[str, Any], source: str) -> Any:
    """Return the class of a pipeline; raises `UnsupportedModelError` if this diffusers does not have it."""
    diffusers, name = diffusers_library(), index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise UnsupportedModelError(f"{source} is a {name}, which diffusers {diffusers.__version__} does not have")
    return cls


def conditioning_of(cls: Any, source: str) -> Conditioning:
    """Return what pipelines of a class want to be told of an image, as far as their class says.

    Raises `UnsupportedModelError` for those that do not make images of noise, prompts and labels.
    """
    parameters = inspect.signature(cls.__call__).parameters
    fits = all(key in parameters for key in _NEEDED) and not any(key in parameters for key in _OF_OTHER_KINDS)
    if fits and all(key in parameters for key in _NEEDED_OF_TEXT):
        return "prompts"
    if fits and "class_labels" in parameters and parameters["class_labels"].default is inspect.Parameter.empty:
        return "labels"
    if fits and "batch_size" in parameters:
        return "none"
    raise UnsupportedModelError(
        f"{source} is a {cls.__name__}, which does not make images of noise, or of prompts or class labels; choose a"
        " pipeline that does"
    )


def denoiser_name(parts: Mapping[str, Any], source: str) -> str:
    """Return which of a pipeline's parts is its denoiser; raises `UnsupportedModelError` if none is there."""
    for name in DENOISERS:
        if parts.get(name) is not None:
            return name
    raise UnsupportedModelError(
        f"{source} has no denoiser: neither a unet nor a transformer is among its parts; choose another pipeline"
    )


def load_pipeline(cls: Any, location: str, source: str, **options: Any) -> Any:
    """Return a pipeline, its weights read from safetensors only; raises `ModelError` if it cannot be read."""
    with quiet(), nullcontext() if Path(location).is_dir() else hub_or_cache():
        try:
            return cls.from_pretrained(location, use_safetensors=True, trust_remote_code=False, **options)
        except ImportError as error:
            raise MissingExtraError("transformers", "diffusion") from error
        except FOREIGN_ERRORS as error:
            raise not_opened(source, error) from error


def without_checker(cls: Any, safety_checker: bool) -> dict[str, Any]:
    """Return the options by which a pipeline is loaded without its safety checker, or with it."""
    if safety_checker or "safety_checker" not in inspect.signature(cls.__init__).parameters:
        return {}
    return {"safety_checker": None, "requires_safety_checker": False}


def load_denoiser(
    index: Mapping[str, Any], name: str, location: str, source: str, dtype: torch.dtype, *, published: bool
) -> nn.Module:
    """Return the network `name` of a pipeline with exactly the weights that are there, or random ones.

    Raises `ModelError` if it cannot be read or its weights are not those of its architecture: adapters beside them for
    one, which diffusers would leave out in silence.
    """
    diffusers = diffusers_library()
    _, kind = index[name]
    cls: Any = getattr(diffusers, str(kind), None)
    if not hasattr(cls, "from_pretrained"):
        raise UnsupportedModelError(f"the {name} of {source} is a {kind}, no network of diffusers")
    with quiet(), nullcontext() if Path(location).is_dir() else hub_or_cache():
        try:
            if not published:
                config = cls.load_config(location, subfolder=name)
                module: nn.Module = cls.from_config(config)
                return module.to(dtype)
            module, found = cls.from_pretrained(
                location,
                subfolder=name,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
            )
        except FOREIGN_ERRORS as error:
            raise not_opened(source, error) from error
    wrong = {
        "missing": found.get("missing_keys"),
        "unexpected": found.get("unexpected_keys"),
        "misshapen": [key for key, *_ in found.get("mismatched_keys") or ()],
    }
    names = [key for keys in wrong.values() for key in keys or ()]
    if any("lora" in key.lower() or ".base_layer." in key for key in names):
        raise unfused(f"the {name} of {source}")
    for what, keys in wrong.items():
        if keys:
            raise ModelError(
                f"the {name} of {source} does not have the weights of a {type(module).__name__} of its config.json:"
                f" {len(keys)} are {what}, for example {sorted(keys)[0]}"
            )
    return module


def require_no_adapters(module: nn.Module, what: str) -> None:
    """Raise `ModelError` if a network has adapters (LoRA) beside its weights."""
    if any(type(part).__module__.partition(".")[0] == "peft" or hasattr(part, "lora_A") for part in module.modules()):
        raise unfused(what)


def unfused(what: str) -> ModelError:
    """Return the error for a network with adapters beside its weights."""
    return ModelError(
        f"{what} has adapters (LoRA) beside its weights, and quantization needs one weight for each layer; fuse them"
        " (pipe.fuse_lora(), then pipe.unload_lora_weights()) and save the pipeline again"
    )


def scheduler_like(scheduler: Any, name: str) -> Any:
    """Return another scheduler with the noise schedule of `scheduler`; raises `UnknownNameError`."""
    diffusers = diffusers_library()
    cls = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin) and hasattr(cls, "from_config")):
        raise UnknownNameError("scheduler", name, SCHEDULERS)
    # Stable Diffusion's PNDM starts without Runge-Kutta steps; other schedulers do not know the word.
    options = {"skip_prk_steps": True} if name == "pndm" else {}
    with quiet():
        return cls.from_config(scheduler.config, **options)


def precision(name: Precision, device: torch.device) -> torch.dtype:
    """Return the type that is meant; "auto" is float16 on an accelerator and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def denoiser_output(sample: torch.Tensor) -> Any:
    """Return what networks of diffusers give, with an attribute `sample`."""
    return diffusers_library().models.modeling_outputs.Transformer2DModelOutput(sample=sample)


def not_opened(source: str, error: Exception) -> ModelError:
    """Return the error for what diffusers raised."""
    hint = ""
    if isinstance(error, OSError) and not Path(source.removeprefix("diffusers/")).is_dir():
        hint = "; it is no folder here, and a name on the hub needs a network connection or a copy in the cache"
    elif isinstance(error, OSError) and "safetensors found in" in str(error):
        hint = "; weights are read from safetensors only, which save_pretrained writes: others may hold code"
    return ModelError(f"pipeline {source} cannot be opened: {type(error).__name__}: {one_line(error)}{hint}")
