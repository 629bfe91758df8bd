"""Where the tensor that a layer reads is quantized."""

from __future__ import annotations

from synthquant.nn.quant_model import QuantModel


def input_quantizer_name(quant_model: QuantModel, layer: str) -> str | None:
    """Name in `quant_model.quantizers` of what the input of `layer` goes through; none if it stays float.

    This is the layer's own quantizer, one shared with other readers of the same tensor, the one at the entry of a
    block around the layer, or, under `deploy: full`, the one where the tensor is made.
    """
    if layer in quant_model.made_by:
        return quant_model.made_by[layer]
    own = quant_model.layers[layer].input_quantizer
    if own is not None:
        return next(name for name, quantizer in quant_model.quantizers.items() if quantizer is own)
    if quant_model.input_bits(layer) is None:
        return None
    parts = layer.split(".")
    entries = (".".join([*parts[:depth], "input_quantizer"]) for depth in range(len(parts) - 1, 0, -1))
    return next((name for name in entries if name in quant_model.quantizers), None)
