"""The one door to torchmetrics: Inception's features, and the structural similarity of images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from synthquant.core.errors import MissingExtraError, ModelError
from synthquant.models.weights import one_line, read_weights

INCEPTION = "inception"
"""The name of these features where features are asked for."""
_WIDTH = "2048"  # what Inception's last layer reads, by torch-fidelity's name for it
SMALLEST_SIDE = 11
"""Pixels of the window of the structural similarity: smaller images have none."""


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al., IEEE TIP 13, 2004) of each pair of images `[B, C, H, W]` in 0..1.

    A Gaussian window of 11x11 pixels with a standard deviation of 1.5 around each pixel, images being mirrored at their
    edges; 1 for equal images. Float32 `[B]`.

    Raises `MissingExtraError` if torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise MissingExtraError("torchmetrics", "quality", "structural similarity") from error
    found = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1)


def inception_weights() -> Path:
    """Return where the weights of Inception are looked for: the place where torch-fidelity keeps what it downloads.

    Raises `MissingExtraError` if torch-fidelity, which torchmetrics' Inception is built on, is not installed.
    """
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(_address()).path).name


def open_inception(device: torch.device | str) -> nn.Module:
    """Return torchmetrics' Inception-v3, which maps uint8 `[B, 3, H, W]` of any size to features float32 `[B, 2048]`.

    Its weights are those of the original FID. They are not downloaded here.

    Raises:
        MissingExtraError: torchmetrics or torch-fidelity is not installed.
        ModelError: the weights are not on this machine, or are not Inception's.
    """
    path = inception_weights()
    if not path.is_file():
        raise ModelError(
            f"the weights of Inception are not on this machine; download {_address()} to {path}, or take the features"
            " of a classifier: --features zoo/cifar10-resnet20"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise MissingExtraError("torchmetrics", "quality", "features of Inception") from error
    # torch-fidelity would unpickle whatever the file holds; what it gets are tensors that were read as data.
    plain = io.BytesIO()
    torch.save(read_weights(path), plain)
    plain.seek(0)
    try:
        network: Any = NoTrainInceptionV3(
            name="inception-v3-compat", features_list=[_WIDTH], feature_extractor_weights_path=plain
        )
    except RuntimeError as error:
        raise ModelError(f"{path} does not hold the weights of Inception: {one_line(error)}") from error
    assert isinstance(network, nn.Module)
    return network.to(device)


def _address() -> str:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "quality", "features of Inception") from error
    return str(URL_INCEPTION_V3)
