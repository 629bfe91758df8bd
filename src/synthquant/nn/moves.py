"""Operations that only move values: what they put out keeps the grid of what they read."""

from __future__ import annotations

from collections.abc import Mapping

from synthquant.models.trace import Operation

MOVES: Mapping[str, tuple[str, ...]] = {
    "Identity": (
        *("data", "detach", "contiguous", "clone"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
    ),
    "Reshape": ("view", "view_as", "reshape", "reshape_as", "unflatten"),
    "Flatten": ("flatten",),
    "Squeeze": ("squeeze",),
    "Unsqueeze": ("unsqueeze",),
    "Transpose": (
        *("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT", "channel_shuffle"),
    ),
    "Expand": ("expand", "expand_as", "broadcast_to"),
    "Tile": ("repeat", "repeat_interleave", "tile"),
    "Slice": ("getitem", "narrow", "roll", "flip", "rot90"),
    "Split": ("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "hsplit"),
    "Gather": ("index_select", "select", "unfold"),
    "GatherElements": ("gather", "take_along_dim"),
    "DepthToSpace": ("pixel_shuffle",),
    "SpaceToDepth": ("pixel_unshuffle",),
    "MaxPool": (
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    ),
    "ReduceMax": ("amax",),
    "Pad": ("pad",),
}
"""Functions whose result holds values of what they read, and zeros, by the ONNX operator that stands for them.

An operator holds values of its first input. Some functions become several operators, all of them moves.
"""

JOINS = frozenset(("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"))
"""Functions that put tensors side by side."""

_FUNCTIONS = frozenset(name for names in MOVES.values() for name in names)


def is_move(operation: Operation) -> bool:
    """Whether the result holds values of what the operation reads: a view, a copy, a slice, a maximum."""
    return operation.name in _FUNCTIONS or (operation.name in JOINS and len(operation.inputs) == 1)
