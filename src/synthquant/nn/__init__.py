"""Quantizers, quantized layers and the quantized copy of a network.

- `activation_quantizers`: quantized activations: what every kind of quantizer has in common, and the table of kinds.
- `affine`: the kind of quantizer that integer kernels know: one scale and one zero point for a tensor.
- `attention`: attention as two matrix products and a softmax, so that each of them can be quantized.
- `build`: from a float model and a scheme to the parts of a quantized network.
- `called_layers`: linear layers whose weights a function multiplies, as calls of these layers.
- `coverage`: what quantization reaches of a network, row by row and in numbers.
- `derived`: classes derived at run time, so that a module keeps its place, its attributes and its own forward.
- `equalization`: channels scaled so that a network computes the same: the factors, and applying them.
- `functional`: fake quantization and soft rounding as pure functions of tensors.
- `kinds`: the package's own kinds of activation quantizers.
- `layer_norms`: which linear layers read what a layer norm puts out, and nothing else does.
- `layers`: quantized layers: the user's own layer whose `weight` reads as the decoded codes.
- `log_sqrt2`: the kind of quantizer for softmaxes: powers of the square root of 2 below one scale.
- `moves`: operations that only move values: what they put out keeps the grid of what they read.
- `observers`: choice of scale and zero point: what range of values a grid covers.
- `operations`: modules whose own operations read or put out quantized tensors.
- `own_forward`: copying a network whose modules have a forward of their own, set on the instance.
- `placement`: which tensors are quantized under `deploy: full`, read off one forward pass.
- `placement_check`: whether quantizers that stand where tensors are made reach everything that reads these tensors.
- `placement_reads`: which tensors are quantized in the papers' way: what layers read and, if asked, what products read.
- `quant_model`: the quantized copy of a network: its state, its modes, its coverage.
- `rewrites`: modules that multiply by functions, as equal modules of layers and visible products.
- `scheme`: quantization schemes as plain data, in the vocabulary of compressed-tensors.
- `twin_uniform`: PTQ4ViT's kind of quantizer, for what a softmax or a GELU puts out.
- `visible`: functions that hide several operations, as those operations, so that each of them can be quantized.
- `weight_quantizers`: quantized weights: integer codes with their scales.
- `weight_sources`: where a layer's weight comes from while it is learned; otherwise it is decoded from codes.
"""
