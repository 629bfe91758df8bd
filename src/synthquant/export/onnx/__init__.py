"""The door to onnx, onnxscript and onnxruntime: write a quantized network as an ONNX file, and run such files.

The file holds weights as integers and biases as 32-bit integers, never float weights that are quantized when it is
loaded. Quantized tensors pass through QuantizeLinear and DequantizeLinear, the form that runtimes turn into integer
kernels. Batch size is dynamic, weights are inside the file, and its metadata says how images are prepared
and what it was made from.

- `exporter`: the exporter `onnx`; like `metadata` it can be imported without onnx
- `build`: torch's exporter, and the passes on its graph in order
- `graph`, `moves`, `bias`: these passes: names and duplicates, reshaping on codes, integer biases
- `metadata`: what a file says about itself, and the hash that seals it
- `runtime`: ONNX Runtime and OpenVINO as functions from images to logits
- `layers`, `verify`, `speed`: which layers run on integers, whether a file computes the same, and how fast

- `bias`: biases as 32-bit integers.
- `build`: from a quantized network to an ONNX graph: torch's exporter and the passes behind it.
- `exporter`: ONNX files as an exporter of the registry.
- `graph`: passes over an exported ONNX graph: names, pooling, weights of 4 bits.
- `layers`: what ONNX Runtime makes of a file: which layers end up in integer kernels.
- `metadata`: what an ONNX file of ours says about itself, under keys that start with `synthquant.`.
- `moves`: reshaping, transposing and slicing on codes instead of floats, and concatenations that are cut again.
- `runtime`: running ONNX files in ONNX Runtime and OpenVINO.
- `speed`: how fast an exported network runs beside the float export of the same architecture.
- `verify`: compare an ONNX file with the quantized network it was made from.
"""

from __future__ import annotations

from synthquant.export.onnx.exporter import Onnx

__all__ = ["Onnx"]
