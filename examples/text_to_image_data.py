"""Images of a text-to-image model as data: drawn from class names, the best of them chosen.

    python examples/text_to_image_data.py

Needs `pip install 'synthquant[diffusion]'`, and some minutes; larger generators want a GPU.
"""

import argparse

import synthquant as sq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--count", type=int, default=64, help="images that are drawn")
parser.add_argument("--steps", type=int, default=10, help="of the sampler, for each image")
parser.add_argument("--iterations", type=int, default=100, help="for each unit")
parser.add_argument("--limit", type=int, default=500, help="pictures to measure on")
args = parser.parse_args()

# The classifier, and a generator that knows its classes. Both are bundled, and were trained on different halves of
# CIFAR-10. Elsewhere the generator is Stable Diffusion or any other pipeline of diffusers, by its name or folder.

model = sq.open_model("zoo/cifar10-resnet20-half")
generator = "zoo/cifar10-text2image"

# `text_to_image` writes a prompt for each image from a class name and a template; with a `folder` the images are kept,
# and the same call goes on where it was interrupted.

images = sq.synthesize(
    model, args.count, "text_to_image", generator=generator, classes="cifar10", scheduler="dpm++", steps=args.steps
)
print("\n".join(f"{images.labels[index]}: {images.column('prompt')[index]}" for index in range(3)))

# Not every drawing resembles what the network was trained on. `energy` keeps those that it recognises, `bn_sensitivity`
# those that do not pull the statistics of its batch norms away; each keeps seven of ten.

filters = [sq.Energy(keep=0.7), sq.BatchNormSensitivity(keep=0.7)]
chosen = sq.run_filters(filters, images, model, sq.Rng(0)).kept
print(f"{len(chosen)} of {len(images)} are kept")

# The float network's own answers are the target of quantization, so the labels are not needed again.

pictures = sq.open_images("bundled/cifar10-test").subset(range(args.limit))
for name, data in (("drawn", images), ("chosen", chosen)):
    quant_model = sq.quantize(model, data, "W4A4", iterations=args.iterations, progress=sq.Progress())
    row = sq.evaluate(quant_model, pictures, progress=sq.Progress())
    print(f"{name}: top-1 {row['top1']:.2%}, agreement with float {row['agreement']:.2%} of {row['count']} pictures")
