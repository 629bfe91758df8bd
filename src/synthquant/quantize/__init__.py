"""Post-training quantization: ranges, and reconstruction unit by unit."""

from synthquant.quantize.adaround import AdaRound
from synthquant.quantize.brecq import Brecq
from synthquant.quantize.genie_m import GenieM
from synthquant.quantize.qdrop import QDrop
from synthquant.quantize.rtn import Rtn

__all__ = ["AdaRound", "Brecq", "GenieM", "QDrop", "Rtn"]
