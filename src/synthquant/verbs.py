"""What a program does in three lines: `synthesize`, `quantize`, `evaluate`, and `load`; the commands do the same work.

    import synthquant as sq

    model = sq.FloatModel.from_module(module, input_size=32, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    quant_model = sq.quantize(model, sq.synthesize(model, count=256, iterations=500), "W4A4", iterations=2000)
    print(sq.evaluate(quant_model, test_set))
    quant_model.save("quantized")

A network is a `FloatModel`, a module that says all that is needed (one of timm), or the name of one (`open_model`).
Images are whatever `open_images` takes. Further keywords are settings of the method, as those of `--set`. Progress
shows on standard error; `progress=synthquant.Progress()` is quiet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from synthquant import make, measure
from synthquant.core.device import resolve_device
from synthquant.core.errors import DataError, ModelError
from synthquant.core.method_settings import build_method
from synthquant.core.progress import ConsoleProgress, Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.data.quality import say_what_was_read, warn_of_suspicious
from synthquant.data.sources import open_images
from synthquant.data.targets import TARGET_COLUMN, Targets
from synthquant.diffusion.trajectory import Trajectory, is_trajectory, open_trajectory
from synthquant.evaluate.data import Data
from synthquant.evaluate.metrics import Metric
from synthquant.evaluate.section import EvaluateSection
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.model_card import checkpoint_card
from synthquant.export.presets import PRESETS
from synthquant.export.quant_config import CONFIG_NAME, read_config
from synthquant.export.write import export_network
from synthquant.methods import EXPORTERS
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.in_memory import architecture_of
from synthquant.models.open import open_model
from synthquant.models.samples import InputSamples, Samples, is_samples
from synthquant.models.signature import Inputs, joined
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.recipe import QuantizeSection, SynthesizeSection
from synthquant.runtimes import exporter_of
from synthquant.synthesize import Noise
from synthquant.targets import default_scheme, exporter_for

_COUNT: int = SynthesizeSection.model_fields["count"].default
_BATCH_SIZE: int = EvaluateSection.model_fields["batch_size"].default
_VERIFIED = 128  # samples that a file is verified on, if none are given
_GIVEN = "the images given"
_SCHEME = "W8A8"
_METHOD = "genie_d"


def synthesize(
    model: FloatModel | nn.Module | ModelSource | str,
    count: int = _COUNT,
    method: str = _METHOD,
    *,
    folder: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> ImageSet | Trajectory:
    """Make images from a trained network alone, as the command `synthesize` does.

    Args:
        model: the network.
        count: how many images.
        method: a synthesis method (`synthquant list`).
        folder: where they are kept, and where the same call goes on after it was killed; none: in memory.
        seed: of all random numbers.
        device: where a network that is named is opened; others stay where they are.
        progress: by default bars on standard error.
        settings: of the method (`synthquant show METHOD`), such as `iterations=1000`.

    Returns:
        The images in pixel space; of a diffusion pipeline with `self_sampling` a trajectory.

    Raises:
        RecipeError: an unknown setting or a bad value.
        UnknownNameError: no method has that name.
        UnsupportedModelError: the method does not work for this network.
        ModelError: the network cannot be opened, or it does not say what it takes.
        DataError, OutputError: `folder` holds other images or cannot be written.
    """
    section = SynthesizeSection.parse({"method": method, "count": count, **settings}, "synthesize")
    shown = ConsoleProgress() if progress is None else progress
    network = _network(model, device, shown)
    return make.synthesize(network, section, seed, None if folder is None else Path(folder), shown)


def quantize(
    model: FloatModel | nn.Module | ModelSource | str,
    images: Any = None,
    scheme: str | Mapping[str, Any] | QuantScheme | None = None,
    method: str = "genie_m",
    target: str | None = None,
    *,
    normalized: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> QuantModel:
    """Quantize a network, as the command `quantize` does.

    Args:
        model: the network, which stays as it is.
        images: what `open_images` takes; for a network that takes something else `Inputs`, an iterable of such, or
            `Samples`; for a diffusion pipeline a trajectory. None: made from the network itself (`synthesize`), or by
            the method.
        scheme: bits, as `W4A8`, or a mapping with a `preset` and changes to it; none: W8A8, or what `target` runs
            fastest.
        method: a quantization method (`synthquant list`).
        target: what it is meant for (`ort-cpu`, `openvino`, `tensorrt`, ...): the scheme gets what that needs, and what
            `export` would refuse is refused before anything is made.
        normalized: `images` are normalised as the network wants them, which is undone; otherwise they are pixels.
        seed: of all random numbers.
        device: where a network that is named is opened; others stay where they are.
        progress: by default bars on standard error.
        settings: of the method (`synthquant show METHOD`) and of a recipe's section `quantize`, such as
            `iterations=1000` or `bias_correction=True`.

    Raises:
        RecipeError, UnknownNameError, SchemeError: an unknown setting, method or scheme, or one that makes no sense.
        UnsupportedModelError: the method does not work for this network.
        DataError: images cannot be used: none can be read, or their values are no pixels.
        ModelError: the network cannot be opened, or it does not say what it takes.
    """
    bits = (_SCHEME if target is None else default_scheme(target)) if scheme is None else scheme
    section = QuantizeSection.parse({"method": method, "scheme": bits, "target": target, **settings}, "quantize")
    shown = ConsoleProgress() if progress is None else progress
    network = _network(model, device, shown)
    make.require_quantizable(network, section, shown)
    given: ImageSet | Samples | None
    if images is not None:
        given = _samples(images, network, normalized=normalized)
        if isinstance(given, ImageSet):
            name = _name_of(images)
            given = make.drawn(given, network, seed, shown, name)
            warn_of_suspicious(given, shown, name)
    else:
        if section.needs_images:
            shown.say(
                f"no images are given: {_COUNT} are made of {network.name} alone by {_METHOD};"
                " synthquant.synthesize(model, count=..., iterations=...) makes fewer, or faster"
            )
        given = synthesize(network, seed=seed, progress=shown) if section.needs_images else None
    if isinstance(given, Trajectory):
        network = make.fitted(network, given)
    quant_model, _ = make.quantize(network, section, given, seed, shown)
    if isinstance(given, ImageSet):
        say_what_was_read(given, shown, _name_of(images))
    return quant_model


def evaluate(
    model: QuantModel | FloatModel | nn.Module | ModelSource | str | Path,
    data: Any,
    *,
    metric: Any = None,
    targets: Any = None,
    batch_size: int = _BATCH_SIZE,
    normalized: bool = False,
    trust_code: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a network on labelled images, as the command `evaluate` does.

    Args:
        model: a float or a quantized network, the folder of a run or a checkpoint, or an exported file.
        data: what `open_images` takes, with labels; a quantized network is compared with the float one without.
        metric: a function of outputs and targets that returns a number or a dictionary of numbers, an object or class
            with `update` and `compute`, or `FILE.py:NAME` of such a one (`synthquant.evaluate.metrics`).
        targets: what the metric is given beside outputs: one value for each sample, or the name of a column of the
            data; none: what a loader gives beside its images, such as masks and boxes, else their labels.
        batch_size: images per forward pass.
        normalized: `data` are normalised as the network wants them, which is undone; otherwise they are pixels.
        trust_code: run the Python file that a folder or file names as its network.
        device: where a network that is named is opened; others stay where they are.
        progress: by default bars on standard error.

    Returns:
        What `synthquant evaluate --json` prints: `top1`, `top5`, `agreement`, `kl`, `size_bytes`, `coverage` and more;
        of a quantized network that is no classifier `sqnr` [dB] and, of each output, `outputs`. `metrics` are the
        numbers of the metric, and `pixel_accuracy` and `miou` of a `dense` network where targets are masks;
        `float_metrics` those of the float network beside a quantized one.

    Raises:
        DataError: the images cannot be used, or a label is not a class of the network.
        UnsupportedModelError: a float network is no classifier, and there is no metric.
        InputError: the metric is none, fails, or gives something else than numbers.
        ModelError: the network cannot be opened, does not say what it takes, or code would run that is not trusted.
    """
    shown = ConsoleProgress() if progress is None else progress
    own = None if metric is None else Metric.of(metric)

    def measured_on(known: FloatModel | None) -> Data:
        images: ImageSet | Samples
        if known is not None and isinstance(known.takes, Inputs) and known.task != "classify":
            images = _samples(data, known, normalized=normalized)
        else:
            preprocess = known.preprocess if known is not None and normalized else None
            images = open_images(data, preprocess=preprocess, targets=True)
        return Data(images, _name_of(data), batch_size, own, _targets(images, targets))

    if isinstance(model, str | Path) and (exporter_of(model) is not None or Path(model).is_dir()):
        if normalized:
            raise DataError("normalized is for networks in memory; give open_images(data, preprocess=...) here")
        exporter, path = exporter_of(model), Path(model)
        if exporter is not None:
            return measure.evaluate_exported(exporter, path, measured_on(None), None, shown, trust_code=trust_code)
        return measure.evaluate(path, measured_on(None), device, shown, trust_code=trust_code)
    if isinstance(model, QuantModel):
        known = model.float_model
        reference = None if known.recorded_fingerprint else known
        return measure.evaluate_quantized(model, reference, measured_on(known), shown)
    network = _network(str(model) if isinstance(model, Path) else model, device, shown)
    return measure.evaluate_float(network, measured_on(network), shown)


