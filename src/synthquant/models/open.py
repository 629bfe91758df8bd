"""From the name of a model to a `FloatModel`: of a library, the bundled zoo, or a user's own file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from synthquant.core.device import resolve_device
from synthquant.core.errors import InputError, ModelError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import parse_settings
from synthquant.data.preprocess import Preprocess
from synthquant.models.batch_norm import batch_norm_findings
from synthquant.models.float_model import IN_MEMORY, FloatModel, ModelSource, Task
from synthquant.models.libraries import LIBRARIES, LogitsOnly
from synthquant.models.opened import FOREIGN_ERRORS, OPENERS, Opened, Opener, failed, known_preprocess
from synthquant.models.signature import Inputs, named_outputs
from synthquant.models.user_file import call_user_function, names_code
from synthquant.models.weights import load_weights, one_line
from synthquant.models.zoo import ZOO
from synthquant.models.zoo.pipelines import PIPELINES

FORMS = (
    "timm/NAME, torchvision/NAME, transformers/REPO_OR_FOLDER, diffusers/REPO_OR_FOLDER, zoo/NAME or FILE.py:FUNCTION"
)
"""The ways to name a model, as they are shown in messages."""

_WEIGHTS_SUFFIXES = (".pt", ".pth", ".safetensors", ".ckpt", ".bin")
_PIPELINE_INDEX = "model_index.json"  # of diffusers
_WRONG_CHANNELS = re.compile(r"input\[2, \d+, .*\] to have (\d+) channels")


def open_model(
    source: str | ModelSource,
    *,
    weights: str | Path | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
    task: Task | None = None,
    device: torch.device | str = "cpu",
    pretrained: bool = True,
    progress: Progress = QUIET,
) -> FloatModel:
    """Open a network by its name, with the weights in float32, in eval mode and without gradients.

    `input_size` is in pixels (height, width); `mean` and `std` are for pixels in 0..1. They are needed where the model
    does not bring its preprocessing, and replace it elsewhere. With `weights` a file is loaded instead of the published
    weights. `pretrained=False` builds the architecture with random weights and ignores files: the same on every call,
    and the global random state stays as it is. The network is run once on noise, so a wrong input size is found here.
    With the task `other` it need not be a classifier. A function of a user's file may return an example of the inputs
    beside the network (`module, Inputs(...)`), which then takes those instead of images.
    `progress` is told of batch norms that have seen no batch or keep variances of 0.

    A source `FILE.py:FUNCTION` is run: it is taken for the caller's own words. What a file says about where its network
    came from is a `RecordedSource` and not accepted here.

    Raises `ModelError` for a name, file or setting that cannot be used, `UnsupportedModelError` if the network does not
    give logits, or no tensors where its task is `other`, `MissingExtraError` if its library is not installed,
    `InputError` if there is no such device.
    """
    request = _request(source, weights, input_size, mean, std, num_classes, task)
    place = torch.device(resolve_device(str(device)))
    published = pretrained and request.weights is None
    known = not names_code(request.source) and not names_pipeline(request.source)
    if published and request.num_classes is not None and known:
        raise ModelError(f"{request.source}: another number of classes needs weights of your own; give --weights FILE")
    with progress.waiting(f"open {request.source}"):
        opened = _build(request, published)
    request = _of_task(request, opened)
    takes = prepared(opened.preprocess, request) if opened.example is None else _example(opened.example, request)
    module = opened.module
    if pretrained and request.weights is not None:
        load_weights(module.model if isinstance(module, LogitsOnly) else module, Path(request.weights))
    module = module.float().eval().requires_grad_(False)
    name = _called(request.source, module)
    model = opened.make(module, takes, name, request, request.task).to(place)
    module = model.module
    classes = count_classes(model)
    if pretrained:
        for finding in batch_norm_findings(module):
            progress.warn(f"{name}: {finding}")
    names = opened.class_names if opened.class_names and len(opened.class_names) == classes else None
    return replace(model, num_classes=classes, class_names=names)


def _called(source: str, module: torch.nn.Module) -> str:
    """What a network is called: by its library's name, or of own code by its class; a plain container by its file."""
    file, colon, _ = source.rpartition(":")
    if not (colon and names_code(source)):
        return source.rstrip("/").rsplit("/", 1)[-1]
    own = type(module.model if isinstance(module, LogitsOnly) else module)
    return Path(file).stem if own.__module__.partition(".")[0] == "torch" else own.__name__


