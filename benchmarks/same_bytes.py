"""Whether two versions of the code make the same bytes: hashes of all that small recipes leave, and what differs.

    python benchmarks/same_bytes.py --out before.json
    python benchmarks/same_bytes.py --out after.json --against before.json [--only vit] [--weights FILE]

Hashed are pixels of images, units of reconstruction, checkpoints, logits, and initialisers, attributes and wiring of
ONNX files. A hash that differs makes the second call fail. Metadata are kept as they are; only fields that name a
version may differ, or a setting appear, and those that do are listed. Both calls must run on one machine: kernels
differ between machines. Without --weights (safetensors) EfficientNet-Lite0 is random, its batch norms have seen noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from synthquant.api import FloatModel, ImageSet, Onnx, Recipe, open_model
from synthquant.core.record import environment
from synthquant.export.checkpoint import save_checkpoint
from synthquant.make import quantize, select, synthesize

RESNET, MOBILENET, VIT = (f"zoo/cifar10-{name}" for name in ("resnet20", "mobilenetv2", "vit"))
LITE = "timm/tf_efficientnet_lite0"
LITE_SIZE = 64

NOISE = {"method": "noise", "count": 10, "batch_size": 4}
GENIE_D = {"method": "genie_d", "count": 10, "batch_size": 6, "iterations": 8}
ZEROQ = {"method": "zeroq", "count": 10, "batch_size": 6, "iterations": 8}
DRAWN = {"method": "text_to_image", "count": 4, "batch_size": 3, "generator": "zoo/cifar10-text2image", "steps": 2}
LEARN: dict[str, Any] = {"iterations": 12, "batch_size": 4, "calibration_images": 8}
INTEGERS: dict[str, Any] = {"preset": "W8A8", "weights": {"symmetric": True}, "deploy": "full"}
GROUPS: dict[str, Any] = {
    "preset": "W4A8",
    "weights": {"strategy": "group", "group_size": 8},
    "deploy": "full",
    "overrides": {"re:(conv1|fc)$": {"weights": {"num_bits": 8, "strategy": "channel", "group_size": None}}},
}

# Name -> sections of a recipe, and the presets of ONNX files that its checkpoint is written as.
RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "resnet-rtn": (
        {"model": RESNET, "images": GENIE_D, "quantize": {"method": "rtn", "scheme": "W4A4"}},
        ("simulate",),
    ),
    "resnet-adaround": (
        {"model": RESNET, "images": ZEROQ, "quantize": {"method": "adaround", "scheme": "W3A16", **LEARN}},
        ("simulate",),
    ),
    "resnet-genie_m": (
        {
            "model": RESNET,
            "images": {**GENIE_D, "statistics": "image", "swing": False},
            "select": ["energy:0.8", "bn_learned:0.8", "bn_sensitivity:0.8"],
            "quantize": {"method": "genie_m", "scheme": "W2A4", **LEARN},
        },
        ("simulate",),
    ),
    "resnet-brecq-fisher": (
        {
            "model": RESNET,
            "images": NOISE,
            "quantize": {
                "method": "brecq",
                "scheme": {"preset": "W4A4", "ends": "same", "ignore": ["layer1.0.conv1"]},
                "fisher": "diagonal",
                "activation_iterations": 6,
                **LEARN,
            },
        },
        (),
    ),
    "resnet-qdrop-integers": (
        {"model": RESNET, "images": ZEROQ, "quantize": {"method": "qdrop", "scheme": INTEGERS, **LEARN}},
        ("ort-cpu", "openvino"),
    ),
    "resnet-drawn": (
        {"model": RESNET, "images": DRAWN, "quantize": {"method": "rtn", "scheme": GROUPS}},
        (),
    ),
    "mobilenet-remedies-integers": (
        {
            "model": MOBILENET,
            "images": GENIE_D,
            "select": ["bn_distance:0.8"],
            "quantize": {"method": "rtn", "scheme": INTEGERS, "equalize": "weights", "bias_correction": True},
        },
        ("ort-cpu",),
    ),
    "mobilenet-brecq-remedies": (
        {
            "model": MOBILENET,
            "images": NOISE,
            "quantize": {
                "method": "brecq",
                "scheme": {"preset": "W4A8", "weights": {"strategy": "tensor"}},
                "equalize": "activations",
                "bias_correction": True,
                "granularity": "layer",
                "activation_iterations": 4,
                **LEARN,
                "iterations": 6,
            },
        },
        ("simulate",),
    ),
    "mobilenet-genie_m-full": (
        {
            "model": MOBILENET,
            "images": NOISE,
            "quantize": {"method": "genie_m", "scheme": {"preset": "W4A8", "deploy": "full"}, **LEARN},
        },
        ("simulate",),
    ),
    "vit-rtn-integers": (
        {
            "model": VIT,
            "images": NOISE,
            "select": ["patch_similarity:0.8"],
            "quantize": {"method": "rtn", "scheme": INTEGERS},
        },
        ("ort-cpu",),
    ),
    "vit-genie_m": (
        {"model": VIT, "images": NOISE, "quantize": {"method": "genie_m", "scheme": "W4A4", **LEARN}},
        ("simulate",),
    ),
    "vit-adaround-full": (
        {
            "model": VIT,
            "images": NOISE,
            "quantize": {
                "method": "adaround",
                "scheme": INTEGERS,
                **LEARN,
                "iterations": 4,
            },
        },
        (),
    ),
    "lite-remedies-integers": (
        {
            "model": LITE,
            "images": {**GENIE_D, "count": 5, "batch_size": 3, "iterations": 4},
            "quantize": {"method": "rtn", "scheme": INTEGERS, "equalize": "weights", "bias_correction": True},
        },
        ("ort-cpu",),
    ),
    "lite-qdrop": (
        {
            "model": LITE,
            "images": {**NOISE, "count": 5},
            "quantize": {"method": "qdrop", "scheme": "W4A4", **LEARN, "iterations": 3, "batch_size": 2},
        },
        ("simulate",),
    ),
}

# Metadata that say which release or format wrote a file: these may differ.
VERSION = re.compile(r"(^|[._])versions?\b|version$")
# A setting that a method did not have before says nothing about its former ones: those that appear are listed too.
SETTING = re.compile(r"\.settings\.")
# Metadata that hold a hash of metadata or of a file with them, or the name of a temporary folder.
DEPENDENT = re.compile(r"(^|\.)sha256$|\.parts\b|weights$")


def main() -> int:
    """Make the hashes; with `--against`, compare them and return 1 if anything but a version differs."""
    args = parsed()
    torch.set_num_threads(1)
    known = json.loads(args.against.read_text()) if args.against else None
    found: dict[str, Any] = {"environment": environment("cpu"), "weights": args.weights is not None, "recipes": {}}
    with TemporaryDirectory() as folder:
        models = Networks(args.weights, Path(folder))
        for name, (values, presets) in RECIPES.items():
            if args.only and not any(text in name for text in args.only):
                continue
            began = time.process_time()
            found["recipes"][name] = made(Recipe.parse(values), presets, models, Path(folder) / name)
            print(f"{name}: {time.process_time() - began:.0f} s", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if known is None else report(known, found)


class Networks:
    """The networks, opened when asked for."""

    def __init__(self, weights: Path | None, folder: Path) -> None:
        self._weights, self._folder = weights, folder

    def open(self, source: str) -> FloatModel:
        """Return the network, the same on every call."""
        if source != LITE:
            return open_model(source)
        return open_model(LITE, weights=self._weights or self._random(), input_size=LITE_SIZE)

    def _random(self) -> Path:
        """Weights of a random network whose batch norms have seen noise."""
        path = self._folder / "random.safetensors"
        if not path.exists():
            module = open_model(LITE, pretrained=False, input_size=LITE_SIZE).module.train()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for _ in range(20):
                    module(torch.randn(8, 3, LITE_SIZE, LITE_SIZE, generator=generator))
            save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
        return path


def made(recipe: Recipe, presets: tuple[str, ...], models: Networks, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the stages of `recipe` in `folder`: hashes by what and name, and `metadata`."""
    model = models.open(recipe.model.source)
    images = synthesize(model, recipe.images, recipe.seed, folder / "images")
    found: dict[str, dict[str, Any]] = {"images": pixels(images)}
    manifests = ["images"]
    if recipe.select is not None:
        images = select(images, model, recipe.select, recipe.seed, folder / "selected")
        found["selected"] = pixels(images)
        manifests.append("selected")
    quant_model, _ = quantize(model, recipe.quantize, images, recipe.seed, workdir=folder / "work")
    files = sorted((folder / "work").rglob("*.safetensors"))
    found["units"] = {
        f"{file.relative_to(folder / 'work')} {name}": hashed(tensor)
        for file in files
        for name, tensor in load_file(file).items()
    }
    save_checkpoint(quant_model, folder / "model")
    tensors = load_file(folder / "model" / "model.safetensors")
    found["checkpoint"] = {name: hashed(tensor) for name, tensor in tensors.items()}
    with torch.no_grad():
        pool = [images[index].image for index in range(len(images))]
        found["logits"] = {"all": hashed(quant_model(model.preprocess(pool, images.manifest.framing)))}
    texts = {name: json.loads((folder / name / "manifest.json").read_text()) for name in manifests}
    texts["checkpoint"] = json.loads((folder / "model" / "quant_config.json").read_text())
    for preset in presets:
        file = onnx.load(str(Onnx(preset=preset).export(quant_model, folder / f"{preset}.onnx")))
        found[f"onnx {preset}"] = dict(graph_items(file.graph))
        texts[f"onnx {preset}"] = {entry.key: plain(entry.value) for entry in file.metadata_props}
    found["metadata"] = {key: value for key, value in flat(texts) if not DEPENDENT.search(key)}
    return found


