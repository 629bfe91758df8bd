"""From a run's folder to a verified file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from synthquant.core.errors import DataError, ModelError, OutputError
from synthquant.core.files import atomic_path, require_writable, sha256_file
from synthquant.core.progress import QUIET, Progress
from synthquant.core.record import RunRecord
from synthquant.core.settings import Settings
from synthquant.data.codec import MAX_PIXELS
from synthquant.data.image_set import ImageSet
from synthquant.data.quality import say_what_was_read
from synthquant.diffusion.trajectory import Trajectory, open_calibration
from synthquant.export.checkpoint import load_checkpoint
from synthquant.export.quant_config import CONFIG_NAME
from synthquant.methods import EXPORTERS, Exporter
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel


def export_run(
    run: Path | str,
    exporter: Exporter,
    out: Path | str,
    *,
    data: str | None = None,
    max_pixels: int = MAX_PIXELS,
    verify: bool = True,
    model: str | None = None,
    trust_code: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Export the quantized network of a run (or a checkpoint's) to `out`, and compare what was written with it.

    Args:
        run: folder of a run or of a checkpoint.
        exporter: the form.
        out: the file; it is there only once it is verified.
        data: images to verify on; none: those the run quantized with.
        max_pixels: larger images are set aside.
        verify: whether to verify at all.
        model: the name of the network that was quantized, which lets code of its run.
        trust_code: whether code that the run names as its network may run.
        progress: messages and bars.

    Returns:
        `out`, `scheme`, `bytes`, `seconds`, `settings` of the exporter, and `verification` (none without it).

    Raises:
        ModelError: `run` holds no quantized network, or names code as its network.
        DataError: there are no images to verify with.
        SchemeError, UnsupportedModelError: this network cannot be written in this form.
        VerificationError: what was written differs from the network by more than the exporter allows.
        OutputError: `out` cannot be written.
    """
    start = time.perf_counter()
    run, out = Path(run), Path(out)
    checkpoint = _checkpoint(run)
    _require_own_file(run, out)
    require_writable(out.parent)
    images = _images(run, data, max_pixels) if verify else None
    of_run = getattr(exporter, "of_run", None)
    exporter = exporter if of_run is None else of_run(run)
    quant_model = load_checkpoint(checkpoint, model=model, trust_code=trust_code)
    what = data or "the images to verify with"
    verification = export_network(quant_model, exporter, out, images, what, origin=_origin(run), progress=progress)
    return {
        "out": str(out),
        "scheme": quant_model.scheme.describe(),
        "bytes": _size(out),
        "seconds": time.perf_counter() - start,
        "settings": cast(Settings, exporter).model_dump(mode="json"),
        "verification": verification,
    }


def export_network(
    quant_model: QuantModel,
    exporter: Exporter,
    out: Path,
    images: ImageSet | Samples | None,
    source: str = "the images to verify with",
    *,
    origin: Mapping[str, str] | None = None,
    progress: Progress = QUIET,
) -> dict[str, Any] | None:
    """Write a quantized network to `out`, which is there only once it is verified.

    Args:
        quant_model: calibrated.
        exporter: the form.
        out: the file or folder.
        images: what to verify with; none: it is not verified.
        source: where these come from, for messages.
        origin: what else is known about where the network comes from.
        progress: messages and bars.

    Returns:
        What `exporter.verify` found, none without images. Raises as `export_run`.
    """
    with atomic_path(out) as temporary:
        exporter.export(quant_model, temporary, origin=origin)
        if images is None:
            return None
        try:
            verification = exporter.verify(quant_model, temporary, images, progress=progress)
        finally:  # a refusal may come of the images
            read = say_what_was_read(images, progress, source) if isinstance(images, ImageSet) else {}
        return verification | read


def _require_own_file(run: Path, out: Path) -> None:
    """Raise `OutputError` if writing `out` would take the place of a folder or of something of the run."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder; give the name of a file")
    if (
        out.exists()
        and run.resolve() in out.resolve().parents
        and out.suffix not in (cls.suffix for _, cls in EXPORTERS.items())
    ):
        raise OutputError(f"{out} is a file of the run; choose another --out")


def _checkpoint(run: Path) -> Path:
    if not run.is_dir():
        raise ModelError(f"{run} is not the folder of a run or a checkpoint")
    if (run / CONFIG_NAME).is_file():
        return run
    if not (run / "model" / CONFIG_NAME).is_file():
        raise ModelError(
            f"{run} holds no quantized network: neither it nor {run / 'model'} has a {CONFIG_NAME}; finish that run"
        )
    return run / "model"


def _images(run: Path, data: str | None, max_pixels: int) -> ImageSet | Trajectory:
    """The images given, or those that the run quantized with."""
    if data is not None:
        return open_calibration(data, max_pixels=max_pixels)
    record = run / "run.json"
    if not record.is_file():
        raise DataError(f"{run} does not say which images it was made with: give --data, or --no-verify")
    source = RunRecord.load(record).image_source or run / "images"
    try:
        return open_calibration(str(source), max_pixels=max_pixels)
    except DataError as error:
        raise DataError(f"no images to verify with: {error}; give --data, or --no-verify") from error


def _origin(run: Path) -> dict[str, str]:
    recipe = run / "recipe.yaml"
    return {"recipe_sha256": sha256_file(recipe)} if recipe.is_file() else {}


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in (path.rglob("*") if path.is_dir() else (path,)) if part.is_file())
