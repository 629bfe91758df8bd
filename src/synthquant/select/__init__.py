"""Keeping what resembles the training data; importing this package registers its filters in `SELECTORS`."""

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
