"""From the name of a model to a `FloatModel`: timm, torchvision, transformers, the bundled zoo, or a user's own file.

The only place that imports timm, torchvision and transformers, and only when a model of theirs is asked for.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.device import resolve_device
from synthquant.core.errors import InputError, MissingExtraError, ModelError, UnsupportedModelError
from synthquant.core.hub import hub_or_cache
from synthquant.core.settings import parse_settings
from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.user_file import call_user_function
from synthquant.models.weights import load_weights, one_line
from synthquant.models.zoo import ZOO

FORMS = "timm/NAME, torchvision/NAME, transformers/REPO_OR_FOLDER, zoo/NAME or FILE.py:FUNCTION"
"""The ways to name a model, as they are shown in messages."""

# What building or running a foreign network may raise: its code is not ours, so this is wide, but Ctrl-C still works.
_FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)

# PIL's numbers, which transformers writes into its processor files.
_PIL_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class LogitsOnly(nn.Module):
    """A transformers classifier as a map from images `[B, 3, H, W]` to logits `[B, num_classes]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the `logits` of the model's output."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


@dataclass(frozen=True)
class _Opened:
    """What the library of origin knows about a model."""

    module: nn.Module
    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] | None = None


def open_model(
    source: str | ModelSource,
    *,
    weights: str | Path | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    pretrained: bool = True,
) -> FloatModel:
    """Open a classifier by its name, with the weights in float32, in eval mode and without gradients.

    `input_size` is in pixels (height, width); `mean` and `std` are for pixels in 0..1. They are needed where the model
    does not bring its preprocessing, and replace it elsewhere. With `weights` a file is loaded instead of the published
    weights. `pretrained=False` builds the architecture with random weights and ignores files: the same on every call,
    and the global random state stays as it is. The network is run once on noise, so a wrong input size is found here.

    Raises `ModelError` for a name, file or setting that cannot be used, `UnsupportedModelError` if the network is not a
    classifier of images, `MissingExtraError` if its library is not installed, `InputError` if there is no such device.
    """
    request = _request(source, weights, input_size, mean, std, num_classes)
    place = torch.device(resolve_device(str(device)))
    published = pretrained and request.weights is None
    if published and request.num_classes is not None and not request.source.partition(":")[0].endswith(".py"):
        raise ModelError(f"{request.source}: another number of classes needs weights of your own; give --weights FILE")
    opened = _build(request, published)
    preprocess = _preprocess(opened.preprocess, request)
    module = opened.module
    if pretrained and request.weights is not None:
        load_weights(module.model if isinstance(module, LogitsOnly) else module, Path(request.weights))
    module = module.float().eval().requires_grad_(False).to(place)
    name = request.source.rsplit(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1]
    model = FloatModel(module, preprocess, name, request, device=place)
    classes = _count_classes(model)
    names = opened.class_names if opened.class_names and len(opened.class_names) == classes else None
    return FloatModel(module, preprocess, name, request, num_classes=classes, class_names=names, device=place)


def _request(
    source: str | ModelSource,
    weights: str | Path | None,
    input_size: int | tuple[int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    num_classes: int | None,
) -> ModelSource:
    """One `ModelSource` of everything that was asked for; arguments win over fields of `source`."""
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise ModelError(f"{key} {tuple(values)} must have three values, for red, green and blue")
    base = source if isinstance(source, ModelSource) else ModelSource(source=source)
    given = {
        "weights": None if weights is None else str(weights),
        "input_size": (input_size, input_size) if isinstance(input_size, int) else input_size,
        "mean": mean,
        "std": std,
        "num_classes": num_classes,
    }
    merged = base.model_dump() | {key: value for key, value in given.items() if value is not None}
    return parse_settings(ModelSource, merged, where=f"model {base.source}")


def _build(request: ModelSource, published: bool) -> _Opened:
    kind, _, name = request.source.partition("/")
    file, colon, _ = request.source.rpartition(":")
    if colon and file.endswith(".py"):
        build: Callable[[str, ModelSource, bool], _Opened] = _open_file
        name = request.source
    elif name and kind in _OPENERS:
        build = _OPENERS[kind]
    elif kind == "diffusers":
        raise UnsupportedModelError(f"{request.source} is a diffusion pipeline, not a classifier; give {FORMS}")
    else:
        raise ModelError(f"model {request.source!r} is not of a known form; give {FORMS}")
    with torch.random.fork_rng(devices=[]):
        # Random weights, where there are no others, are the same on every call.
        torch.default_generator.manual_seed(0)
        return build(name, request, published)


def _open_timm(name: str, request: ModelSource, published: bool) -> _Opened:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise MissingExtraError("timm", "models") from error

    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {}
    if request.num_classes is not None:
        options["num_classes"] = request.num_classes
    try:
        known = timm.get_pretrained_cfg(name)
        if request.input_size is not None and known is not None and known.fixed_input_size:
            options["img_size"] = request.input_size
        with hub_or_cache() if published else nullcontext():
            module = timm.create_model(name, pretrained=published, **options)
    except _FOREIGN_ERRORS as error:
        raise _failed(request, error) from error
    subset = timm.data.infer_imagenet_subset(module)
    names = timm.data.ImageNetInfo(subset).label_descriptions() if subset is not None else ()
    config = timm.data.resolve_model_data_config(module)
    return _Opened(module, _timm_preprocess(config, request), tuple(str(text) for text in names))


def _timm_preprocess(config: Mapping[str, Any], request: ModelSource) -> Preprocess | None:
    """As timm evaluates: resize to `size / crop_pct`, then crop. None for its rare way of padding to a square."""
    if config["crop_mode"] not in ("center", "squash"):
        return None
    height, width = config["input_size"][1:]
    scaled = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    return _known_preprocess(
        request,
        input_size=(height, width),
        resize=scaled[0] if scaled[0] == scaled[1] and config["crop_mode"] == "center" else scaled,
        crop=True,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
    )


def _open_torchvision(name: str, request: ModelSource, published: bool) -> _Opened:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError("torchvision", "models") from error

    names = models.list_models(module=models)
    if name not in names:
        raise _unknown("torchvision", name, names)
    best = models.get_model_weights(name).DEFAULT
    options = {} if request.num_classes is None else {"num_classes": request.num_classes}
    # Two old architectures start by drawing random weights for minutes unless told not to.
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    try:
        module = models.get_model(name, weights=best if published else None, **options)
    except _FOREIGN_ERRORS as error:
        raise _failed(request, error) from error
    config = best.transforms()
    preprocess = _known_preprocess(
        request,
        input_size=(config.crop_size[0], config.crop_size[-1]),
        resize=config.resize_size[0] if len(config.resize_size) == 1 else tuple(config.resize_size),
        crop=True,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation.value,
    )
    return _Opened(module, preprocess, tuple(best.meta["categories"]))


def _open_transformers(name: str, request: ModelSource, published: bool) -> _Opened:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "models") from error

    with nullcontext() if Path(name).is_dir() else hub_or_cache():
        return _from_transformers(transformers, name, request, published)


def _from_transformers(transformers: Any, name: str, request: ModelSource, published: bool) -> _Opened:
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if request.num_classes is not None:
            config.num_labels = request.num_classes
        auto = transformers.AutoModelForImageClassification
        if published:
            module = auto.from_pretrained(name, config=config, dtype=torch.float32)
        else:
            module = auto.from_config(config, dtype=torch.float32)
    except _FOREIGN_ERRORS as error:
        raise _failed(request, error) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    named = not all(text == f"LABEL_{index}" for index, text in enumerate(names))
    return _Opened(LogitsOnly(module), _processor_preprocess(name, request), names if named else None)


def _processor_preprocess(name: str, request: ModelSource) -> Preprocess | None:
    """The image processor beside a transformers model; none if every setting is given by hand."""
    import transformers

    if request.input_size and request.mean and request.std:
        return None
    try:
        config = transformers.AutoImageProcessor.from_pretrained(name).to_dict()
    except _FOREIGN_ERRORS as error:
        raise ModelError(
            f"{request.source}: no image processor ({one_line(error)}); give --input-size, --mean and --std"
        ) from error
    size, crop = dict(config["size"]), dict(config.get("crop_size") or {})
    short = size.get("shortest_edge")
    resize = short if short is not None else (size.get("height"), size.get("width"))
    cropped = (crop.get("height"), crop.get("width")) if config.get("do_center_crop") and crop else None
    if "crop_pct" in config and short is not None:
        # The processor of ConvNeXt and ResNet: enlarge, then crop; from 384 pixels on squash without a crop.
        cropped = (short, short)
        resize = int(short / config["crop_pct"]) if short < 384 else (short, short)
    target = cropped or ((short, short) if short is not None else resize)
    odd = [key for key in ("include_top", "rescale_offset", "do_pad") if config.get(key)]
    scale = config.get("rescale_factor", 1 / 255)
    if not config.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-6:
        odd.append(f"rescale_factor {scale}")
    if odd or None in target:
        raise ModelError(
            f"{request.source}: its image processor does something unusual ({', '.join(odd) or f'size {size}'});"
            " give --input-size, --mean and --std"
        )
    normalized = config.get("do_normalize", True)
    return _known_preprocess(
        request,
        input_size=target,
        resize=resize if config.get("do_resize", True) else None,
        crop=True,
        mean=config["image_mean"] if normalized else (0.0, 0.0, 0.0),
        std=config["image_std"] if normalized else (1.0, 1.0, 1.0),
        interpolation=_PIL_INTERPOLATION.get(int(config.get("resample", 2)), str(config.get("resample"))),
    )


def _open_zoo(name: str, request: ModelSource, published: bool) -> _Opened:
    entry = ZOO.get(name)
    module = entry.build(request.num_classes or len(entry.class_names))
    if published:
        load_weights(module, entry.weights)
    return _Opened(module, entry.preprocess, entry.class_names)


def _open_file(name: str, request: ModelSource, published: bool) -> _Opened:
    """Call a function of the user's own file; the weights it returns are the published ones."""
    if request.num_classes is not None:
        raise ModelError(f"{name}: the function fixes the number of classes; change it there")
    try:
        return _Opened(call_user_function(name))
    except InputError:
        raise
    except _FOREIGN_ERRORS as error:
        raise _failed(request, error) from error


_OPENERS: dict[str, Callable[[str, ModelSource, bool], _Opened]] = {
    "timm": _open_timm,
    "torchvision": _open_torchvision,
    "transformers": _open_transformers,
    "zoo": _open_zoo,
}


def _known_preprocess(request: ModelSource, **values: Any) -> Preprocess:
    return parse_settings(Preprocess, values, where=f"preprocessing of {request.source}")


def _preprocess(known: Preprocess | None, request: ModelSource) -> Preprocess:
    """What the model says, with what was given by hand in its place."""
    given: dict[str, Any] = {
        key: value for key in ("input_size", "mean", "std") if (value := getattr(request, key)) is not None
    }
    if known is None:
        missing = [f"--{key.replace('_', '-')}" for key in ("input_size", "mean", "std") if key not in given]
        if missing:
            raise ModelError(f"{request.source} does not say how its images are prepared; give {', '.join(missing)}")
        rest = {"resize": max(given["input_size"]), "crop": True, "interpolation": "bilinear"}
        return _known_preprocess(request, **given, **rest)
    if "input_size" in given:
        given["resize"] = _rescaled(known, given["input_size"])
    return _known_preprocess(request, **(known.model_dump() | given))


def _rescaled(known: Preprocess, size: tuple[int, int]) -> int | tuple[int, int] | None:
    """The resize that keeps as much of an image in view as before, for another input size."""
    if known.resize is None:
        return None
    if isinstance(known.resize, int):
        return round(float(known.resize) * max(size) / max(known.input_size))
    (height, width), (old_height, old_width) = known.resize, known.input_size
    return round(height * size[0] / old_height), round(width * size[1] / old_width)


def _count_classes(model: FloatModel) -> int:
    """Run the network once on noise and return the number of logits; raises `ModelError` if that goes wrong."""
    try:
        with torch.no_grad():
            logits = model.logits(model.example_input())
    except ModelError:
        raise
    except _FOREIGN_ERRORS as error:
        size = "x".join(str(side) for side in model.preprocess.input_size)
        raise ModelError(
            f"{model.source.source} fails on an image of {size} ({one_line(error)}); is --input-size right?"
        ) from error
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{model.source.source} returns NaN or infinite logits for noise; its weights are damaged")
    return logits.shape[1]


def _unknown(kind: str, name: str, names: Iterable[str]) -> ModelError:
    # Thousands of names do not fit into one line; the nearest few do.
    nearest = difflib.get_close_matches(name, list(names), n=5, cutoff=0.5)
    hint = f"the nearest are: {', '.join(nearest)}" if nearest else f"see the list of models of {kind}"
    return ModelError(f"{kind} has no model {name!r}; {hint}")


def _failed(request: ModelSource, error: BaseException) -> ModelError:
    kind = type(error).__name__
    hint = "; is there a network connection, or give --weights FILE" if isinstance(error, OSError) else ""
    return ModelError(f"{request.source} cannot be opened: {kind}: {one_line(error)}{hint}")
