"""Write a quantized network to files and read it back."""

from __future__ import annotations

from synthquant.export.checkpoint import Checkpoint
from synthquant.export.onnx import Onnx
from synthquant.export.torch_program import TorchProgram

__all__ = ["Checkpoint", "Onnx", "TorchProgram"]
