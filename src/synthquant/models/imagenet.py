"""What the 1,000 classes of ImageNet are called, from timm's copy of WordNet."""

from __future__ import annotations

from synthquant.core.errors import MissingExtraError


def imagenet_names() -> tuple[tuple[tuple[str, ...], str], ...]:
    """Names (WordNet's lemmas, the usual one first) and definition of each class, in the order of the labels.

    Raises `MissingExtraError` if timm is not installed.
    """
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise MissingExtraError("timm", "models", "names of ImageNet's classes") from error
    info = ImageNetInfo("imagenet-1k")
    # "lemma, lemma: definition"; no lemma holds a colon.
    described = [text.partition(": ") for text in info.label_descriptions(detailed=True)]
    return tuple((tuple(names.split(", ")), definition) for names, _, definition in described)
