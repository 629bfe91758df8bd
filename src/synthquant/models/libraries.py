"""Networks of timm, torchvision and transformers: what they are, how their images are prepared, their classes.

The only place that imports these libraries, and only when a model of theirs is asked for.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.errors import MissingExtraError, ModelError
from synthquant.core.hub import hub_or_cache
from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import ModelSource
from synthquant.models.opened import FOREIGN_ERRORS, Opened, failed, known_preprocess
from synthquant.models.weights import one_line

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


def _open_timm(name: str, request: ModelSource, published: bool) -> Opened:
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
    except FOREIGN_ERRORS as error:
        raise failed(request, error) from error
    subset = timm.data.infer_imagenet_subset(module)
    names = timm.data.ImageNetInfo(subset).label_descriptions() if subset is not None else ()
    config = timm.data.resolve_model_data_config(module)
    return Opened(module, _timm_preprocess(config, request), tuple(str(text) for text in names))


def known_of_module(module: nn.Module, request: ModelSource) -> Preprocess | None:
    """Return how a module says that its images are prepared: one of timm does, others do not."""
    if type(module).__module__.partition(".")[0] != "timm" or not getattr(module, "pretrained_cfg", None):
        return None
    import timm.data

    return _timm_preprocess(timm.data.resolve_model_data_config(module), request)


def _timm_preprocess(config: Mapping[str, Any], request: ModelSource) -> Preprocess | None:
    """As timm evaluates: resize to `size / crop_pct`, then crop. None for its rare way of padding to a square."""
    if config["crop_mode"] not in ("center", "squash"):
        return None
    height, width = config["input_size"][1:]
    scaled = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    return known_preprocess(
        request,
        input_size=(height, width),
        resize=scaled[0] if scaled[0] == scaled[1] and config["crop_mode"] == "center" else scaled,
        crop=True,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
    )


def _open_torchvision(name: str, request: ModelSource, published: bool) -> Opened:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError("torchvision", "models") from error

    names = models.list_models(module=models)
    name, dot, tag = name.partition(".")
    if name not in names:
        raise _unknown("torchvision", name, names)
    known = models.get_model_weights(name)
    if dot and tag not in known.__members__:
        raise ModelError(f"torchvision/{name} has no weights {tag!r}; it has {', '.join(known.__members__)}")
    weights = known[tag] if tag else known.DEFAULT
    options = {} if request.num_classes is None else {"num_classes": request.num_classes}
    # Two old architectures start by drawing random weights for minutes unless told not to.
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    try:
        module = models.get_model(name, weights=weights if published else None, **options)
    except FOREIGN_ERRORS as error:
        raise failed(request, error) from error
    config = weights.transforms()
    preprocess = known_preprocess(
        request,
        input_size=(config.crop_size[0], config.crop_size[-1]),
        resize=config.resize_size[0] if len(config.resize_size) == 1 else tuple(config.resize_size),
        crop=True,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation.value,
    )
    return Opened(module, preprocess, tuple(weights.meta["categories"]))


def _open_transformers(name: str, request: ModelSource, published: bool) -> Opened:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "models") from error

    with nullcontext() if Path(name).is_dir() else hub_or_cache():
        return _from_transformers(transformers, name, request, published)


def _from_transformers(transformers: Any, name: str, request: ModelSource, published: bool) -> Opened:
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if request.num_classes is not None:
            config.num_labels = request.num_classes
        auto = transformers.AutoModelForImageClassification
        if published:
            module = auto.from_pretrained(
                name, config=config, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        else:
            module = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except FOREIGN_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{request.source} brings code of its own, which is not run; build it in a file of yours and give"
                " FILE.py:FUNCTION"
            ) from error
        if isinstance(error, OSError) and "safetensors" in str(error):
            raise ModelError(
                f"{request.source} has no weights in safetensors; pickled ones (pytorch_model.bin) may hold code and"
                " are not read, so save it again with save_pretrained"
            ) from error
        raise failed(request, error) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    named = not all(text == f"LABEL_{index}" for index, text in enumerate(names))
    return Opened(LogitsOnly(module), _processor_preprocess(name, request), names if named else None)


def _processor_preprocess(name: str, request: ModelSource) -> Preprocess | None:
    """The image processor beside a transformers model; none if every setting is given by hand."""
    import transformers

    if request.input_size and request.mean and request.std:
        return None
    try:
        config = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False).to_dict()
    except FOREIGN_ERRORS as error:
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
    return known_preprocess(
        request,
        input_size=target,
        resize=resize if config.get("do_resize", True) else None,
        crop=True,
        mean=config["image_mean"] if normalized else (0.0, 0.0, 0.0),
        std=config["image_std"] if normalized else (1.0, 1.0, 1.0),
        interpolation=_PIL_INTERPOLATION.get(int(config.get("resample", 2)), str(config.get("resample"))),
    )


def _unknown(kind: str, name: str, names: Iterable[str]) -> ModelError:
    # Thousands of names do not fit into one line; the nearest few do.
    nearest = difflib.get_close_matches(name, list(names), n=5, cutoff=0.5)
    hint = f"the nearest are: {', '.join(nearest)}" if nearest else f"see the list of models of {kind}"
    return ModelError(f"{kind} has no model {name!r}; {hint}")


LIBRARIES: dict[str, Callable[[str, ModelSource, bool], Opened]] = {
    "timm": _open_timm,
    "torchvision": _open_torchvision,
    "transformers": _open_transformers,
}
"""Openers by what a name starts with: of the rest of the name, the request, and whether weights are loaded."""
