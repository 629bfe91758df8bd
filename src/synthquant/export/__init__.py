"""Write a quantized network to files and read it back.

- `checkpoint`: checkpoints: a folder with codes, scales and a config in JSON.
- `compare`: compare a written network with the quantized network it was made from, on the same samples.
- `deploy`: a private copy of a quantized network that computes with integer weights, as a runtime will.
- `diffusers_folder`: a quantized pipeline as a folder of diffusers, and loading one.
- `flat`: a network as a map from tensors to tensors, whatever trees it takes and gives.
- `float_graph`: the float network as a program of `torch.export`.
- `graph_network`: such a program as a network of modules.
- `grids`: codes and scales of a quantized network in the forms that files hold.
- `measured`: what was measured, as a model card says it.
- `model_card`: model cards of checkpoints and of quantized pipelines.
- `onnx/`: the door to onnx, onnxscript and onnxruntime.
- `packing`: bit packing: codes of b bits, stored next to each other in bytes.
- `presets`: what a runtime takes: how numbers are stored for it, and which schemes it can express.
- `quant_config`: what the config of a checkpoint says.
- `torch_program`: a quantized network as a `torch.export` program.
- `write`: from a run's folder to a verified file.
"""

from __future__ import annotations

from synthquant.export.checkpoint import Checkpoint
from synthquant.export.diffusers_folder import DiffusersFolder
from synthquant.export.onnx import Onnx
from synthquant.export.torch_program import TorchProgram

__all__ = ["Checkpoint", "DiffusersFolder", "Onnx", "TorchProgram"]
