"""Exported W8A8 networks in ONNX Runtime: layers on integers, agreement, size, and speed beside float and a peer.

    python benchmarks/onnx_networks.py --data path/to/imagenet/images \
        --weights timm/tf_efficientnet_lite0=path/to/tf_efficientnet_lite0.safetensors [--timed] [--only vit_tiny]

Writes results/onnx/NETWORK.json. Networks without weights at hand are random: batch norms then take their statistics
and the last layer is fitted to the images, so that logits differ between images; their agreement is a check of
arithmetic, not of accuracy. The quantized network in double precision is the control: rounding to a grid turns a
difference in the last digit of a sum into a whole step, and each layer makes more of them. With --timed, latency at
batch 1 is measured beside the float export and beside ONNX Runtime's own `quantize_static` (same images, uint8
activations, int8 weights per channel), the three in turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from runtime_quantizer import Network, quantize_file_with_runtime
from synthquant.core.cpu import has_vnni
from synthquant.core.files import write_json
from synthquant.core.modules import hooked
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches, model_inputs
from synthquant.data.sources import open_images
from synthquant.export.compare import difference
from synthquant.export.onnx import Onnx
from synthquant.export.onnx.layers import integer_coverage
from synthquant.export.onnx.runtime import ort_network, session
from synthquant.export.onnx.speed import export_float, in_turns
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import Rtn

ROOT = Path(__file__).parent.parent
SCHEME = {"preset": "W8A8", "weights": {"symmetric": True}, "deploy": "full"}
NETWORKS = (
    *("torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/regnet_y_400mf", "timm/tf_efficientnet_lite0"),
    *("timm/efficientnet_b0", "timm/convnext_atto", "timm/vit_tiny_patch16_224", "timm/deit_tiny_patch16_224"),
    *("timm/swin_tiny_patch4_window7_224", "zoo/cifar10-resnet20", f"{ROOT}/benchmarks/unet.py:build"),
)
CALIBRATION = 64
OWN_SIZES = {"unet.py": {"input_size": 64, "mean": (0.5,) * 3, "std": (0.25,) * 3}}


def prepared(source: str, weights: str | None, data: ImageSet) -> FloatModel:
    """The network with its weights, or a random one whose statistics and last layer fit the images."""
    file = source.rpartition("/")[2].partition(":")[0]
    known = source.startswith("zoo/")
    model = open_model(source, weights=weights, pretrained=known or weights is not None, **OWN_SIZES.get(file, {}))
    if known or weights is not None:
        return model
    module = copy.deepcopy(model.module)
    torch.manual_seed(0)
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        draw_weights(module)
    inputs = model_inputs(data, model.preprocess, spread(len(data), 32))
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        module(inputs)
    module.eval()
    fitted = replace(model, module=module)
    fit_head(fitted, data)
    return fitted


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Give layers normal weights of variance 1 / fan-in.

    Transformers begin with smaller ones, by which all images look alike: a head that tells them apart blows up the
    last digits of its input.
    """
    for part in module.modules():
        if isinstance(part, QUANTIZABLE):
            part.weight.normal_(std=part.weight[0].numel() ** -0.5)


@torch.no_grad()
def fit_head(model: FloatModel, data: ImageSet) -> None:
    """Let the last linear layer, if it is the last layer, tell the images apart: ridge regression on their number."""
    last = [part for part in model.module.modules() if isinstance(part, QUANTIZABLE)][-1]
    if not isinstance(last, nn.Linear):
        return
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0])

    with hooked(pre=[(last, keep)]):
        for batch in input_batches(data, model.preprocess, 32):
            model.module(batch.inputs)
    features = torch.cat(read).double()
    targets = torch.eye(last.out_features, dtype=torch.float64)[torch.arange(len(features)) % last.out_features] * 10
    centre = features.mean(0)
    centred = features - centre
    gram = centred.T @ centred
    gram += gram.diagonal().mean() * 1e-2 * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (targets - targets.mean(0)))
    last.weight.copy_(weight.T)
    if last.bias is not None:
        last.bias.copy_(targets.mean(0) - centre @ weight)


