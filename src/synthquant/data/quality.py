"""What is suspicious about the images of a set."""

from __future__ import annotations

from synthquant.data.image_set import ImageSet
from synthquant.data.scan import ImageScan, QualityReport


def check_images(image_set: ImageSet, batch_size: int = 256) -> QualityReport:
    """Return the positions of black, constant, not finite, duplicate and saturated images.

    Broken images are not among them: they are noted in `image_set.set_aside`.
    """
    scan = ImageScan()
    for batch in image_set.batches(batch_size):
        scan.add(batch.images, batch.indices)
    return scan.report()
