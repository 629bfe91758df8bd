"""`tune-prompt`: learn a token for a text-to-image generator from a few real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from synthquant.cli import options
from synthquant.cli.output import print_result
from synthquant.core.device import resolve_device
from synthquant.core.errors import OutputError
from synthquant.core.files import require_writable
from synthquant.core.overrides import apply_overrides
from synthquant.core.progress import ConsoleProgress
from synthquant.core.rng import Rng
from synthquant.core.settings import parse_settings
from synthquant.data.quality import say_what_was_read
from synthquant.data.sources import open_images
from synthquant.diffusion.text_to_image import open_text_to_image
from synthquant.models.class_labels import Classes as NetworkClasses
from synthquant.models.class_labels import in_classes_of
from synthquant.synthesize.class_names import class_names, prompt_names
from synthquant.synthesize.prompt_tuning import PromptTuning
from synthquant.synthesize.prompt_tuning import tune_prompt as tune
from synthquant.synthesize.text_to_image import FewShotTuning, TextToImage


def _help(settings: type[TextToImage] | type[FewShotTuning], field: str) -> str:
    return " ".join((settings.model_fields[field].description or "").split()).replace("`", "")


Generator = Annotated[
    str, typer.Argument(metavar="GENERATOR", help=_help(TextToImage, "generator"), show_default=False)
]
Real = Annotated[str, typer.Option(metavar="IMAGES", help=_help(FewShotTuning, "images"), show_default=False)]
Classes = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="Names of the classes in the order of the labels: cifar10, imagenet-1k, or a text or JSON file.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(metavar="FILE.safetensors", help="The embedding.", show_default=False)]
Precision = Annotated[Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help=_help(TextToImage, "dtype"))]


def tune_prompt(
    generator: Generator,
    images: Real,
    classes: Classes,
    out: Out,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    dtype: Precision = "auto",
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Learn a token, shared by all classes, from a few real images; the same command again goes on after a kill.

    `synthesize --method text_to_image --set embedding=FILE` draws with it.
    """
    section = parse_settings(PromptTuning, apply_overrides({}, settings or []), "command line")
    if out.suffix != ".safetensors":
        raise OutputError(f"--out {out} must end in .safetensors")
    require_writable(out.parent)
    names = [own[0] for own in prompt_names(class_names(classes))]
    progress = ConsoleProgress()
    real = open_images(images, max_pixels=max_pixels)
    real = in_classes_of(real, NetworkClasses(f"--classes {classes}", names, len(names)), images, progress)
    opened = open_text_to_image(generator, device=resolve_device(device), dtype=dtype, safety_checker=False)
    embedding = tune(opened, real, names, section, Rng(seed).child("tuning"), path=out, progress=progress)
    read = say_what_was_read(real, progress, images)
    result = {"out": str(out), **read, "token": embedding.token, "width": embedding.vectors.shape[1]}
    print_result(result, device) if json else print(f"{embedding.token} in {out}")


tune_prompt.__doc__ = f"{tune_prompt.__doc__}\n    --set takes {', '.join(PromptTuning.model_fields)}."
