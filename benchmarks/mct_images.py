"""Images and quantized networks of Sony's Model Compression Toolkit, for `beside_mct.py`.

Runs in an environment of its own, since the toolkit wants an older PyTorch:

    python3.11 -m venv MCT && MCT/bin/pip install torch==2.6.0 torchvision==0.21.0 safetensors model-compression-toolkit
    MCT/bin/python benchmarks/mct_images.py images --weights mobilenet_v2.safetensors --work FOLDER --iterations 100
    MCT/bin/python benchmarks/mct_images.py quantize --weights mobilenet_v2.safetensors --work FOLDER --data real

`images` writes FOLDER/mct.npy (uint8 `[N, 3, 224, 224]`) and what it cost, `quantize` runs the toolkit's own
quantization with its default target on `FOLDER/DATA.npy` (normalised, or uint8) and writes the logits of
FOLDER/test.npy, which `beside_mct.py` makes. Nothing of synthquant is imported here.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_compression_toolkit as mct
import numpy as np
import torch
from model_compression_toolkit.core.common.network_editors import NodeTypeFilter
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
BATCH = 32


def processor_seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def network(weights: Path) -> nn.Module:
    """torchvision's MobileNetV2 with its weights from a file."""
    model = mobilenet_v2()
    model.load_state_dict(load_file(weights))
    return model.eval()


def make_images(args: argparse.Namespace) -> dict[str, Any]:
    """The toolkit's data generation with its defaults but for iterations and batch."""
    config = mct.data_generation.get_pytorch_data_generation_config(n_iter=args.iterations, data_gen_batch_size=BATCH)
    found = mct.data_generation.pytorch_data_generation_experimental(
        network(args.weights), n_images=args.count, output_image_size=224, data_generation_config=config
    )
    images = torch.cat([part if part.ndim == 4 else part[None] for part in found]).detach().float().cpu()
    pixels = (images * STD + MEAN).clamp(0, 1).mul(255).round().to(torch.uint8)
    np.save(args.work / "mct.npy", pixels.numpy())
    return {
        "iterations": args.iterations,
        "count": len(pixels),
        "clipped": float((images * STD + MEAN > 1.001).float().mean()),
    }


def normalised(path: Path) -> Tensor:
    """Images of a file as the network reads them."""
    images = torch.from_numpy(np.load(path))
    return (images.float() / 255 - MEAN) / STD if images.dtype == torch.uint8 else images


def core_config(weights: int, activations: int) -> mct.core.CoreConfig:
    """The toolkit's defaults, at other bits where they are not eight."""
    bits = mct.core.BitWidthConfig()
    layers = [NodeTypeFilter(nn.Conv2d), NodeTypeFilter(nn.Linear)]
    if weights != 8:
        bits.set_manual_weights_bit_width(layers, weights, ["weight"] * len(layers))
    if activations != 8:
        kinds = (nn.Conv2d, nn.Linear, nn.ReLU6)
        bits.set_manual_activation_bit_width([NodeTypeFilter(kind) for kind in kinds], activations)
    return mct.core.CoreConfig(bit_width_config=bits)


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and run on the test images."""
    inputs = normalised(args.work / f"{args.data}.npy")

    def batches() -> Iterator[list[Tensor]]:
        for part in inputs.split(BATCH):
            yield [part]

    weights, activations = args.bits
    options = {"core_config": core_config(weights, activations)}
    if args.epochs:
        config = mct.gptq.get_pytorch_gptq_config(
            n_epochs=args.epochs, use_hessian_based_weights=False, use_hessian_sample_attention=False
        )
        model, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            network(args.weights), batches, gptq_config=config, **options
        )
    else:
        model, _ = mct.ptq.pytorch_post_training_quantization(network(args.weights), batches, **options)
    cost = processor_seconds()
    model.eval()
    with torch.no_grad():
        test = np.load(args.work / "test.npy", mmap_mode="r")
        logits = torch.cat([model(torch.from_numpy(part.copy())) for part in np.array_split(test, 14)])
    name = f"{'gptq' if args.epochs else 'ptq'}-W{weights}A{activations}-{args.data}"
    np.save(args.work / f"logits-{name}.npy", logits.numpy())
    return {"name": name, "epochs": args.epochs, "quantizing_seconds": round(cost, 1)}


def main() -> None:
    """Do one of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "quantize"])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--data", default="mct", help="FOLDER/DATA.npy is quantized with")
    parser.add_argument("--bits", type=int, nargs=2, default=[8, 8], help="of weights and of activations")
    parser.add_argument(
        "--epochs", type=int, default=0, help="of the toolkit's gradient-based quantization; 0: without"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    done = make_images(args) if args.what == "images" else quantize(args)
    done |= {
        "processor_seconds": round(processor_seconds(), 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "toolkit": mct.__version__,
        "torch": torch.__version__,
    }
    name = "mct" if args.what == "images" else f"logits-{done['name']}"
    (args.work / f"{name}.json").write_text(json.dumps(done, indent=1))
    print(done)


if __name__ == "__main__":
    main()
