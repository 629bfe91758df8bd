"""The one door to diffusers: text-to-image pipelines, opened by name, called with prompts and seeds."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from synthquant.core.device import resolve_device
from synthquant.core.errors import InputError, MissingExtraError, ModelError, UnknownNameError, UnsupportedModelError
from synthquant.core.hub import hub_or_cache
from synthquant.core.settings import Settings
from synthquant.diffusion.embedding import Embedding, read_embedding
from synthquant.diffusion.text_cache import TextCache
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

# What every text-to-image pipeline takes, and what only other kinds take (image to image, video, sound).
_NEEDED = ("prompt", "num_inference_steps", "guidance_scale", "generator", "output_type")
_OF_OTHER_KINDS = ("image", "video", "num_frames", "audio_length_in_s", "audio_end_in_s")

# Loading and running a foreign pipeline may raise nearly anything, but Ctrl-C still works.
_FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, SafetensorError),
)


class Sampling(Settings):
    """How a pipeline draws."""

    steps: int = Field(default=50, ge=1)
    """Steps of the sampler."""

    guidance: float = Field(default=3.5, ge=0)
    """Classifier-free guidance scale; 1 or less draws without guidance, in half the time."""

    negative_prompt: str = ""
    """What the images should not show; needs guidance."""

    height: int | None = Field(default=None, ge=8)
    """Height of the images in pixels; none: the pipeline's own."""

    width: int | None = Field(default=None, ge=8)
    """Width of the images in pixels; none: the pipeline's own."""

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"give height and width or neither, got height {self.height} and width {self.width}")
        return self


@dataclass(frozen=True)
class Drawn:
    """What a pipeline drew."""

    images: Tensor
    """uint8 `[B, 3, H, W]`, on the CPU."""
    unsafe: tuple[bool, ...]
    """Which images the pipeline's safety checker has blanked."""
    finite: tuple[bool, ...]
    """Which images held finite numbers only; what was not is 0 in `images`."""


class TextToImagePipeline:
    """An opened pipeline: prompts and seeds to images. Each image has a random generator of its own."""

    def __init__(self, pipeline: Any, name: str, device: torch.device) -> None:
        self.pipeline = pipeline
        self.name = name
        self.device = device
        self._parameters = inspect.signature(type(pipeline).__call__).parameters
        self._texts = TextCache(pipeline, device)
        self._added: list[Tensor] = []

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the weights as they were loaded, precision included, the scheduler's settings, and
        the embeddings that were added.
        """
        digest = hashlib.sha256(self._opened.encode())
        for vectors in self._added:
            digest.update(vectors.numpy().tobytes())
        return digest.hexdigest() if self._added else self._opened

    @cached_property
    def _opened(self) -> str:
        """Fingerprint without embeddings."""
        digest = hashlib.sha256(type(self.pipeline).__name__.encode())
        scheduler = self.pipeline.scheduler
        values = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        digest.update(f"{type(scheduler).__name__} {json.dumps(values, sort_keys=True, default=str)}".encode())
        for part, module in sorted(self.pipeline.components.items()):
            for name, value in sorted(module.state_dict().items()) if isinstance(module, nn.Module) else ():
                digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Drawn:
        """Draw one image for each prompt and seed, all together.

        An image depends on its prompt, its seed and `sampling`; the others drawn with it change it by no more than the
        rounding of sums. Its noise is drawn on the CPU, so that it is the same on every device.

        Raises `InputError` if the pipeline cannot draw like that, for example of that size.
        """
        options = self._options(prompts, sampling)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with quiet(), torch.no_grad():
            try:
                result = self.pipeline(
                    **self._texts.arguments(prompts, sampling.guidance, sampling.negative_prompt),
                    **options,
                    num_inference_steps=sampling.steps,
                    guidance_scale=sampling.guidance,
                    generator=generators,
                    output_type="pt",
                )
            except torch.OutOfMemoryError:
                raise
            except _FOREIGN_ERRORS as error:
                raise InputError(f"{self.name} cannot draw: {type(error).__name__}: {one_line(error)}") from error
        pixels = result.images.float()
        finite = torch.isfinite(pixels).flatten(1).all(1).tolist()
        images = pixels.nan_to_num(0, 0, 0).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
        unsafe = getattr(result, "nsfw_content_detected", None) or [False] * len(prompts)
        return Drawn(images=images, unsafe=tuple(map(bool, unsafe)), finite=tuple(finite))

    def is_cut(self, prompt: str) -> bool:
        """Return whether a prompt is longer than the text encoder reads, which then sees its beginning only."""
        return self._texts.is_cut(prompt)

    def load_embedding(self, path: Path) -> str:
        """Load a textual-inversion embedding and return the token that stands for it in prompts.

        Raises `ModelError` if the file is none or has another width than the text encoder, `UnsupportedModelError` if
        the pipeline takes none.
        """
        return self.add_embedding(read_embedding(path), str(path))

    def add_embedding(self, embedding: Embedding, where: str) -> str:
        """Give the text encoder a new token; returns it. Raises as `load_embedding` does."""
        if not hasattr(self.pipeline, "load_textual_inversion") or hasattr(self.pipeline, "text_encoder_2"):
            raise UnsupportedModelError(
                f"{self.name} ({type(self.pipeline).__name__}) has not one text encoder, for which {where} was made;"
                " use a Stable Diffusion pipeline or leave the embedding out"
            )
        width = self.pipeline.text_encoder.get_input_embeddings().weight.shape[1]
        if embedding.vectors.shape[1] != width:
            raise ModelError(
                f"{where} holds an embedding of width {embedding.vectors.shape[1]}, the text encoder of {self.name} has"
                f" width {width}; tune one for this generator"
            )
        if embedding.token in self.pipeline.tokenizer.get_vocab():
            raise ModelError(f"{where} is for the token {embedding.token!r}, which {self.name} already has")
        _ = self._opened  # before the text encoder's table grows
        with quiet():
            self.pipeline.load_textual_inversion({embedding.token: embedding.vectors})
        self._texts.clear()
        self._added.append(embedding.vectors.cpu())
        return embedding.token

    def _options(self, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
        if len(prompts) == 0:
            raise InputError("no prompts to draw")
        given = {"height": sampling.height, "width": sampling.width}
        options = {key: value for key, value in given.items() if value is not None}
        asked = [*options, *(["negative_prompt"] if sampling.negative_prompt else [])]
        for key in asked:
            if key not in self._parameters:
                raise InputError(f"{self.name} ({type(self.pipeline).__name__}) takes no {key}; leave it out")
        return options


def open_text_to_image(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: Precision = "auto",
    scheduler: str | None = None,
    safety_checker: bool = True,
    compiled: bool = False,
) -> TextToImagePipeline:
    """Open a diffusers text-to-image pipeline: a folder, `zoo/NAME`, or a name on the hub.

    `dtype` "auto" is float16 on an accelerator and float32 on a CPU. `scheduler` replaces the pipeline's own by one of
    `SCHEDULERS` or of diffusers, with the same noise schedule. Without `safety_checker` the pipeline's one, if it has
    one, is not loaded. `compiled` hands the denoiser to `torch.compile`. Weights are read from safetensors only.

    Raises `ModelError` if there is no such pipeline or it cannot be read, `UnsupportedModelError` if it is not
    text-to-image, `UnknownNameError` for the scheduler, `MissingExtraError` if diffusers is not installed, `InputError`
    if the device cannot be used.
    """
    place = torch.device(resolve_device(str(device)))
    location = _location(source)
    diffusers = _diffusers()
    with quiet(), nullcontext() if Path(location).is_dir() else hub_or_cache():
        cls = _pipeline_class(diffusers, location, source)
        options: dict[str, Any] = {
            "dtype": _dtype(dtype, place),
            "use_safetensors": True,
            "trust_remote_code": False,
        }
        if not safety_checker and "safety_checker" in inspect.signature(cls.__init__).parameters:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        try:
            pipeline = cls.from_pretrained(location, **options)
        except ImportError as error:
            raise MissingExtraError("transformers", "diffusion") from error
        except _FOREIGN_ERRORS as error:
            raise _not_opened(source, error) from error
        if scheduler is not None:
            # Stable Diffusion's PNDM starts without Runge-Kutta steps; other schedulers do not know the word.
            options = {"skip_prk_steps": True} if scheduler == "pndm" else {}
            pipeline.scheduler = _scheduler(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
        pipeline.to(place)
        pipeline.set_progress_bar_config(disable=True)
    if compiled:
        for part in ("unet", "transformer"):
            if isinstance(getattr(pipeline, part, None), nn.Module):
                getattr(pipeline, part).compile()
    return TextToImagePipeline(pipeline, source, place)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and the chatter of diffusers and transformers; both are as before afterwards."""
    loggers = [_diffusers().utils.logging]
    try:
        import transformers
    except ImportError:
        pass  # diffusers says so itself, where it needs it
    else:
        loggers.append(transformers.utils.logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggers]
    for each in loggers:
        each.set_verbosity_error()
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


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "diffusion", "text-to-image") from error
    return diffusers


