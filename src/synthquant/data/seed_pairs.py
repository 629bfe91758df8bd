"""Images of two sets that were drawn from the same noise."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synthquant.data.image_set import ImageSet

SEED_COLUMN, PROMPT_COLUMN = "seed", "prompt"


@dataclass(frozen=True)
class Pairs:
    """Images of two sets that were drawn from the same noise for the same prompt and class."""

    first: Tensor
    """int64 `[P]`: positions in one set."""
    second: Tensor
    """int64 `[P]`: positions in the other."""

    def __len__(self) -> int:
        return len(self.first)


def same_seed_pairs(images: ImageSet, reference: ImageSet) -> Pairs | None:
    """Return the images of both sets with the same seed, prompt and label, in the order of `images`.

    Seeds are in the column `seed`, as all that draws images here writes it; what occurs twice in a set is left out.
    None if a set has no seeds, or no two are the same.
    """
    if any(SEED_COLUMN not in one.column_names for one in (images, reference)):
        return None
    keys = [_keys(one, other) for one, other in ((images, reference), (reference, images))]
    once = [{key for key, number in Counter(found).items() if number == 1} for found in keys]
    places = {key: place for place, key in enumerate(keys[1]) if key in once[1]}
    found = [(place, places[key]) for place, key in enumerate(keys[0]) if key in once[0] and key in places]
    if not found:
        return None
    first, second = zip(*found, strict=True)
    return Pairs(torch.tensor(first), torch.tensor(second))


def _keys(images: ImageSet, other: ImageSet) -> list[tuple[Any, ...]]:
    """What images of both sets must share, for each image."""
    known = [images.column(SEED_COLUMN)]
    if PROMPT_COLUMN in images.column_names and PROMPT_COLUMN in other.column_names:
        known.append(images.column(PROMPT_COLUMN))
    if images.labels is not None and other.labels is not None:
        known.append(images.labels.tolist())
    return list(zip(*known, strict=True))
