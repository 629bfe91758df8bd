"""The tables of docs/guides/which-method.md: what to take when, with what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
Results = Sequence[dict[str, Any]]

METHODS = {"rtn": "`rtn`", "adaround": "`adaround`", "brecq": "`brecq`", "qdrop": "`qdrop`", "genie_m": "`genie_m`"}
KINDS = {"noise": "`noise`", "zeroq": "`zeroq`", "genie_d": "`genie_d`", "real": "real images"}
NETWORKS = {"mobilenetv2": "MobileNetV2", "efficientnet-lite0": "EfficientNet-Lite0"}
SMALL = "ResNet-20"
# The largest budget that was measured of the small network.
FULL = "cifar10-resnet20-1000"


class Measured:
    """Results of the benchmarks, by what was quantized how."""

    def __init__(self, zero_shot: Results, imagenet: Results) -> None:
        self._zero_shot = {(one["name"], one["kind"]): one for one in zero_shot}
        self._imagenet = {one["network"]: one for one in imagenet}

    def small(self, scheme: str, method: str, kind: str, name: str = "cifar10-resnet20") -> str:
        """Top-1 of the small network beside float, the mean over seeds; a dash without rows."""
        result = self._zero_shot.get((name, kind))
        rows = [] if result is None else result["rows"]
        found = [row["top1"] for row in rows if (row["scheme"], row["method"]) == (scheme, method)]
        return _lost(found, result["float"]["top1"]) if result else "-"

    def large(self, network: str, scheme: str, method: str, kind: str, label: str = "default") -> str:
        """The same of a network of ImageNet, with settings of a label."""
        result = self._imagenet[network]
        wanted = (label, kind, scheme, method)
        found = [
            row["top1"] for row in result["rows"] if wanted == (row["label"], row["data"], row["scheme"], row["method"])
        ]
        return _lost(found, result["float"]["top1"])

    def seconds(self, scheme: str, method: str) -> str:
        """Time to quantize the small network, without making images."""
        rows = self._zero_shot["cifar10-resnet20", "genie_d"]["rows"]
        found = [row["seconds"] for row in rows if (row["scheme"], row["method"]) == (scheme, method)]
        return f"{sum(found) / len(found):.0f}" if found else "-"


def images(measured: Measured, table: Table) -> str:
    """Kinds of images, with the same method: points of top-1 that are lost."""
    body = []
    for kind, title in KINDS.items():
        small = [measured.small(scheme, "genie_m", kind) for scheme in ("W4A4", "W2A4")]
        body.append([title, *small, *(measured.large(name, "W4A4", "genie_m", kind) for name in NETWORKS)])
    return table(["images", f"{SMALL} W4A4", f"{SMALL} W2A4", *(f"{name} W4A4" for name in NETWORKS.values())], body)


def methods(measured: Measured, table: Table) -> str:
    """Methods on images of `genie_d`: points of top-1 that are lost, and time."""
    body = []
    for method, title in METHODS.items():
        small = [measured.small(scheme, method, "genie_d") for scheme in ("W8A8", "W4A4", "W2A4")]
        large = [measured.large("mobilenetv2", scheme, method, "genie_d") for scheme in ("W8A8", "W4A8", "W4A4")]
        body.append([title, *small, *large, measured.seconds("W4A4", method)])
    header = [f"{SMALL} {scheme}" for scheme in ("W8A8", "W4A4", "W2A4")]
    header += [f"MobileNetV2 {scheme}" for scheme in ("W8A8", "W4A8", "W4A4")]
    return table(["method", *header, f"{SMALL} W4A4, s"], body)


def situations(measured: Measured, diffusion: Results, onnx: Results, table: Table) -> str:
    """What is at hand, what to take, and what it cost where it was measured."""
    rows = [
        (
            "a convolutional network, 8 bits",
            "`genie_d`, `rtn`; `bias_correction=true` if it has depthwise layers",
            _both(measured, "W8A8", "rtn"),
        ),
        ("the same, 4-bit weights, 8-bit activations", "`genie_d`, `genie_m`", _large(measured, "W4A8", "genie_m")),
        (
            "the same with depthwise layers",
            "`equalize=activations`, a higher rate of activations (`recipes/imagenet-mobilenetv2-w4a8.yaml`)",
            _large(measured, "W4A8", "genie_m", "equalized, activations learn faster"),
        ),
        ("4 bits for both", "`genie_d`, `genie_m`", _both(measured, "W4A4", "genie_m")),
        (
            "2-bit weights",
            "`genie_d`, 1,000 iterations or more; then [fine-tuning](fine-tuning.md)",
            f"{SMALL} {measured.small('W2A4', 'genie_m', 'genie_d', FULL)}",
        ),
        (
            "64 real images and more",
            "these (`--images FOLDER`)",
            f"W4A4: MobileNetV2 {measured.large('mobilenetv2', 'W4A4', 'genie_m', 'real')},"
            f" made ones {measured.large('mobilenetv2', 'W4A4', 'genie_m', 'genie_d')}",
        ),
        (
            "a text-to-image model that knows the classes",
            "`text_to_image`, `select`",
            "[tables](../results/generated-images.md)",
        ),
        (
            "a vision transformer",
            "`psaq_vit`, then `repq_vit` or `ptq4vit`",
            "[guide](transformers.md)",
        ),
        ("a diffusion model", "`self_sampling`, `q_diffusion`, `output_correction=true`", _diffusion(diffusion)),
        ("an integer runtime", "`--target ort-cpu`, `openvino`, `tensorrt`", _speed(onnx)),
    ]
    return table(["what you have, what you want", "take", "measured"], [list(row) for row in rows])


def _both(measured: Measured, scheme: str, method: str) -> str:
    return f"{SMALL} {measured.small(scheme, method, 'genie_d')}, {_large(measured, scheme, method)}"


def _large(measured: Measured, scheme: str, method: str, label: str = "default") -> str:
    found = {title: measured.large(name, scheme, method, "genie_d", label) for name, title in NETWORKS.items()}
    return ", ".join(f"{title} {lost}" for title, lost in found.items() if lost != "-")


def _diffusion(results: Results) -> str:
    """The Frechet distance beside that of the float pipeline, of the most finished rows."""
    found = {}
    for one in results:
        scheme, way, sampler = one["name"].split("--")
        relative = one["quality"]["relative"]
        if way == "full_corrected" and relative is not None:
            found[scheme] = f"{scheme} {relative['ratio']['value']:.2f} times float's ({sampler})"
    return "Frechet distance: " + ", ".join(found[scheme] for scheme in sorted(found, reverse=True))


def _speed(results: Results) -> str:
    """Float time over quantized time in ONNX Runtime: the slowest and the fastest network."""
    ratios = {
        one["network"]: one["milliseconds"]["float"] / one["milliseconds"]["quantized"]
        for one in results
        if one.get("milliseconds")
    }
    ends = [min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)]
    return "W8A8 in ONNX Runtime: " + " to ".join(f"{ratios[name]:.1f} times float's speed ({name})" for name in ends)


def _lost(found: Sequence[float], whole: float) -> str:
    """Points of top-1 that are lost, with their sign."""
    return f"{100 * (sum(found) / len(found) - whole):+.1f}".replace("-", "\u2212") if found else "-"
