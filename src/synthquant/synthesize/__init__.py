"""Making images from a trained network alone, or of its classes; importing this registers the methods.

`synthquant.synthesize(...)`, called as a function, is that of `synthquant.verbs`.

- `attentive`: what a vision transformer says of images with gradients: how diverse patches look, how alike heads look.
- `batches`: what all methods share: counts, parts, resuming, pixel space.
- `class_names`: what the classes of a classifier are called: built in, from a file, or as the network says.
- `conditions`: what a diffusion pipeline is told of each image that it samples of itself.
- `correlation`: sample correlation inhibition of DSG: images as little alike as noise.
- `diversity`: what keeps images apart in any method of inversion: slack and sample correlation.
- `drawing`: drawing batches of a prompt plan: bad images are found and drawn again with the next seed.
- `dsg`: DSG: pixels optimised as in ZeroQ, with three parts that keep the images from being all alike.
- `flaws`: what is wrong with a drawn image: blank, of one colour, or nearly the same as an earlier one.
- `generator`: the generator of Genie-D: from latents to normalised images.
- `genie_d`: Genie-D: a generator and its latents, trained on batch-norm statistics.
- `inversion`: the loop that optimises images until batch norms see what they remember.
- `low_pass`: a low-pass filter for finished images, a setting of every method.
- `noise`: Gaussian noise, the baseline.
- `pieces`: a large batch taken in pieces, to the same bytes.
- `pixels`: optimising the pixels of a batch themselves, as ZeroQ and DSG do.
- `priors`: prior terms of images: total variation, norm.
- `prompt_tuning`: prompt tuning of GenQ: one token, shared by all classes, learned from a few real images.
- `prompts`: from classes to prompts: which class, template and seed each image of a text-to-image set has.
- `psaq_vit`: PSAQ-ViT: pixels optimised until patches look as diverse as possible to a vision transformer.
- `sampling`: sets of images that a diffusion pipeline draws, float or quantized.
- `self_sampling`: Q-Diffusion's calibration data: what a diffusion model samples of itself, recorded at steps.
- `slack`: slack distribution alignment of DSG: how far statistics may be off before it counts.
- `swing`: swing convolution of Genie: strided layers that start at random offsets.
- `text_to_image`: GenQ: images of the classes drawn by a text-to-image model.
- `zeroq`: ZeroQ: pixels optimised until each image has the statistics that batch norms remember.
"""

import sys

from synthquant.core.verbs import VerbPackage
from synthquant.synthesize.dsg import DSG
from synthquant.synthesize.genie_d import GenieD
from synthquant.synthesize.noise import Noise
from synthquant.synthesize.prompt_tuning import PromptTuning, tune_prompt
from synthquant.synthesize.psaq_vit import PsaqVit
from synthquant.synthesize.self_sampling import SelfSampling
from synthquant.synthesize.text_to_image import TextToImage
from synthquant.synthesize.zeroq import ZeroQ

__all__ = ["DSG", "GenieD", "Noise", "PromptTuning", "PsaqVit", "SelfSampling", "TextToImage", "ZeroQ", "tune_prompt"]

sys.modules[__name__].__class__ = VerbPackage
