"""The float network whose batch norms images are made to fit while another one is trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthquant.core.errors import UnsupportedModelError
from synthquant.models.batch_norm import batch_norm_targets, is_untrained
from synthquant.synthesize.inversion import InvertedNetwork

if TYPE_CHECKING:
    from synthquant.models.float_model import FloatModel


def require_statistics(model: FloatModel, needing: str) -> None:
    """Raise `UnsupportedModelError` if no batch norm has learned statistics, which `needing` makes images from."""
    if not batch_norm_targets(model.module):
        raise UnsupportedModelError(
            f"{model.name} has no batch norm with running statistics, which {needing} makes images from; use the method"
            " distill, without renewal, on images that there are"
        )
    if is_untrained(model.module):
        raise UnsupportedModelError(
            f"{model.name} looks untrained: no batch norm of it has seen a batch, so {needing} has nothing to make"
            " images from; make the run with --weights FILE"
        )


def inverted_network(model: FloatModel, needing: str) -> InvertedNetwork:
    """The network that measures statistics of batches; raises as `require_statistics`."""
    require_statistics(model, needing)
    return InvertedNetwork(model, method=needing, statistics="batch", channel_weights="mean", swing=False)
