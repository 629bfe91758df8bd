"""Keeping what resembles the training data; importing this package registers its filters in `SELECTORS`.

- `batch_norm`: distance of a set of images to batch norms, and what each image adds to it.
- `corruptions`: images spoilt on purpose, as examples of what no network was trained on.
- `energy`: the energy score: how much a network's logits look like those of its training data.
- `filter`: what all filters have: how many images stay, and a way to run alone.
- `keep`: which images stay, once each has a score.
- `learned_batch_norm`: a distance to batch norms whose layers are weighted by what tells images from spoilt ones.
- `patch_similarity`: how diverse the patches of an image look to a vision transformer.
- `scan`: one streaming forward pass over a pool of images that feeds every filter.
- `sequence`: filters one after another over the rows of one forward pass.
- `summary`: what a selection did, in numbers that a report can show.
- `write`: a selection as a folder: the images that stay, what was done, and a few of those that went.
"""

from synthquant.select.batch_norm import BatchNormDistance, BatchNormSensitivity
from synthquant.select.energy import Energy
from synthquant.select.learned_batch_norm import LearnedBatchNormDistance
from synthquant.select.patch_similarity import PatchSimilarity
from synthquant.select.sequence import Selection, run_filters
from synthquant.select.write import write_selection

__all__ = [
    "BatchNormDistance",
    "BatchNormSensitivity",
    "Energy",
    "LearnedBatchNormDistance",
    "PatchSimilarity",
    "Selection",
    "run_filters",
    "write_selection",
]
