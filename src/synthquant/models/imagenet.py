"""What the 1,000 classes of ImageNet are called, from timm's copy of WordNet."""

from __future__ import annotations

from typing import Any

from synthquant.core.errors import MissingExtraError


def imagenet_names() -> tuple[tuple[tuple[str, ...], str], ...]:
    """Names (WordNet's lemmas, the usual one first) and definition of each class, in the order of the labels.

    Raises `MissingExtraError` if timm is not installed.
    """
    info = _info()
    # "lemma, lemma: definition"; no lemma holds a colon.
    described = [text.partition(": ") for text in info.label_descriptions(detailed=True)]
    return tuple((tuple(names.split(", ")), definition) for names, _, definition in described)


def imagenet_synsets() -> tuple[str, ...]:
    """WordNet's identifier of each class, such as `n01440764`, in the order of the labels.

    Raises `MissingExtraError` if timm is not installed.
    """
    return tuple(str(name) for name in _info().label_names())


def _info() -> Any:
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise MissingExtraError("timm", "models", "names of ImageNet's classes") from error
    return ImageNetInfo("imagenet-1k")
