"""Making images from a trained network alone, or of its classes; importing this registers the methods."""

from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.noise import Noise
from synthquant.synthesize.prompt_tuning import PromptTuning, tune_prompt
from synthquant.synthesize.text_to_image import TextToImage
from synthquant.synthesize.zeroq import ZeroQ

__all__ = ["GenieD", "Noise", "PromptTuning", "TextToImage", "ZeroQ", "tune_prompt"]
