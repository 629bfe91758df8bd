"""Measure a network: accuracy, agreement with the float network, size and operations.

- `accuracy`: accuracy on images, with a confidence interval, and agreement with a reference network.
- `agreement`: layer by layer: how much quantization error there is beside the signal.
- `cost`: what a quantized network costs: bytes of its weights and bit operations of one image.
- `diversity`: how diverse images are: how far features lie apart, and how many directions they span.
- `paired`: two networks on the same images: how far they differ, with a 95% interval.
"""
