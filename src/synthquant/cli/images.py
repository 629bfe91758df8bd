"""`export-images`: an image set as files that everything opens."""

from __future__ import annotations

from typing import Annotated

import typer

from synthquant.cli import options
from synthquant.cli.output import print_json
from synthquant.core.files import require_outside
from synthquant.core.progress import ConsoleProgress
from synthquant.data.image_folder import write_image_folder
from synthquant.data.quality import outside_in_words, say_what_was_read
from synthquant.data.sources import open_images

Images = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        help="An image set folder, class folders, a Parquet file or folder, or a datasets name.",
        show_default=False,
    ),
]


def export_images(
    images: Images,
    out: options.ImagesOut,
    max_pixels: options.MaxPixels = options.MAX_PIXELS,
    json: options.Json = False,
) -> None:
    """Write a set of images as PNG files, in one folder for each class; values beyond black and white are cut off."""
    require_outside(out, (images,))
    found = open_images(images, max_pixels=max_pixels)
    count = write_image_folder(found, out, ConsoleProgress())
    read = say_what_was_read(found, ConsoleProgress(), images)
    if json:
        print_json({"out": str(out), "count": count, **read})
        return
    print(f"{count} images in {out}")
    if outside := outside_in_words(found):
        print(outside)