def spread(length: int, count: int) -> list[int]:
    """Evenly spaced positions."""
    count = min(count, length)
    return [index * length // count for index in range(count)]


def agreement(path: Path, model: QuantModel, data: ImageSet, indices: list[int]) -> dict[str, Any]:
    """Logits of each runtime, and of torch in double precision, beside those of the quantized network."""
    networks: dict[str, Network] = {runtime: Onnx.open(path, runtime).run for runtime in Onnx.runtimes}
    double = copy.deepcopy(model.module).double()
    networks["float64"] = lambda inputs: double(inputs.double()).float()
    reference: list[Tensor] = []
    floats: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in networks}
    with torch.no_grad():
        for batch in input_batches(data, model.float_model.preprocess, 16, indices):
            reference.append(model(batch.inputs))
            floats.append(model.float_model.module(batch.inputs))
            for name, network in networks.items():
                parts[name].append(network(batch.inputs))
    expected = torch.cat(reference)
    found = {name: vars(difference(torch.cat(values), expected)) for name, values in parts.items()}
    return {"images": len(expected), "float": vars(difference(torch.cat(floats), expected))} | found


def timed(files: dict[str, Path], inputs: Tensor, threads: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of a call of each file."""
    networks = {name: ort_network(session(path, threads=threads)) for name, path in files.items()}
    times = in_turns(networks, inputs, seconds)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def measure(source: str, weights: str | None, data: ImageSet, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one network."""
    model = prepared(source, weights, data)
    quant_model = QuantModel.build(model, QuantScheme.parse(SCHEME))
    calibration = spread(len(data), CALIBRATION)
    Rtn().apply(quant_model, data.subset(torch.tensor(calibration)), Rng(0))
    others = [index for index in range(len(data)) if index not in set(calibration)]
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = Onnx().export(quant_model, folder / "quantized.onnx")
        reference = export_float(model, folder / "float.onnx")
        coverage = integer_coverage(path)
        result: dict[str, Any] = {
            "network": source.rpartition("/")[2].partition(":")[0],
            "weights": "trained" if weights is not None or source.startswith("zoo/") else "random",
            "scheme": quant_model.scheme.describe(),
            "layers": {"integer": coverage.integer, "floating": coverage.floating, "operators": coverage.operators},
            "products": {"integer": coverage.products_integer, "floating": coverage.products_floating},
            "agreement": agreement(path, quant_model, data, others[: arguments.images]),
            "bytes": {"float": reference.stat().st_size, "quantized": path.stat().st_size},
            "environment": environment() | {"vnni": str(has_vnni())},
        }
        if arguments.timed:
            files = {"float": reference, "quantized": path}
            inputs = model_inputs(data, model.preprocess, calibration)
            files["peer"] = quantize_file_with_runtime(reference, inputs, folder / "peer.onnx", "minmax")
            result["milliseconds"] = timed(files, inputs[:1], arguments.threads, arguments.seconds)
            result["threads"] = arguments.threads
    return result


def main() -> None:
    """Measure the networks asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images, in any form that synthquant takes")
    parser.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--only", action="append", default=[], help="part of a network's name")
    parser.add_argument("--images", type=int, default=400, help="images to compare logits on")
    parser.add_argument(
        "--timed", action="store_true", help="measure latency too; needs a machine with nothing else on it"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each file")
    arguments = parser.parse_args()
    out = ROOT / "results" / "onnx"
    out.mkdir(parents=True, exist_ok=True)
    weights = dict(text.split("=", 1) for text in arguments.weights)
    for source in NETWORKS:
        if arguments.only and not any(part in source for part in arguments.only):
            continue
        data = open_images("bundled/cifar10-test" if source.startswith("zoo/") else arguments.data)
        result = measure(source, weights.get(source), data, arguments)
        path = out / f"{result['network']}.json"
        if not arguments.timed and path.exists():  # what was timed stays until it is timed again
            former = json.loads(path.read_text())
            result |= {key: former[key] for key in ("milliseconds", "threads") if key in former}
        write_json(path, result)
        print(result["network"], result["layers"], result["agreement"], result.get("milliseconds"), flush=True)


if __name__ == "__main__":
    main()
