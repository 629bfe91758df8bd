"""Float networks: opening them, following tensors through them, batch norm, and the units they fall into.

- `attention`: what the attentions of a network compute, and the patches of an image in it.
- `batch_norm`: batch norms: what they remember, and folding them into the layer before.
- `batch_norm_loss`: statistics of what enters a batch norm, with gradients, and their distance to what it remembers.
- `blocks`: reconstruction units: which layers belong together.
- `channels`: which channels of which tensors can be scaled together, so that a network computes the same.
- `class_labels`: which class of a network each label of a data set means.
- `float_model`: the full-precision network as every stage sees it.
- `held_out`: samples held out of training, by which a state of a network is chosen.
- `imagenet`: what the 1,000 classes of ImageNet are called, from timm's copy of WordNet.
- `in_memory`: a `FloatModel` from a module that a program has in memory.
- `libraries`: networks of timm, torchvision and transformers, the door to these.
- `open`: from the name of a model to a `FloatModel`.
- `opened`: what an opener of networks returns, and how it says that it could not.
- `operation_names`: what an operation is called: its module, its function and its number there.
- `patch_similarity`: how diverse the patches of an image look to a vision transformer.
- `products`: every matrix product of a forward pass.
- `samples`: what a network is calibrated and measured with: batches of inputs, wherever they come from.
- `signature`: what a network, or a part of it, takes and gives: inputs, tensor specs, trees of tensors.
- `trace`: which tensor flows where: one forward pass of an eager network, watched from outside.
- `user_file`: a network from a function in a user's own Python file.
- `watched_batch_norms`: a network whose batch norms say what enters them, and how far that is from what they remember.
- `weights`: weights from a file into a network.
- `zoo/`: small checkpoints that come with the package, so that everything can be tried without a download.
"""