def load(
    folder: Path | str,
    module: nn.Module | FloatModel | str | None = None,
    *,
    trust_code: bool = False,
    device: torch.device | str | None = None,
) -> QuantModel:
    """Read the quantized network of a run or of what `QuantModel.save` wrote; it gives the same outputs bit for bit.

    Args:
        folder: of the run or of the checkpoint.
        module: the architecture, where the folder says no name from which it can be opened: a module or a `FloatModel`.
            With the weights that were quantized the result can be compared with it, others do not matter. Or the name
            of the network, as it was given then, which lets code of its run.
        trust_code: run the Python file that the folder names as its network, or read the program that it keeps as one.
        device: where the network goes; by default where `module` is, or the CPU.

    Raises:
        ModelError: there is no quantized network, it is damaged, `module` is another architecture, none is given and
            needed, or code would run that is not trusted.
    """
    folder = Path(folder)
    folder = folder if (folder / CONFIG_NAME).is_file() else folder / "model"
    if module is None or isinstance(module, str):
        return load_checkpoint(folder, device=device, model=module, trust_code=trust_code)
    config = read_config(folder)
    entry = config.float_model
    if isinstance(module, FloatModel):
        network = module
    elif config.preprocess is not None:  # its weights do not matter, nor what its batch norms have seen
        network = architecture_of(module, config.preprocess, entry.name, entry.task)
    else:
        raise ModelError(
            f"{folder} is of a network that takes no images; give synthquant.FloatModel.from_module(module,"
            " example=...) instead of the module"
        )
    if network.fingerprint == entry.fingerprint:
        return load_checkpoint(folder, float_model=network, device=device)
    return load_checkpoint(folder, architecture=network, device=device)