def pixels(images: ImageSet) -> dict[str, str]:
    """Hashes of each image, of the labels and of the columns."""
    items = {f"image {index}": hashed(images[index].image) for index in range(len(images))}
    if images.labels is not None:
        items["labels"] = hashed(images.labels)
    columns = [images[index].columns for index in range(len(images))]
    return items | {"columns": hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()}


def graph_items(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """Hashes of initialisers by name, and of each node's type, attributes and wiring by its position."""
    for tensor in graph.initializer:
        header = f"{tensor.data_type} {list(tensor.dims)}".encode()
        yield tensor.name, hashlib.sha256(header + onnx.numpy_helper.to_array(tensor).tobytes()).hexdigest()
    for index, node in enumerate(graph.node):
        own = onnx.NodeProto(op_type=node.op_type, domain=node.domain, input=node.input, output=node.output)
        own.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
        yield f"node {index} {node.op_type}", hashlib.sha256(own.SerializeToString(deterministic=True)).hexdigest()


def hashed(tensor: Tensor) -> str:
    """SHA-256 of type, shape and values."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(text: str) -> Any:
    """JSON where it is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and lists as dotted names and values."""
    if isinstance(value, Mapping | list) and value:
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flat(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def report(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs; 1 if anything does that is not a version."""
    for key in ("environment", "weights"):
        for name in differing(dict(flat({key: before[key]})), dict(flat({key: after[key]}))):
            if "version" in name or "processor" in name or key == "weights":
                print(f"note: {name} is not what it was; kernels may differ")
    failed = compared = 0
    for recipe, kinds in after["recipes"].items():
        known = before["recipes"].get(recipe)
        if known is None:
            print(f"{recipe}: not made before")
            failed += 1
            continue
        for kind in sorted({*known, *kinds}):
            was, now = known.get(kind, {}), kinds.get(kind, {})
            names = differing(was, now)
            if kind == "metadata":
                names = [name for name in names if not DEPENDENT.search(name)]
            listed = {name: expected(name, was) for name in names if kind == "metadata" and expected(name, was)}
            others = [name for name in names if name not in listed]
            compared += len({*was, *now})
            failed += len(others)
            for name, reason in listed.items():
                print(f"{recipe}: {reason} {name}: {was.get(name)!r} -> {now.get(name)!r}")
            if others:
                print(f"{recipe}: {kind}: {len(others)} of {len({*was, *now})} differ: {', '.join(others[:8])}")
                if kind == "metadata":
                    print(*(f"    {name}: {was.get(name)!r} -> {now.get(name)!r}" for name in others[:8]), sep="\n")
    print(f"{compared} compared in {len(after['recipes'])} recipes, {failed} differ" if failed else
          f"{compared} compared in {len(after['recipes'])} recipes, all equal")  # fmt: skip
    return 1 if failed else 0


def expected(name: str, was: Mapping[str, Any]) -> str | None:
    """Why a field of metadata may differ; none if it may not."""
    if VERSION.search(name):
        return "version"
    return "new setting" if SETTING.search(name) and name not in was else None


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, or that only one side has."""
    missing = object()
    return [name for name in dict.fromkeys([*was, *now]) if was.get(name, missing) != now.get(name, missing)]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the hashes go")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="hashes of a former call, to compare with")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="recipes whose name holds one of these")
    parser.add_argument("--weights", type=Path, help="weights of EfficientNet-Lite0")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
