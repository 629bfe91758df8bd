"""Measure a network: accuracy, agreement with the float network, size and operations; and the images one draws.

`synthquant.evaluate(...)`, called as a function, is that of `synthquant.verbs`.

- `accuracy`: accuracy on images, with a confidence interval, and agreement with a reference network.
- `agreement`: layer by layer: how much quantization error there is beside the signal.
- `cost`: what a quantized network costs: bytes of its weights and bit operations of one image.
- `data`: what networks are measured on: images with labels, or samples, and targets for a metric.
- `diversity`: how diverse images are: how far features lie apart, and how many directions they span.
- `feature_distances`: how far two sets of images lie apart: FID, KID, precision and recall, of features of any network.
- `gap`: how much smaller the error is on images that a network was quantized with than on others like them.
- `image_features`: features of a set of images, by the network that is named: a classifier, or Inception.
- `image_quality`: how good drawn images are beside reference images, and in relation to the float pipeline's.
- `metrics`: a user's own metric, and agreement with masks: what they are given, and the numbers that they give.
- `outputs`: two networks side by side, output by output: ratios of channels, and agreement by task.
- `paired`: two networks on the same images: how far they differ, with a 95% interval.
- `same_seed`: how far two pipelines take the same noise apart: images of the same seed, pair by pair.
- `section`: the section `evaluate` of a recipe.
- `step_errors`: how the error of a quantized pipeline grows over the steps of its sampler.
- `torch_metrics`: the one door to torchmetrics: Inception's features, and structural similarity.
"""

import sys

from synthquant.core.verbs import VerbPackage

sys.modules[__name__].__class__ = VerbPackage
