"""The package's own kinds of activation quantizers, which importing this enters into their table."""

from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.dynamic import DynamicQuantizer
from synthquant.nn.log_sqrt2 import LogSqrt2Quantizer
from synthquant.nn.twin_uniform import TwinUniformQuantizer

__all__ = ["AffineQuantizer", "DynamicQuantizer", "LogSqrt2Quantizer", "TwinUniformQuantizer"]
