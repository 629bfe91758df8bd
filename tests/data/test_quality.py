from __future__ import annotations

import pytest
import torch

from synthquant.data.image_set import ImageSet
from synthquant.data.scan import ImageScan, QualityReport


def report_of(image_set: ImageSet, batch_size: int = 256) -> QualityReport:
    scan = ImageScan()
    for batch in image_set.batches(batch_size):
        scan.add(batch.images, batch.indices)
    return scan.report()


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_each_kind_is_found(dtype: str) -> None:
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1] = 1 / 255
    images[2] = torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    images[4] = images[0]
    images[5] = (images[5] > 0.5).float()
    images[6] = images[0].flip(0)  # the same values in another order are no duplicate
    image_set = ImageSet.from_tensors(images, dtype="uint8" if dtype == "uint8" else "float16")
    report = report_of(image_set, batch_size=3)
    assert report.count == 8
    assert report.black == (1,)
    assert report.constant == (2,)
    assert report.duplicate == (4,)
    assert report.saturated == (5,)
    assert report.nan == ()
    assert len(report.warnings()) == 4


def test_nan_and_infinity() -> None:
    images = torch.rand(4, 3, 4, 4) * 2
    images[1, 2, 3, 3] = float("nan")
    images[3, 0, 0, 0] = float("-inf")
    report = report_of(ImageSet.from_tensors(images))
    assert report.nan == (1, 3)


def test_nothing_wrong_says_nothing() -> None:
    report = report_of(ImageSet.from_tensors(torch.rand(5, 3, 4, 4)))
    assert report.warnings() == []


def test_long_lists_are_cut_in_warnings() -> None:
    report = report_of(ImageSet.from_tensors(torch.zeros(9, 3, 4, 4)))
    assert report.warnings()[0] == "9 of 9 images are black: 0, 1, 2, 3, 4, ..."


def test_scan_does_not_depend_on_batching_and_agrees_with_torch() -> None:
    images = torch.randn(10, 3, 5, 7, generator=torch.Generator().manual_seed(0)).half()
    whole, pieces = ImageScan(), ImageScan()
    whole.add(images)
    for start in range(0, 10, 3):
        pieces.add(images[start : start + 3])
    assert whole.statistics() == pieces.statistics()
    assert whole.report() == pieces.report()
    found = whole.statistics()
    assert found is not None
    assert found.mean == pytest.approx(images.double().mean((0, 2, 3)).tolist(), abs=1e-12)
    assert found.std == pytest.approx(images.double().std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_bytes_are_measured_in_pixel_space() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    scan = ImageScan()
    scan.add(images)
    found = scan.statistics()
    assert found is not None
    assert found.mean == pytest.approx((images.double() / 255).mean((0, 2, 3)).tolist(), abs=1e-12)
    assert found.max == images.max().item() / 255
    assert scan.image_size == (5, 5)
    assert scan.dtype == "uint8"


def test_images_that_are_not_finite_do_not_count() -> None:
    scan = ImageScan()
    assert scan.statistics() is None
    scan.add(torch.full((2, 3, 2, 2), float("nan")).half())
    assert scan.statistics() is None
    assert scan.report().nan == (0, 1)