def _request(
    source: str | ModelSource,
    weights: str | Path | None,
    input_size: int | tuple[int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    num_classes: int | None,
    task: Task | None,
) -> ModelSource:
    """One `ModelSource` of everything that was asked for; arguments win over fields of `source`."""
    base = source if isinstance(source, ModelSource) else parse_settings(ModelSource, {"source": source}, "model")
    given = {
        "weights": None if weights is None else str(weights),
        "input_size": (input_size, input_size) if isinstance(input_size, int) else input_size,
        "mean": mean,
        "std": std,
        "num_classes": num_classes,
        "task": task,
    }
    merged = base.model_dump() | {key: value for key, value in given.items() if value is not None}
    return parse_settings(ModelSource, merged, where=f"model {base.source}")


def names_pipeline(source: str) -> bool:
    """Return whether a model's name means a diffusion pipeline: by its form, or because a folder is one."""
    kind, _, name = source.partition("/")
    return kind == "diffusers" or (kind == "zoo" and name in PIPELINES) or (Path(source) / _PIPELINE_INDEX).is_file()


def _of_task(request: ModelSource, opened: Opened) -> ModelSource:
    """The request with the task that is known of the library; raises `ModelError` for one that is none of its own."""
    if opened.task is not None:
        return request.model_copy(update={"task": opened.task})
    if request.task == "denoise":
        raise ModelError(f"{request.source} is no diffusion pipeline, whose task is denoise; give --task other")
    return request


def _build(request: ModelSource, published: bool) -> Opened:
    kind, _, name = request.source.partition("/")
    if names_code(request.source):
        build: Opener = _open_file
        name = request.source
    elif names_pipeline(request.source):
        build = OPENERS.get("diffusers")
    elif name and kind in _OPENERS:
        build = _OPENERS[kind]
    elif name and kind == IN_MEMORY:
        raise ModelError(
            f"the network {name} was given in memory and cannot be opened from anywhere: give it again, in Python"
            " synthquant.load(FOLDER, module); a network of a file, FILE.py:FUNCTION, needs no such thing, nor what"
            " was saved with float_graph=True"
        )
    elif request.source.endswith(_WEIGHTS_SUFFIXES):
        raise ModelError(
            f"{request.source} holds weights, not a network; name the network too: FILE.py:FUNCTION --weights"
            f" {request.source}"
        )
    elif request.source.endswith(".py"):
        raise ModelError(
            f"{request.source} is a file; name the function in it that returns the network: FILE.py:FUNCTION"
        )
    elif request.source.endswith(".onnx") or Path(request.source).is_dir():
        kind = "an exported file" if request.source.endswith(".onnx") else "a folder"
        raise ModelError(f"{request.source} is {kind}; here name the float network that it was made from: {FORMS}")
    else:
        nothing = "" if Path(request.source).exists() else ", and there is no folder or file of that name"
        raise ModelError(f"model {request.source!r} is not of a known form{nothing}; give {FORMS}")
    with torch.random.fork_rng(devices=[]):
        # Random weights, where there are no others, are the same on every call.
        torch.default_generator.manual_seed(0)
        return build(name, request, published)


def _open_zoo(name: str, request: ModelSource, published: bool) -> Opened:
    entry = ZOO.get(name)
    module = entry.build(request.num_classes or len(entry.class_names))
    if published:
        load_weights(module, entry.weights)
    return Opened(module, entry.preprocess, entry.class_names)


def _open_file(name: str, request: ModelSource, published: bool) -> Opened:
    """Call a function of the user's own file; the weights it returns are the published ones."""
    if request.num_classes is not None:
        raise ModelError(f"{name}: the function fixes the number of classes; change it there")
    try:
        module, example = call_user_function(name)
        return Opened(module, example=example)
    except InputError:
        raise
    except SystemExit as error:  # a script, with its own command line
        raise ModelError(
            f"{name} ends the program when it is imported or called (exit {error.code}); put what a script does behind"
            ' if __name__ == "__main__"'
        ) from error
    except FOREIGN_ERRORS as error:
        raise failed(request, error) from error


_OPENERS: dict[str, Opener] = {
    **LIBRARIES,
    "zoo": _open_zoo,
}


def prepared(known: Preprocess | None, request: ModelSource) -> Preprocess:
    """What the model says, with what was given by hand in its place."""
    given: dict[str, Any] = {
        key: value for key in ("input_size", "mean", "std") if (value := getattr(request, key)) is not None
    }
    if known is None:
        missing = [f"--{key.replace('_', '-')}" for key in ("input_size", "mean", "std") if key not in given]
        if missing:
            raise ModelError(f"{request.source} does not say how its images are prepared; give {', '.join(missing)}")
        rest = {"resize": max(given["input_size"]), "crop": True, "interpolation": "bilinear"}
        return known_preprocess(request, **given, **rest)
    if "input_size" in given:
        given["resize"] = _rescaled(known, given["input_size"])
    return known_preprocess(request, **(known.model_dump() | given))


def _example(example: Inputs, request: ModelSource) -> Inputs:
    """The example that a user's function gave; raises `ModelError` if it has no sample, or
    for settings of images, which would do nothing.
    """
    given = [f"--{key.replace('_', '-')}" for key in ("input_size", "mean", "std") if getattr(request, key) is not None]
    if given:
        raise ModelError(
            f"{request.source} comes with an example of its inputs, not images; leave out {', '.join(given)}"
        )
    if len(example) == 0:
        raise ModelError(f"{request.source}: the example of its inputs has 0 samples; give one or more")
    return example


def _rescaled(known: Preprocess, size: tuple[int, int]) -> int | tuple[int, int] | None:
    """The resize that keeps as much of an image in view as before, for another input size."""
    if known.resize is None:
        return None
    if isinstance(known.resize, int):
        return round(float(known.resize) * max(size) / max(known.input_size))
    (height, width), (old_height, old_width) = known.resize, known.input_size
    return round(height * size[0] / old_height), round(width * size[1] / old_width)


def count_classes(model: FloatModel) -> int | None:
    """Run the network once on noise and return the number of logits, if it gives some.

    Raises `ModelError` if that goes wrong.
    """
    try:
        with torch.no_grad():
            output = model.example().call(model.module)
            outputs = {"logits": model.checked_logits(output, 2)} if model.task == "classify" else named_outputs(output)
    except ModelError:
        raise
    except FOREIGN_ERRORS as error:
        if isinstance(model.takes, Inputs):
            raise ModelError(f"{model.source.source} fails on its example ({one_line(error)})") from error
        channels = _channels_taken(model, str(error))
        if channels is not None:
            plural = "" if channels == 1 else "s"
            raise ModelError(
                f"{model.source.source}: the network takes {channels} channel{plural}, and mean and std are of"
                f" {model.preprocess.channels}; give {channels} value{plural} for each"
            ) from error
        size = "x".join(str(side) for side in model.preprocess.input_size)
        raise ModelError(
            f"{model.source.source} fails on an image of {size} ({one_line(error)}); is --input-size right?"
            " (in Python input_size)"
        ) from error
    for name, values in outputs.items():
        if not bool(torch.isfinite(values).all()):
            what = name if name == "logits" else f"values {name}".rstrip()
            raise ModelError(f"{model.source.source} returns NaN or infinite {what} for noise; its weights are damaged")
    return outputs["logits"].shape[1] if model.task == "classify" else None


def _channels_taken(model: FloatModel, message: str) -> int | None:
    """The number of channels for which a network runs that fails on its images; none if that is not why.

    A convolution names its number in the message; what flattens or normalises first is tried.
    """
    named = _WRONG_CHANNELS.search(message)
    if named is not None:
        return int(named[1])
    for channels in {1, 2, 3, 4} - {model.preprocess.channels}:
        try:
            with torch.no_grad():
                model.module(model.example_images()[:, :1].expand(-1, channels, -1, -1).contiguous())
        except FOREIGN_ERRORS:
            continue
        return channels
    return None
