"""A selection as a folder: the images that stay, what was done, and a few of those that went.

IMAGES/  part-*.parquet + manifest.json (the image set)   selection.json   rejected/ (a small image set)
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from synthquant.core.advice import FARTHER, about_selection
from synthquant.core.errors import DataError, OutputError
from synthquant.core.files import atomic_folder, read_sealed_json, require_writable, write_sealed_json
from synthquant.core.progress import QUIET, Bar, Progress
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.data.quality import say_what_was_read
from synthquant.methods import Selector
from synthquant.models.batch_norm import batch_norm_targets
from synthquant.models.float_model import FloatModel
from synthquant.select.batch_norm import BatchNormProbe
from synthquant.select.scan import TABLE_GIB, Block, scan
from synthquant.select.sequence import Selection, registered_name, run_filters
from synthquant.select.summary import summarize

SELECTION_NAME = "selection.json"
REJECTED_NAME = "rejected"

_REJECTED_SHOWN = 30
_REAL_COMPARED = 1024


class Workers(Protocol):
    """Processes that run the network over a pool in place of this one."""

    def look(
        self,
        images: ImageSet,
        model: FloatModel,
        filters: Sequence[Selector],
        batch_size: int,
        progress: Progress,
        *,
        norms: bool,
    ) -> Generator[Block]:
        """Yield the blocks of `images` in order, for the probes of `filters`, and of the batch norms for `norms`."""
        ...


def write_selection(
    folder: Path,
    images: ImageSet,
    model: FloatModel,
    filters: Sequence[Selector],
    rng: Rng,
    *,
    real: ImageSet | None = None,
    batch_size: int = 64,
    table_gib: float = TABLE_GIB,
    progress: Progress = QUIET,
    workers: Workers | None = None,
) -> ImageSet:
    """Choose from `images` with `filters`, leave the result in `folder`, and return the image set there.

    Everything appears at once when it is done; the same call again reads it, or makes it again if images of it are gone
    or not as they were written. `real` images change nothing but stand
    beside pool and selection in `selection.json`: pixel statistics, over up to 1,024 of them, and batch-norm statistics
    if a filter reads these or the pool's fit into `table_gib`. `workers` run the network over the pool in place of this
    process; that changes nothing else.

    Raises:
        OutputError: `folder` cannot be written, or holds something else.
        UnsupportedModelError, DataError: as `run_filters`; then nothing is left behind.
    """
    identity = _identity(images, model, filters, rng, real)
    finished = _is_finished(folder, identity)
    if finished and _is_whole(folder, progress):
        progress.say(f"{folder}: this selection is finished; it is read from there")
        return ImageSet.open(folder)
    # From the start, so that a second process is refused before it looks at the pool.
    with atomic_folder(folder, replace=finished) as temporary:
        selection, summary = _choose(images, model, filters, rng, real, batch_size, table_gib, progress, workers)
        selection.kept.save(temporary, _Renamed(progress, temporary, folder))
        if len(worst := selection.worst(_REJECTED_SHOWN)):
            selection.pool.subset(worst).save(temporary / REJECTED_NAME, _Silent())
        write_sealed_json(temporary / SELECTION_NAME, {"version": 2, "identity": identity, **summary})
    _warn_if_farther(folder, progress)
    return ImageSet.open(folder)


def _choose(
    images: ImageSet,
    model: FloatModel,
    filters: Sequence[Selector],
    rng: Rng,
    real: ImageSet | None,
    batch_size: int,
    table_gib: float,
    progress: Progress,
    workers: Workers | None,
) -> tuple[Selection, dict[str, Any]]:
    """Return what stays, and what `selection.json` says about it."""
    # Sums that no filter asked for are only taken where they cost little.
    channels = sum(len(target.mean) for target in batch_norm_targets(model.module).values())
    compare_norms = real is not None and 0 < 8 * channels * len(images) <= table_gib * 2**30
    selection = run_filters(
        filters,
        images,
        model,
        rng,
        also=[BatchNormProbe(model.module)] if compare_norms else [],
        batch_size=batch_size,
        table_gib=table_gib,
        progress=progress,
        look=None if workers is None else partial(workers.look, norms=compare_norms),
    )
    beside = None
    if real is not None:
        chosen = torch.randperm(len(real), generator=rng.generator("real"))[:_REAL_COMPARED].sort().values
        probes = [probe for name, probe in selection.probes.items() if name == BatchNormProbe.name]
        beside = scan(
            real.subset(chosen),
            model,
            probes,
            batch_size=batch_size,
            title="look at real images",
            progress=progress,
        )
    read = say_what_was_read(images, progress, "the pool")
    return selection, summarize(selection, model, beside) | {"read": read}


def selection_metrics(folder: Path) -> dict[str, Any]:
    """Return what a selection did in a few numbers.

    `filters`: for each its `method`, the `column` of its scores, how many images `entered` and how many it `kept`.
    `bn_distance`: of the sets `pool`, `kept` and perhaps `real`, summed over batch norms; none if not measured.
    Beside them what `say_what_was_read` returns of the pool.
    """
    content = _read(folder)
    gaps = content["batch_norm"]
    return {
        "filters": [{key: step[key] for key in ("method", "column", "entered", "kept")} for step in content["steps"]],
        "bn_distance": gaps and {name: sum(gaps[name]) for name in ("pool", "kept", "real") if name in gaps},
        **content.get("read", {}),
    }


def _warn_if_farther(folder: Path, progress: Progress) -> None:
    """Say so if the filters, one image at a time, led the set as a whole away from the batch norms."""
    advice = about_selection(selection_metrics(folder)["bn_distance"], FARTHER)
    if advice is not None:
        progress.warn(f"{folder}: {advice}")


def _identity(
    images: ImageSet, model: FloatModel, filters: Sequence[Selector], rng: Rng, real: ImageSet | None
) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "images": images.fingerprint,
        "model": model.fingerprint,
        "preprocess": model.preprocess.model_dump(mode="json"),
        "filters": [{"method": registered_name(one), **cast(Settings, one).model_dump(mode="json")} for one in filters],
        "seed": rng.seed,
        "real": None if real is None else real.fingerprint,
    }


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds this very selection; raises `OutputError` if it holds anything else."""
    require_writable(folder)
    if (folder / SELECTION_NAME).is_file():
        there = _read(folder).get("identity", {})
        if there == identity:
            return True
        different = [key for key in identity if there.get(key) != identity[key]]
        raise OutputError(
            f"{folder} holds another selection (other {', '.join(different)}); choose another --out or remove it"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} already exists and is not empty; choose another folder or remove it")
    return False


def _is_whole(folder: Path, progress: Progress) -> bool:
    """Whether the images of a finished selection are as they were written; says so if not."""
    try:
        for part in (folder, folder / REJECTED_NAME) if (folder / REJECTED_NAME).exists() else (folder,):
            ImageSet.open(part).verify()
    except DataError as error:
        progress.warn(f"{error}: the selection is made again")
        return False
    return True


def _read(folder: Path) -> dict[str, Any]:
    # Of version 1, which did not carry the hash of its own content.
    return read_sealed_json(folder / SELECTION_NAME, unsealed={"version": 1})


class _Silent(Progress):
    """Says nothing, for a sample of images that nobody asked to check."""

    def warn(self, text: str) -> None:
        del text


class _Renamed(Progress):
    """Speaks of a temporary folder by the path it will have."""

    def __init__(self, progress: Progress, temporary: Path, folder: Path) -> None:
        self._progress = progress
        self._temporary = temporary
        self._folder = folder

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        with self._progress.bar(title, total) as bar:
            yield bar

    def warn(self, text: str) -> None:
        self._progress.warn(text.replace(str(self._temporary), str(self._folder)))