def _location(source: str) -> str:
    """The folder, or the name on the hub, that is meant."""
    kind, _, name = source.partition("/")
    if kind == "zoo":
        if name in PIPELINES and name not in installed_pipelines():
            raise ModelError(f"{source} is not bundled with this version; give the folder of a pipeline")
        return str(pipeline_folder(name))
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelError(f"{source} is a file; give the folder of a diffusers pipeline")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(
            f"there is no generator folder {source}; give the folder of a diffusers pipeline or a name such as"
            f" {DEFAULT_GENERATOR}"
        )
    return source


def _pipeline_class(diffusers: Any, location: str, source: str) -> Any:
    if Path(location).is_dir() and not (Path(location) / "model_index.json").is_file():
        raise ModelError(f"{source} is no diffusers pipeline: it has no model_index.json")
    try:
        name = diffusers.DiffusionPipeline.load_config(location).get("_class_name")
    except _FOREIGN_ERRORS as error:
        raise _not_opened(source, error) from error
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if cls is None:
        raise UnsupportedModelError(f"{source} is a {name}, which diffusers {diffusers.__version__} does not have")
    parameters = inspect.signature(cls.__call__).parameters
    if any(key not in parameters for key in _NEEDED) or any(key in parameters for key in _OF_OTHER_KINDS):
        raise UnsupportedModelError(f"{source} is a {name}, not a text-to-image pipeline; choose another generator")
    return cls


def _scheduler(diffusers: Any, name: str) -> Any:
    cls = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin) and hasattr(cls, "from_config")):
        raise UnknownNameError("scheduler", name, SCHEDULERS)
    return cls


def _dtype(name: Precision, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _not_opened(source: str, error: Exception) -> ModelError:
    hint = ""
    if isinstance(error, OSError) and not Path(source).is_dir():
        hint = "; it is no folder here, and a name on the hub needs a network connection or a copy in the cache"
    return ModelError(f"generator {source} cannot be opened: {type(error).__name__}: {one_line(error)}{hint}")
