"""What a runtime takes: how numbers are stored for it, and which schemes it can express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from synthquant.core.errors import UnknownNameError
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS
from synthquant.nn.scheme import QuantArgs

Container = Literal["uint8", "int8"]


@dataclass(frozen=True)
class Preset:
    """How a quantized network is written for one kind of runtime.

    Attributes:
        name: as `--preset` takes it.
        purpose: where it is meant to run, in one line.
        activations: type of activation codes of at most 8 bits; `int8` also means that their zero point is 0.
        exact_weights: keep every grid as it is, in wider containers where needed; otherwise weights must be int8 with
            zero point 0, one scale for each output channel or tensor, which is what integer kernels take.
        bias: `accumulator`: int32 at the scale of the integer sums, so that it is added to them; `exact`: int32 at
            scales that lose no digit, for runtimes that compute in float; `float`: as it is.
        wide_activations: takes activations of 16 bits.
        packed_bits: bits of weights that are packed for weight-only linear layers; none: every weight has its own byte.
        moves_codes: whether reshaping and the like is done on codes.
        runs_integers: whether integer kernels are the point; a scheme without any then is refused.
    """

    name: str
    purpose: str
    activations: Container = "uint8"
    exact_weights: bool = False
    bias: Literal["accumulator", "exact", "float"] = "accumulator"
    wide_activations: bool = False
    packed_bits: int | None = None
    moves_codes: bool = False
    runs_integers: bool = True

    def takes(self, kind: str) -> bool:
        """Whether activation quantizers of this kind can be written: integer kernels know affine ones only.

        Raises `UnknownNameError` if no kind has that name.
        """
        return QUANTIZER_KINDS.get(kind).affine or not self.runs_integers

    def holds_activations(self, args: QuantArgs) -> bool:
        """Whether the container of codes holds an affine grid of up to 8 bits, whatever its range turns out to be."""
        return self.activations == "uint8" or args.num_bits < 8 or (args.symmetric and args.signed)

    def holds_weights(self, args: QuantArgs) -> bool:
        """Whether a weight's codes fit, whatever its range: around zero, for a symmetric one is in the middle."""
        return self.exact_weights or args.symmetric

    @property
    def scheme(self) -> dict[str, Any]:
        """Fields of a scheme, as `QuantScheme.parse` takes them, with which every range fits."""
        fields: dict[str, Any] = {"deploy": "full"} if self.runs_integers else {}
        fields |= {} if self.exact_weights else {"weights": {"symmetric": True}}
        return fields | (
            {"input_activations": {"symmetric": True, "signed": True}} if self.activations == "int8" else {}
        )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("ort-cpu", "ONNX Runtime on CPUs: uint8 activations, int8 weights", moves_codes=True),
        Preset(
            "ort-cpu-w4",
            "as ort-cpu, with 4-bit weights packed for weight-only linear layers",
            packed_bits=4,
            moves_codes=True,
        ),
        Preset("tensorrt", "TensorRT: int8 with zero point 0 everywhere", activations="int8", bias="float"),
        Preset("openvino", "OpenVINO on CPUs and GPUs: uint8 activations, int8 weights"),
        Preset(
            "simulate",
            "any scheme, exactly: integers in files, float arithmetic in the runtime",
            exact_weights=True,
            bias="exact",
            wide_activations=True,
            runs_integers=False,
        ),
    )
}
"""All presets by name."""


def find_preset(name: str) -> Preset:
    """Return the preset called `name`; raises `UnknownNameError` with a suggestion."""
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return PRESETS[name]
