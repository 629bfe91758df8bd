"""Making images from a trained network alone; importing this package registers its methods in `SYNTHESIZERS`."""

from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.noise import Noise
from synthquant.synthesize.zeroq import ZeroQ

__all__ = ["GenieD", "Noise", "ZeroQ"]
