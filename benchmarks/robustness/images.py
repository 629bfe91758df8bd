"""Folders and Parquet files with something in them that is no image, or an odd one."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from commands import NETWORK, Outcome, run
from made import Made, row

GOOD = 6
LIMIT = 60.0
"""Seconds after which a command hangs."""

ASIDE, USED, REFUSED = "aside", "used", "refused"


def picture(source: random.Random, mode: str = "RGB", size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Random colours."""
    pixels = np.frombuffer(source.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def _cut(source: random.Random, form: str) -> bytes:
    data = encoded(picture(source), form)
    return data[: source.randrange(1, len(data) - 20)]


def _rotated(source: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = source.choice((3, 6, 8))
    return encoded(picture(source), "JPEG", exif=exif)


def _animated(source: random.Random) -> bytes:
    frames = [picture(source, "P") for _ in range(2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


FILES: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    "empty file": (ASIDE, lambda source: b""),
    "random bytes": (ASIDE, lambda source: source.randbytes(500)),
    "text": (ASIDE, lambda source: b"<html>not found</html>"),
    "PNG cut off": (ASIDE, lambda source: _cut(source, "PNG")),
    "JPEG cut off": (ASIDE, lambda source: _cut(source, "JPEG")),
    "PNG of no pixels": (ASIDE, lambda source: png_of(0, 0)),
    "PNG of no height": (ASIDE, lambda source: png_of(20, 0)),
    "PNG of 60000 x 60000": (ASIDE, lambda source: png_of(60000, 60000)),
    "PNG of 9500 x 9500": (ASIDE, lambda source: png_of(9500, 9500)),
    "pickle": (ASIDE, lambda source: pickle.dumps({"image": os.getcwd})),
    "EXIF orientation": (USED, _rotated),
    "CMYK": (USED, lambda source: encoded(picture(source, "CMYK"), "JPEG")),
    "palette": (USED, lambda source: encoded(picture(source, "P"))),
    "gray with alpha": (USED, lambda source: encoded(picture(source, "LA"))),
    "one bit": (USED, lambda source: encoded(picture(source, "1"))),
    "one pixel": (USED, lambda source: encoded(picture(source, size=(1, 1)))),
    "JPEG named PNG": (USED, lambda source: encoded(picture(source), "JPEG")),
    "animated GIF": (USED, _animated),
}  # fmt: skip
"""A file `x.png` in a class folder beside good images, and whether it is set aside or used."""


def _link(target: str) -> Callable[[Path], None]:
    return lambda place: place.symlink_to(target)


def _socket(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place.name)
    os.chdir(here)


def _unnamed(place: Path) -> None:
    (place.parent / os.fsdecode(b"\xff\xfe.png")).write_bytes(encoded(picture(random.Random(0))))


PLACES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "FIFO": (ASIDE, os.mkfifo),
    "/dev/zero": (ASIDE, _link("/dev/zero")),
    "/dev/stdin": (ASIDE, _link("/dev/stdin")),
    "socket": (ASIDE, _socket),
    "dangling link": (ASIDE, _link("nowhere.png")),
    "link to itself": (ASIDE, _link("x.png")),
    "folder named like an image": (USED + "|" + ASIDE, Path.mkdir),
    "name that is not UTF-8": (USED + "|" + ASIDE, _unnamed),
}
"""Something else at that place. A folder without anything in it need not be counted, and an odd name may be used."""


def _loop(folder: Path) -> None:
    (folder / "cat" / "again").symlink_to("..")


def _root(folder: Path) -> None:
    for name in ("train", "val"):
        (folder / name).mkdir()
    for name in ("cat", "dog"):
        (folder / name).rename(folder / "val" / name)
        (folder / "train" / name).mkdir()


FOLDERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "loop of links": (ASIDE, _loop),
    "train and val inside": (REFUSED, _root),
}
"""Something done to the whole folder; a loop brings no image again, and is said."""


def _rows(source: random.Random) -> list[dict[str, object]]:
    return [{"bytes": encoded(picture(source)), "path": None} for _ in range(GOOD)]


_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _labelled(labels: Sequence[object], kind: pa.DataType | None = None) -> Callable[[random.Random], pa.Table]:
    """Good images with labels of some type."""
    return lambda source: pa.table({"image": pa.array(_rows(source), _STRUCT), "label": pa.array(labels, kind)})


def _imaged(image: object, kind: pa.DataType | None = None) -> Callable[[random.Random], pa.Table]:
    """Good labels of images of some type."""
    return lambda source: pa.table({"image": pa.array([image] * GOOD, kind), "label": [0] * GOOD})


TABLES: dict[str, tuple[str, Callable[[random.Random], pa.Table]]] = {
    "images are text": (ASIDE + "|" + REFUSED, _imaged("a")),
    "images are numbers": (REFUSED, _imaged(1)),
    "images are floats": (REFUSED, _imaged(1.5)),
    "images are lists": (REFUSED, _imaged([1, 2])),
    "images are nulls": (ASIDE + "|" + REFUSED, _imaged(None)),
    "images are other structs": (REFUSED, _imaged({"a": 1})),
    "bytes are numbers": (REFUSED, _imaged({"bytes": 1, "path": None})),
    "paths to /dev/zero": (ASIDE + "|" + REFUSED, _imaged({"bytes": None, "path": "/dev/zero"}, _STRUCT)),
    "labels are text": (REFUSED, _labelled(["cat"] * GOOD)),
    "labels are floats": (REFUSED, _labelled([0.5] * GOOD)),
    "labels are truths": (REFUSED, _labelled([True] * GOOD)),
    "labels are lists": (REFUSED, _labelled([[0]] * GOOD)),
    "labels above 2^63": (REFUSED, _labelled([2**63 + 1] * GOOD, pa.uint64())),
    "labels of no class": (REFUSED, _labelled([10] * GOOD)),
    "no image column": (REFUSED, lambda source: pa.table({"picture": [0] * GOOD, "label": [0] * GOOD})),
    "no rows": (REFUSED, lambda source: pa.table({"image": pa.array([], _STRUCT), "label": pa.array([], pa.int64())})),
}
"""A Parquet file of six rows."""


_BRING_NONE = ("loop of links", "folder named like an image")
"""Kinds that bring no image of their own."""


def cases(source: random.Random) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """By name: what is right, and a function that makes `data` or `data.parquet` in a folder."""
    found: dict[str, tuple[str, Callable[[Path], None]]] = {}
    for name, (right, content) in FILES.items():
        found[name] = right, lambda folder, content=content: _place(folder, lambda x: x.write_bytes(content(source)))
    for name, (right, put) in PLACES.items():
        found[name] = right, lambda folder, put=put: _place(folder, put)
    for name, (right, change) in FOLDERS.items():
        found[name] = right, lambda folder, change=change: change(_good(folder))
    for name, (right, table) in TABLES.items():
        found[name] = right, lambda folder, table=table: pq.write_table(table(source), folder / "data.parquet")
    return found


def _good(folder: Path) -> Path:
    source = random.Random(1)
    for name in ("cat", "dog"):
        (folder / "data" / name).mkdir(parents=True)
        for place in range(GOOD // 2):
            (folder / "data" / name / f"{place}.png").write_bytes(encoded(picture(source)))
    return folder / "data"


def _place(folder: Path, put: Callable[[Path], object]) -> None:
    put(_good(folder) / "cat" / "x.png")


READERS: dict[str, tuple[object, ...]] = {
    "evaluate": ("evaluate", NETWORK, "--data", "SOURCE", "--json"),
    "quantize": ("quantize", NETWORK, "--images", "SOURCE", "--method", "rtn", "--out", "out", "--json"),
    "select": ("select", "SOURCE", "--model", NETWORK, "--by", "energy:3", "--out", "out", "--json"),
}
"""Commands that read images. Only `evaluate` needs labels."""


def trials(made: Made, work: Path, count: int, seed: int) -> Iterator[dict[str, object]]:
    """Read `count` hostile sources, the kinds and the commands in turn, and yield a row for each."""
    del made
    source = random.Random(seed)
    makers = cases(source)
    order = [(name, reader) for reader in READERS for name in makers if _fits(name, reader)]
    for number, (name, reader) in enumerate(order[:count]):
        right, make = makers[name]
        folder = work / f"images-{number:03d}"
        folder.mkdir(parents=True)
        make(folder)
        data = "data" if (folder / "data").is_dir() else "data.parquet"
        outcome = run([data if word == "SOURCE" else word for word in READERS[reader]], folder, limit=LIMIT)
        verdict, found = judge(reader, outcome, right, name)
        yield row(name, verdict, case=reader, right=right, found=found, traceback=outcome.traceback,
                  leftovers=sorted(path.name for path in folder.rglob(".*.tmp")), said=outcome.brief())  # fmt: skip


def _fits(name: str, reader: str) -> bool:
    """Labels matter to `evaluate` only."""
    return reader == "evaluate" or not name.startswith("labels")


def judge(reader: str, outcome: Outcome, right: str, name: str) -> tuple[str, str]:
    """The verdict, and what happened: used, set aside and said, refused, or neither."""
    if outcome.refused:
        return "refused" if REFUSED in right else "wrong", REFUSED
    if outcome.status != 0 or outcome.traceback:
        return "wrong", "neither"
    found = ASIDE if "set aside" in outcome.err else USED
    images = json.loads(outcome.out)[{"evaluate": "count", "quantize": "count", "select": "pool"}[reader]]
    wanted = {ASIDE: GOOD, USED: GOOD if name in _BRING_NONE else GOOD + 1}[found]
    # `select` counts what it was given and what it rejected; a reason stands with each.
    counted = images == wanted or (reader == "select" and found == ASIDE)
    return "identical" if found in right and counted else "wrong", f"{found}, {images} images"
