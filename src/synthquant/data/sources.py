"""Images from where people keep them: folders, Parquet files, `datasets`, the package itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from torch import Tensor

from synthquant.core.errors import DataError, MissingExtraError, UnknownNameError
from synthquant.core.hub import answers
from synthquant.core.progress import QUIET, Progress
from synthquant.data.codec import MAX_PIXELS
from synthquant.data.columns import label_numbers, require_images
from synthquant.data.folders import file_kind, files_below, printable
from synthquant.data.image_folder import SUFFIXES, open_image_folder, require_one_split
from synthquant.data.image_set import ImageSet
from synthquant.data.loaders import read_loader
from synthquant.data.manifest import MANIFEST_NAME, TRAJECTORY_NAME, Manifest
from synthquant.data.parts import ParquetRows, PartFile, open_parquet
from synthquant.data.preprocess import Preprocess
from synthquant.data.quality import say_what_was_read
from synthquant.data.rows import Rows, Stored
from synthquant.data.store import JOURNAL_NAME

ACCEPTED = (
    "an image set folder, a folder of images (in class folders), a Parquet file or folder, "
    "a datasets NAME[:SPLIT], or bundled/NAME"
)
BUNDLED = {"cifar10-test": "models/zoo/data/cifar10-test.parquet"}

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label",)
_DATASET_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<split>[\w\[\]%:+.-]+))?")
_DEFAULT_SPLITS = ("test", "validation", "val")


def open_images(
    source: Any,
    *,
    columns: tuple[str, str] | None = None,
    max_pixels: int = MAX_PIXELS,
    preprocess: Preprocess | None = None,
    targets: bool = False,
) -> ImageSet:
    """Open images with their labels, wherever they are.

    Of a path nothing is copied, and pixels are read when asked for: an image set folder; a folder with one folder of
    images per class (labels are the positions of the sorted folder names, which the manifest keeps as `class_names`, or
    the names themselves if all are whole numbers) or with images only (no labels); a Parquet file or folder; a
    `datasets` name with an optional split; or `bundled/NAME`. A dataset of `datasets` is read alike. All else that a
    program has in its hands, a `DataLoader`, a `Dataset`, a tensor, a list of pictures, is read once into memory
    (`read_loader`). An image set is returned as it is.

    Args:
        source: the images.
        columns: names of the image and the label column where they are not called `image` (or `img`) and `label`.
        max_pixels: larger images of files are set aside.
        preprocess: how a loader or a tensor is normalised, which is undone; none: it holds pixels.
        targets: keep what a loader gives beside images and is no label, as `read_loader` does.

    Raises:
        DataError: there is no such source, it holds no image, columns of another type or values that are no pixels, or
            it is the root of several splits.
        MissingExtraError: `datasets` is needed and not installed.
    """
    if isinstance(source, str | Path):
        if preprocess is not None:
            raise DataError(f"preprocess is for loaders and tensors that are normalised, not for {source}")
        opened = _open(source, columns)
        opened.max_pixels = max_pixels
        return opened
    if isinstance(source, ImageSet):
        if preprocess is not None:
            raise DataError("an image set holds pixels, not what is normalised; leave preprocess out")
        return source
    if type(source).__module__.partition(".")[0] == "datasets":
        return _dataset_images(source, f"{type(source).__name__}", columns)
    return read_loader(source, preprocess=preprocess, targets=targets)


def import_images(
    source: str | Path,
    out_folder: Path | str,
    progress: Progress = QUIET,
    *,
    columns: tuple[str, str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageSet:
    """Copy the images of any source into a new image set folder and return that set.

    Broken images are set aside with a reason. Raises what `open_images` and `ImageSet.save` raise.
    """
    images = open_images(source, columns=columns, max_pixels=max_pixels)
    saved = images.save(out_folder, progress)
    say_what_was_read(images, progress, str(source))
    return saved


def _open(source: str | Path, columns: tuple[str, str] | None) -> ImageSet:
    text = str(source)
    if text.startswith("bundled/"):
        return _open_bundled(text.removeprefix("bundled/"))
    path = Path(source).expanduser()
    kind = file_kind(path)
    if kind == "file":
        return _open_parquet([path], columns)
    if kind == "folder":
        return _open_folder(path, columns)
    match = _DATASET_NAME.fullmatch(text)
    if match is None or Path(match["name"]).suffix in (".parquet", *SUFFIXES):
        raise DataError(f"no images at {text!r}; accepted: {ACCEPTED}")
    return _open_dataset(match["name"], match["split"], columns)


def _open_bundled(name: str) -> ImageSet:
    if name not in BUNDLED:
        raise UnknownNameError("bundled image set", name, sorted(BUNDLED))
    file = resources.files("synthquant").joinpath(BUNDLED[name])
    return _open_parquet([Path(str(file))], None)


def _open_folder(folder: Path, columns: tuple[str, str] | None) -> ImageSet:
    if (folder / MANIFEST_NAME).is_file():
        return ImageSet.open(folder)
    if (folder / TRAJECTORY_NAME).is_file():
        raise DataError(f"{folder} holds no images but the trajectory of a diffusion model; quantize that with it")
    if (folder / JOURNAL_NAME).is_file():
        raise DataError(f"{folder} is an unfinished image set; run the command that makes it again to finish it")
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return _dataset_images(_datasets(str(folder)).load_from_disk(str(folder)), str(folder), columns)
    tables = [found for found in files_below(folder) if found.name.endswith(".parquet") and found.reason is None]
    if not tables:
        rows, manifest = open_image_folder(folder)
        return _external(rows, manifest, str(folder))
    require_one_split(folder, sorted({_split_name(found.name) for found in tables}))
    return _open_parquet(sorted(folder / found.name for found in tables), columns)


def _split_name(name: str) -> str:
    """The part of a table's path that would name a split: its first folder, or the beginning of `train-00000.parquet`.

    A common first folder such as `data` names none.
    """
    first, slash, rest = name.partition("/")
    return _split_name(rest) if slash and first == "data" else first.partition("-")[0].removesuffix(".parquet")


def _open_parquet(files: Sequence[Path], columns: tuple[str, str] | None) -> ImageSet:
    parts = []
    schemas = []
    for path in files:
        try:
            file = open_parquet(path)
        except DataError as error:
            raise DataError(f"{error}; accepted: {ACCEPTED}" if len(files) == 1 else str(error)) from error
        schemas.append(file.schema_arrow)
        parts.append(PartFile(path, file.metadata.num_rows))
        file.close()
    names = schemas[0].names
    image_column = _chosen(columns and columns[0], _IMAGE_COLUMNS, names, files[0])
    if image_column is None:
        raise DataError(f"{files[0]} has no image column {' or '.join(_IMAGE_COLUMNS)}; columns: {', '.join(names)}")
    for path, schema in zip(files, schemas, strict=True):
        if image_column not in schema.names:
            raise DataError(f"{path} has no column {image_column!r}, which {files[0].name} has")
        require_images(schema.field(image_column).type, f"column {image_column!r} in {path}")
    label_column = _chosen(columns and columns[1], _LABEL_COLUMNS, names, files[0])
    rows = ParquetRows(parts, image_column=image_column, label_column=label_column)
    return _external(rows, Manifest(count=len(rows), framing="raw"), str(files[0]))


def _chosen(wanted: str | None, usual: Sequence[str], names: Sequence[str], where: object) -> str | None:
    if wanted is not None and wanted not in names:
        raise DataError(f"{where} has no column {wanted!r}; columns: {', '.join(names)}")
    return wanted or next((name for name in usual if name in names), None)


def _external(rows: Rows, manifest: Manifest, where: str) -> ImageSet:
    if not manifest.count:
        aside = manifest.set_aside
        found = f", only {aside[0].name} and the like ({aside[0].reason})" if aside else ""
        raise DataError(f"no images in {where}{found}; accepted: {ACCEPTED}")
    return ImageSet(rows, manifest)


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        purpose = f"{source!r} is no file or folder of images, and to open it with datasets"
        raise MissingExtraError("datasets", "data", purpose) from error
    return datasets


def _open_dataset(name: str, split: str | None, columns: tuple[str, str] | None) -> ImageSet:
    datasets = _datasets(name)
    _require_hub(datasets, name)
    try:
        if split is None:
            split = _default_split(name, datasets.get_dataset_split_names(name))
        dataset = datasets.load_dataset(name, split=split)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # not found, no network, unknown configuration or split
        raise DataError(f"no images at {name!r}: no such file or folder, and datasets says: {error}") from error
    return _dataset_images(dataset, name, columns)


def _require_hub(datasets: Any, name: str) -> None:
    # Without a network the libraries below retry for half a minute; a mistyped path deserves an answer at once.
    endpoint = datasets.config.HF_ENDPOINT
    if not datasets.config.HF_HUB_OFFLINE and not answers(endpoint):
        raise DataError(
            f"no images at {name!r}: no such file or folder, and {urlsplit(endpoint).hostname} cannot be reached to"
            f" look for a dataset (HF_HUB_OFFLINE=1 uses downloaded ones); accepted: {ACCEPTED}"
        )


def _default_split(name: str, splits: Sequence[str]) -> str:
    if len(splits) == 1:
        return splits[0]
    for usual in _DEFAULT_SPLITS:
        if usual in splits:
            return usual
    raise DataError(f"dataset {name!r} has several splits, say which: {', '.join(f'{name}:{s}' for s in splits)}")


def _dataset_images(dataset: Any, name: str, columns: tuple[str, str] | None) -> ImageSet:
    datasets = _datasets(name)
    if isinstance(dataset, datasets.DatasetDict):
        dataset = dataset[_default_split(name, list(dataset))]
    features = dataset.features
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image_column = _chosen(columns and columns[0], images, list(features), f"dataset {name!r}")
    if image_column is None:
        raise DataError(f"dataset {name!r} has no column of images; columns: {', '.join(features)}")
    label_column = _chosen(columns and columns[1], (*_LABEL_COLUMNS, *classes), list(features), f"dataset {name!r}")
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    rows = _DatasetRows(dataset, name, image_column, label_column)
    return _external(rows, Manifest(count=len(rows), framing="raw"), name)


class _DatasetRows:
    """Images in a dataset of `datasets`, which keeps them on disk itself."""

    def __init__(self, dataset: Any, name: str, image_column: str, label_column: str | None) -> None:
        self._dataset = dataset
        self._name = name
        self._image_column = image_column
        self._label_column = label_column

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(c for c in self._dataset.column_names if c not in (self._image_column, self._label_column))

    def __len__(self) -> int:
        return len(self._dataset)

    def labels(self) -> Tensor | None:
        if self._label_column is None:
            return None
        where = f"column {self._label_column!r} of dataset {self._name!r}"
        try:
            return label_numbers(pa.array(self.column(self._label_column)), where)
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"{where} does not hold whole numbers: {error}") from error

    def column(self, name: str) -> list[Any]:
        return list(self._dataset.with_format(None).select_columns([name])[:][name])

    def fetch(self, indices: Sequence[int]) -> list[Stored]:
        rows = self._dataset.select_columns([self._image_column])[list(indices)][self._image_column]
        return [self._stored(index, row) for index, row in zip(indices, rows, strict=True)]

    def fingerprint(self) -> str:
        return str(self._dataset._fingerprint)

    def _stored(self, index: int, row: dict[str, Any] | None) -> Stored:
        name = f"{self._name} row {index}"
        if row is None:
            return Stored(name, b"")
        inner = row.get("path")
        if row.get("bytes") is None and inner:
            return Stored(printable(inner), Path(inner))
        return Stored(printable(inner) if inner else name, row.get("bytes") or b"")
