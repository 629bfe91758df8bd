"""`sample`: a diffusion pipeline, float or quantized, draws a set of images."""

from __future__ import annotations

from typing import Annotated

import typer

from synthquant.cli import options
from synthquant.cli.output import print_result
from synthquant.core.device import resolve_device
from synthquant.core.files import require_outside, require_writable
from synthquant.core.overrides import apply_overrides
from synthquant.core.progress import ConsoleProgress
from synthquant.core.settings import parse_settings
from synthquant.diffusion.pipelines import open_pipeline
from synthquant.synthesize.sampling import SampleSettings, warn_of_other_steps
from synthquant.synthesize.sampling import sample as draw

_STEPS: int = SampleSettings.model_fields["steps"].default
_MOST = 10**8

Source = Annotated[
    str,
    typer.Argument(
        metavar="PIPELINE|RUN",
        help="A diffusion pipeline: diffusers/REPO_OR_FOLDER or zoo/NAME; or a quantized one: the folder of a run, or"
        " one that export --to diffusers wrote.",
        show_default=False,
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="A prompt, for a pipeline that reads them; may be given several times, images take turns. --set takes"
        " prompts=FILE, or classes=NAME|FILE with templates.",
        show_default=False,
    ),
]


def sample(
    source: Source,
    out: options.ImagesOut,
    count: Annotated[int, typer.Option(min=1, max=_MOST, help="Images to draw.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help=options.setting_help(SampleSettings, "steps"))] = _STEPS,
    prompt: Prompt = None,
    device: options.Device = options.DEVICE,
    seed: options.Seed = options.SEED,
    settings: options.Set = None,
    json: options.Json = False,
) -> None:
    """Draw images with a diffusion pipeline, float or quantized: the same --seed gives both the same noise.

    The same command again goes on where a killed one stopped. --set takes scheduler, guidance, negative_prompt, eta,
    height, width, batch_size, keep_steps, prompts, classes, templates and labels.
    """
    values = {"steps": steps} | ({"prompts": prompt} if prompt else {})
    how = parse_settings(SampleSettings, apply_overrides(values, settings or []), "command line")
    place = resolve_device(device)
    require_outside(out, (source,))
    require_writable(out)
    progress = ConsoleProgress()
    pipeline = open_pipeline(source, device=place)
    warn_of_other_steps(source, pipeline, how, progress)
    images = draw(pipeline, how, count, seed, out, progress)
    result = {"out": str(out), "count": len(images), "fingerprint": images.fingerprint, "steps": how.steps}
    print_result(result, device) if json else print(f"{len(images)} images in {out}")