def card(
    folder: Path | str,
    *,
    license: str | None = None,
    measured: Mapping[str, Any] | None = None,
    data: str | None = None,
) -> str:
    """Return the model card of a run or of what `QuantModel.save` wrote, as Markdown in the form of Hugging Face.

    The same stands as `README.md` in the checkpoint; no network is opened.

    Args:
        folder: of the run or of the checkpoint.
        license: an identifier of the hub, such as `apache-2.0`; none: the card does not say one.
        measured: what `evaluate` returned of this network, in place of what its run measured.
        data: what that was measured on, in words.

    Raises:
        ModelError: there is no quantized network, or it is damaged.
        InputError: the record of the run is damaged, or `license` is no identifier.
    """
    return checkpoint_card(Path(folder), license=license, measured=measured, data=data)


def save(quant_model: QuantModel, folder: Path | str, *, float_graph: bool = False) -> Path:
    """Do the work of `QuantModel.save`."""
    return save_checkpoint(quant_model, folder, float_graph=float_graph)


def export(
    quant_model: QuantModel,
    path: Path | str,
    target: str | None = None,
    *,
    images: Any = None,
    normalized: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    **settings: Any,
) -> Path:
    """Do the work of `QuantModel.export`."""
    path = Path(path)
    found = {cls.suffix: name for name, cls in EXPORTERS.items() if cls.suffix}
    if path.suffix not in found:
        raise ModelError(f"{path}: name a file that ends in {', '.join(sorted(found))}")
    name, values = found[path.suffix], settings
    if target is not None:
        name = EXPORTERS.name_of(cast(Any, type(exporter_for(target))))
        values = {"preset": target, **settings} if target in PRESETS else settings
        if found[path.suffix] != name:
            raise ModelError(f"{path} is no name of a file for {target}; its suffix is {EXPORTERS.get(name).suffix!r}")
    exporter = build_method(EXPORTERS, name, values, "export")
    exporter.check(quant_model)
    model, samples = quant_model.float_model, None
    if verify and images is not None:
        samples = _samples(images, model, normalized=normalized)
    elif verify and isinstance(model.takes, Inputs):
        samples = InputSamples(model.example(_VERIFIED))
    elif verify:
        samples = Noise().synthesize(model, _VERIFIED, Rng(0))
    export_network(
        quant_model,
        exporter,
        path,
        samples,
        _name_of(images),
        progress=ConsoleProgress() if progress is None else progress,
    )
    return path


