"""A network of your own, in memory: images made from it, four bits, saved and loaded again.

    python examples/own_network.py

Needs `pip install synthquant`, and some minutes.
"""

import argparse

import torch
from torch import nn

import synthquant as sq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pictures", type=int, default=5000, help="to train on and to measure on")
parser.add_argument("--steps", type=int, default=600, help="of training the network that is to be quantized")
parser.add_argument("--count", type=int, default=128, help="images that are made")
parser.add_argument("--iterations", type=int, default=300, help="for each image and each unit")
parser.add_argument("--out", default="own-network", help="folder of the quantized network")
args = parser.parse_args()

# First there must be a network. This small one learns from four fifths of the CIFAR-10 pictures that come with the
# package, and keeps the others to measure on; with a network of your own leave this part out.

torch.manual_seed(0)
pictures = sq.open_images("bundled/cifar10-test").subset(range(args.pictures))
pixels = torch.stack([pictures[index].image for index in range(len(pictures))])  # uint8 [N, 3, 32, 32]
labels = pictures.labels
train, test = slice(0, 4 * len(pictures) // 5), slice(4 * len(pictures) // 5, None)


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution with half the pixels."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


module = nn.Sequential(
    *(block(3, 32), block(32, 64), block(64, 128)),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
)
mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
normalized = sq.Preprocess(input_size=(32, 32), mean=mean, std=std).normalize(pixels[train] / 255)
optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=args.steps)
for _ in range(args.steps):
    batch = torch.randint(len(normalized), (128,))
    mirrored = normalized[batch].flip(3) if torch.rand(()) < 0.5 else normalized[batch]
    loss = nn.functional.cross_entropy(module(mirrored), labels[train][batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

# Here begins what you do with a trained network. A module does not say how pictures become its input, so you do: their
# size, and the mean and deviation that they were normalised with. The module is copied and stays as it is.

model = sq.FloatModel.from_module(module, input_size=32, mean=mean, std=std, class_names=pictures.manifest.class_names)

# The network remembers, in its batch norms, what its training data looked like. `genie_d` trains a generator until its
# images have these statistics. Nothing else is known of the data.

images = sq.synthesize(model, count=args.count, method="genie_d", iterations=args.iterations)

# Four bits for weights and for activations; `genie_m` learns step sizes and roundings block by block. In place of a
# scheme, `target="ort-cpu"` would choose what a runtime takes.

quant_model = sq.quantize(model, images, "W4A4", method="genie_m", iterations=args.iterations)
print(quant_model)

# Measure with data that has labels, here with what was kept back. Without labels the agreement with the float network
# is measured, on any pictures.

for name, network in (("float", model), ("quantized", quant_model)):
    row = sq.evaluate(network, (pixels[test], labels[test]), progress=sq.Progress())
    print(f"{name}: top-1 {row['top1']:.2%} of {row['count']} pictures")
print(f"agreement with float: {row['agreement']:.2%}, divergence {row['kl']:.4f}")

# What is saved are packed integers, their description and a model card. It is loaded with the architecture: a module of
# the same classes, whose weights do not matter.

quant_model.save(args.out)
loaded = sq.load(args.out, module)
some = model.preprocess.normalize(pixels[test][:8] / 255)
with torch.no_grad():
    print("loaded network gives the same:", torch.equal(loaded(some), quant_model(some)))
