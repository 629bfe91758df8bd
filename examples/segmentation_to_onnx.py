"""A segmentation network as an ONNX file of eight bits, in ONNX Runtime.

    python examples/segmentation_to_onnx.py

Needs `pip install 'synthquant[onnx]'`, and some minutes.
"""

import argparse

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import synthquant as sq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300, help="of training the network that is to be quantized")
parser.add_argument("--count", type=int, default=32, help="images that are made")
parser.add_argument("--iterations", type=int, default=100, help="for each image and each unit")
parser.add_argument("--out", default="segmentation.onnx", help="the file")
args = parser.parse_args()

# A small U-Net learns to find discs and squares in noise: three classes for each pixel. With a network of your own,
# such as `torchvision.models.segmentation.lraspp_mobilenet_v3_large(...)`, leave this part out.

SIZE = 48


def drawn(count: int) -> tuple[Tensor, Tensor]:
    """Pictures float `[N, 3, SIZE, SIZE]` in 0..1 and their classes int64 `[N, SIZE, SIZE]`."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    pictures, classes = 0.3 * torch.rand(count, 3, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for picture, known in zip(pictures, classes, strict=True):
        for kind in (1, 2):
            (y, x), radius = torch.randint(10, SIZE - 10, (2,)), torch.randint(5, 10, ())
            away = torch.stack([(row - y).abs(), (column - x).abs()]).float()
            inside = away.norm(dim=0) <= radius if kind == 1 else away.amax(0) <= radius
            picture[:, inside] += 0.2 + 0.5 * torch.rand(3, 1)
            known[inside] = kind
    return pictures.clamp(0, 1), classes


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution with batch norm."""
    layers = (nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two steps down and two up, with shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.deep = block(3, 16), block(16, 32, 2), block(32, 64, 2)
        self.middle, self.last = block(96, 32), block(48, 16)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each pixel, in a dictionary as torchvision's networks give them."""
        stem = self.stem(images)
        down = self.down(stem)
        middle = self.middle(torch.cat([nn.functional.interpolate(self.deep(down), scale_factor=2), down], 1))
        last = self.last(torch.cat([nn.functional.interpolate(middle, scale_factor=2), stem], 1))
        return {"out": self.head(last)}


torch.manual_seed(0)
module = UNet()
optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
for _ in range(args.steps):
    pictures, classes = drawn(16)
    loss = nn.functional.cross_entropy(module((pictures - 0.5) / 0.25)["out"], classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# A network that gives something else than logits has a task. `dense` is for maps: what is measured is the agreement of
# pixels and the signal-to-noise ratio, not accuracy.

model = sq.FloatModel.from_module(module, input_size=SIZE, mean=[0.5] * 3, std=[0.25] * 3, task="dense")

# `target` chooses the scheme that the runtime's integer kernels take, and what could not be exported is refused now,
# not after the work. Images are made from the network, as for a classifier.

images = sq.synthesize(model, count=args.count, method="genie_d", iterations=args.iterations)
quant_model = sq.quantize(model, images, target="ort-cpu", iterations=args.iterations)
print(quant_model)

# Any pictures tell how much of the float network's answer is left.

pictures, classes = drawn(64)
found = sq.evaluate(quant_model, pictures, progress=sq.Progress())
same = found["outputs"]["agreement"]["out"]
print(f"{found['sqnr']:.1f} dB, {same['pixels']:.2%} of pixels as in float, mIoU with float {same['miou']:.3f}")

# The file is run and compared with the network before it is left at its place. Then it needs ONNX Runtime alone.

quant_model.export(args.out, target="ort-cpu", images=pictures)
session = onnxruntime.InferenceSession(args.out, providers=["CPUExecutionProvider"])
(taken,) = session.get_inputs()
inputs = model.preprocess.normalize(pictures).numpy()
(logits,) = session.run(None, {taken.name: inputs})
right = {"in the file": logits.argmax(1) == classes.numpy()}
with torch.no_grad():
    right["in float"] = (module.eval()(torch.from_numpy(inputs))["out"].argmax(1) == classes).numpy()
print(", ".join(f"right pixels {name} {np.mean(hits):.2%}" for name, hits in right.items()))