def _network(model: FloatModel | nn.Module | ModelSource | str, device: str, progress: Progress) -> FloatModel:
    if isinstance(model, FloatModel):
        return model
    if isinstance(model, QuantModel):
        raise ModelError(f"{model.float_model.name} is quantized already; give the float network")
    if isinstance(model, nn.Module):
        return FloatModel.from_module(model)
    if isinstance(model, str | ModelSource):
        return open_model(model, device=resolve_device(device), progress=progress)
    raise ModelError(f"a {type(model).__name__} is no network; give a FloatModel, a torch.nn.Module, or a name")


def _samples(images: Any, model: FloatModel, *, normalized: bool) -> ImageSet | Samples:
    """What a network is quantized or verified with, of whatever a program has."""
    if isinstance(images, str | Path) and is_trajectory(images):
        return open_trajectory(images)
    if not isinstance(images, ImageSet) and is_samples(images):
        return images
    if isinstance(model.takes, Preprocess):
        return open_images(images, preprocess=model.preprocess if normalized else None)
    if isinstance(images, Inputs | Tensor):
        return InputSamples(Inputs.of(images))
    parts = list(images) if isinstance(images, Iterable) and not isinstance(images, str | Mapping) else []
    if parts and all(isinstance(part, Inputs) for part in parts):
        return InputSamples(joined(parts))
    names = ", ".join(name for name, _ in model.takes.named())
    raise DataError(
        f"{model.name} takes inputs {names}, and a {type(images).__name__} is none; give synthquant.Inputs, an iterable"
        " of such, or synthquant.Samples"
    )


def _targets(data: ImageSet | Samples, targets: Any) -> Targets | None:
    """Targets that a program gave or named, or that came with images; none: their labels are."""
    if targets is not None and not isinstance(targets, str):
        return Targets(targets)
    if not isinstance(data, ImageSet):
        return None
    named = targets or (TARGET_COLUMN if TARGET_COLUMN in data.column_names else None)
    return None if named is None else Targets.of(data, named)


def _name_of(images: Any) -> str:
    """What images are called in messages."""
    return str(images) if isinstance(images, str | Path) else _GIVEN
