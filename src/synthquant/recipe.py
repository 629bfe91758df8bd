"""A recipe says everything about a run: equal recipes give equal runs.

    version: 1
    model: {source: timm/resnet18.a1_in1k}
    images: {method: genie_d, count: 1024, iterations: 4000}
    select: [energy:0.7, bn_sensitivity:0.7]
    quantize: {method: genie_m, scheme: W4A4, iterations: 20000}
    evaluate: {data: path/to/labelled/images}
    seed: 0

The fields of the chosen method stand in its section beside `method`. `images: {source: PATH}` uses images that exist.
`select` may be left out; each of its filters is `METHOD:KEEP` or a mapping `{method: METHOD, keep: KEEP, ...}`.
A path is looked for beside the recipe's file, then in the working directory; one of `--set` in that alone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import Field, model_validator

from synthquant.core.beside import paths_beside
from synthquant.core.errors import RecipeError, SchemeError
from synthquant.core.method_settings import build_method, require_mapping, split_section
from synthquant.core.overrides import apply_overrides
from synthquant.core.plain_yaml import LONGEST, parse_yaml
from synthquant.core.record import RunRecord
from synthquant.core.settings import LARGEST_INT, Settings, is_unset, parse_settings
from synthquant.data.codec import MAX_PIXELS, MOST_PIXELS
from synthquant.data.image_set import ImageSet
from synthquant.diffusion.trajectory import Trajectory, open_calibration
from synthquant.evaluate.section import EvaluateSection
from synthquant.methods import (
    FINE_TUNERS,
    QUANTIZERS,
    SELECTORS,
    SYNTHESIZERS,
    Equalize,
    FineTuner,
    MemoryBudget,
    QuantStep,
    Selector,
    Synthesizer,
    is_generating,
)
from synthquant.models.float_model import ModelSource
from synthquant.nn.scheme import QuantScheme
from synthquant.select.sequence import require_enough
from synthquant.stages import STAGES
from synthquant.targets import scheme_for


class SynthesizeSection(Settings):
    """Images made from the network."""

    method: str
    """Registered name of a synthesis method."""
    count: int = Field(default=1024, ge=1, le=10**9)
    """How many images to make."""
    settings: dict[str, Any]
    """All fields of the method; written beside `method` in a recipe."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> SynthesizeSection:
        """Return the section that `method`, `count` and the fields of the method make; raises as `Recipe.parse`."""
        own, settings = split_section(values, cls, SYNTHESIZERS, "images", where)
        return parse_settings(cls, {**own, "settings": settings}, f"{where}: images")

    def build(self) -> Synthesizer:
        """Return the method with its settings."""
        return build_method(SYNTHESIZERS, self.method, self.settings, "images")


class SourceSection(Settings):
    """Images that exist."""

    source: str = Field(min_length=1)
    """An image set folder, a folder of class folders, a Parquet file or folder, a `datasets` name, or for a diffusion
    pipeline the folder of a trajectory that self_sampling made."""
    count: int | None = Field(default=None, ge=1)
    """How many of them to use, drawn at random, of a trajectory the first ones; none: all."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MOST_PIXELS)
    """Larger images are set aside before they are decoded, as mistakes or attacks on the memory."""

    def open(self) -> ImageSet | Trajectory:
        """Return all of the images; raises as `open_calibration`."""
        return open_calibration(self.source, max_pixels=self.max_pixels)


class FilterSection(Settings):
    """One filter of images."""

    method: str
    """Registered name of a selection method."""
    settings: dict[str, Any]
    """All fields of the method; written beside `method` in a recipe."""

    @classmethod
    def parse(cls, values: object, where: str, name: str = "select") -> FilterSection:
        """Return the filter that `METHOD:KEEP`, or `method` and its fields make; raises as `Recipe.parse`."""
        place = f"{where}: {name}"
        known = expand_filter(values, place) if isinstance(values, str) else require_mapping(values, place)
        own, settings = split_section(known, cls, SELECTORS, name, where)
        return parse_settings(cls, {**own, "settings": settings}, f"{where}: {name}")

    def build(self) -> Selector:
        """Return the filter with its settings."""
        return build_method(SELECTORS, self.method, self.settings, "select")


class SelectSection(Settings):
    """Which of the images are used; a plain list is its `by`."""

    by: tuple[FilterSection, ...] = Field(min_length=1)
    """Filters, each of which chooses from what those before it kept; all share one forward pass."""
    batch_size: int = Field(default=64, ge=1)
    """Images per forward pass, fewer where activations are large; does not change the result beyond rounding."""
    table_gib: float = Field(default=4.0, ge=0)
    """GiB of main memory for the sums that filters need of each image; larger ones go to a temporary file."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> SelectSection:
        """Return the section that `by` and its own fields make; raises as `Recipe.parse`."""
        filters = values.get("by")
        if not isinstance(filters, list | tuple):
            raise RecipeError(f"{where}: select.by must be a list of filters such as energy:0.7, not {filters!r}")
        read = [FilterSection.parse(one, where, f"select.by.{index}") for index, one in enumerate(filters)]
        return parse_settings(cls, {**values, "by": read}, f"{where}: select")

    def build(self) -> list[Selector]:
        """Return the filters with their settings."""
        return [section.build() for section in self.by]


class QuantizeSection(Settings):
    """How the network is quantized."""

    method: str
    """Registered name of a quantization method."""
    scheme: QuantScheme
    """A preset such as `W4A4`, or a mapping with a `preset` and changes to it."""
    equalize: Equalize = "none"
    """Scale channels before, in a network that computes the same: `weights` (DFQ: ranges of weights), `activations`
    (ranges on the images against those of weights, whole residual streams alike), `layer_norms` (RepQ-ViT: one grid
    behind each layer norm does what grids of channels do) or `none`."""
    fold_batch_norms: bool = Field(default=True, exclude_if=bool)
    """Fold batch norms into layers; otherwise all stay, in floating point and with the statistics that they have, so
    that fine-tuning trains their factors and offsets beside weights that no batch norm has scaled."""
    bias_correction: bool = False
    """Take the mean error that rounded weights make at each layer's output out of its bias (DFQ, arXiv:1906.04721)."""
    output_correction: bool = Field(default=False, exclude_if=operator.not_)
    """Take what is systematic in the error of the output, a factor and a shift for each channel, out of the layer that
    makes it (after PTQD, arXiv:2305.10657): for denoisers, whose mean decides how bright an image becomes."""
    target: str | None = Field(default=None, exclude_if=is_unset)
    """What the network is meant for, a preset of `synthquant export --to onnx` or another exporter: `scheme` gets what
    that needs where it says nothing itself, and what cannot be exported is refused before anything is made."""
    run: str | None = Field(default=None, exclude_if=is_unset)
    """Folder of a finished run whose quantized network is taken as it is; the other settings then are those that it was
    made with, and may be left out."""
    settings: dict[str, Any]
    """All fields of the method; written beside `method` in a recipe."""

    @model_validator(mode="after")
    def _can_equalize(self) -> QuantizeSection:
        if self.equalize != "none" and not self.fold_batch_norms:
            raise ValueError(
                f"equalize {self.equalize!r} scales channels of folded batch norms; leave fold_batch_norms on"
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> QuantizeSection:
        """Return the section that `method`, `scheme` and the fields of the method make; raises as `Recipe.parse`.

        With `run` alone the settings are read from that run.
        """
        if values.get("run") is not None and "method" not in values:
            values = {**_quantize_section_of(str(values["run"])), **values}
        if values.get("export_preset", "") is None:  # of runs that are older than `target`
            values = {name: value for name, value in values.items() if name != "export_preset"}
        own, settings = split_section(values, cls, QUANTIZERS, "quantize", where)
        target = own.get("target")
        if "scheme" in own or target is not None:
            scheme = own.get("scheme", {})
            if not isinstance(scheme, str | Mapping | QuantScheme):
                raise SchemeError(f"{where}: quantize.scheme is {scheme!r}; give a preset such as W4A4 or a mapping")
            scheme = dict(scheme) if isinstance(scheme, Mapping) else scheme
            own["scheme"] = QuantScheme.parse(scheme) if target is None else scheme_for(str(target), scheme)
        return parse_settings(cls, {**own, "settings": settings}, f"{where}: quantize")

    def build(self) -> QuantStep:
        """Return the method with its settings."""
        return build_method(QUANTIZERS, self.method, self.settings, "quantize")

    @property
    def needs_images(self) -> tuple[str, ...]:
        """What of this cannot be done without given images, in words."""
        if self.run is not None:
            return ()
        asked = {
            f"quantize.method {self.method}": not is_generating(self.build()),
            f"quantize.equalize {self.equalize}": self.equalize in ("activations", "layer_norms"),
            "quantize.bias_correction": self.bias_correction,
            "quantize.output_correction": self.output_correction,
        }
        return tuple(name for name, needs in asked.items() if needs)


class FineTuneSection(Settings):
    """How the quantized network is trained."""

    method: str
    """Registered name of a fine-tuning method."""
    settings: dict[str, Any]
    """All fields of the method; written beside `method` in a recipe."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> FineTuneSection:
        """Return the section that `method` and the fields of the method make; raises as `Recipe.parse`."""
        own, settings = split_section(values, cls, FINE_TUNERS, "finetune", where)
        return parse_settings(cls, {**own, "settings": settings}, f"{where}: finetune")

    def build(self) -> FineTuner:
        """Return the method with its settings."""
        return build_method(FINE_TUNERS, self.method, self.settings, "finetune")


class Recipe(Settings):
    """One run, wholly specified."""

    version: Literal[1] = 1
    """Version of the recipe format."""
    model: ModelSource
    """The trained network; a plain string is its `source`."""
    images: SynthesizeSection | SourceSection | None = None
    """Where the images to quantize with come from; none: the quantization method makes its own."""
    select: SelectSection | None = None
    """Which of these images are used; a plain list is its `by`; none: all."""
    quantize: QuantizeSection
    """How the network is quantized."""
    finetune: FineTuneSection | None = Field(default=None, exclude_if=is_unset)
    """How the quantized network is trained; none: it is not."""
    evaluate: EvaluateSection | None = None
    """What to measure on; a plain string is its `data`; none: only what needs no labelled images is measured."""
    seed: int = Field(default=0, ge=0, le=LARGEST_INT)
    """Seed of all random numbers of the run."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ... or `auto`: an accelerator if there is one."""
    memory: MemoryBudget = MemoryBudget()
    """Memory that caches may take."""
    added: dict[str, Any] = Field(default_factory=dict)
    """Stages that are no part of every run (`stages.STAGES`); written under their names in a recipe."""

    @model_validator(mode="after")
    def _enough_images(self) -> Recipe:
        if self.images is None:
            needs = [*self.quantize.needs_images, *(["select"] if self.select is not None else [])]
            if self.finetune is not None and self.finetune.build().needs_images:
                needs.append(f"finetune.method {self.finetune.method}")
            if needs or self.evaluate is None:
                why = f"{needs[0]} needs them" if needs else "without evaluate the network is measured on them"
                raise ValueError(f"'images' is missing: {why}")
        elif self.select is not None and self.images.count is not None:
            require_enough(self.select.build(), self.images.count)
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Return the recipe that plain data describes.

        Raises:
            RecipeError: an unknown key (with the nearest known one), a missing or a bad value; starts with `where`.
            UnknownNameError: a method that is not registered.
            SchemeError: a scheme that makes no sense.
        """
        known = _expand(values)
        for section in ("images", "select", "finetune"):
            if known.get(section) is None:
                known.pop(section, None)
        sections = {
            "images": _read_images,
            "select": SelectSection.parse,
            "quantize": QuantizeSection.parse,
            "finetune": FineTuneSection.parse,
        }
        for section, read in sections.items():
            if section in known:
                known[section] = read(require_mapping(known[section], f"{where}: {section}"), where)
        if "added" in known:
            raise RecipeError(f"{where}: unknown setting 'added'; write a stage under its own name")
        stages = {name: known.pop(name) for name in STAGES.names() if name in known}
        known["added"] = {
            name: parse_settings(
                cast(Any, STAGES.get(name)), require_mapping(values, f"{where}: {name}"), f"{where}: {name}"
            )
            for name, values in stages.items()
        }
        return parse_settings(cls, known, where)

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML recipe and change it by `overrides` of the form `section.field=value`.

        Raises:
            RecipeError: the file is missing or not YAML, and all that `parse` raises.
        """
        try:
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(LONGEST + 1)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL character in the name
            raise RecipeError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            values = parse_yaml(text)
        except RecipeError as error:
            raise RecipeError(f"{path} {error}") from error
        known = paths_beside(_expand(require_mapping(values, str(path))), Path(path).parent)
        return cls.parse(apply_overrides(known, overrides), str(path))

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain data with every default written out; `parse` gives an equal recipe back."""
        values = self.model_dump(mode="json")
        for section in ("images", "quantize", "finetune"):
            if values.get(section) is not None:
                values[section] |= values[section].pop("settings", {})
        values |= values.pop("added")
        if self.select is not None:
            values["select"]["by"] = [{"method": one.method, **one.settings} for one in self.select.by]
        return values

    def to_yaml(self) -> str:
        """Return `resolved()` as YAML text."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=120)


def _expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write the sections that may be a plain string as mappings."""
    expanded = dict(values)
    for section, field in (("model", "source"), ("evaluate", "data")):
        if isinstance(expanded.get(section), str):
            expanded[section] = {field: expanded[section]}
    quantize = expanded.get("quantize")
    if isinstance(quantize, Mapping) and isinstance(quantize.get("scheme"), str):
        expanded["quantize"] = {**quantize, "scheme": {"preset": quantize["scheme"]}}  # --set changes its fields
    if isinstance(expanded.get("select"), list | tuple | str):
        filters = [expanded["select"]] if isinstance(expanded["select"], str) else expanded["select"]
        filters = [expand_filter(one, "select") if isinstance(one, str) else one for one in filters]
        expanded["select"] = {"by": filters}
    return expanded


def expand_filter(text: str, where: str) -> dict[str, Any]:
    """Return the filter that a text like `energy:0.7` means, as a mapping; raises `RecipeError` if it means none."""
    method, colon, keep = text.partition(":")
    if not colon:
        return {"method": method}
    try:
        return {"method": method, "keep": int(keep) if keep.strip().isdecimal() else float(keep)}
    except ValueError:
        raise RecipeError(
            f"{where} {text!r}: write METHOD:KEEP with a share or a count, for example energy:0.7 or energy:500"
        ) from None


def _read_images(values: Mapping[str, Any], where: str) -> SynthesizeSection | SourceSection:
    if "source" in values and "method" in values:
        raise RecipeError(f"{where}: images has both 'method' and 'source'; keep one of them")
    if "source" in values:
        return parse_settings(SourceSection, values, f"{where}: images")
    return SynthesizeSection.parse(values, where)


def _quantize_section_of(folder: str) -> Mapping[str, Any]:
    """How a run was quantized, from its record; raises `InputError` if there is no such record."""
    section = RunRecord.load(Path(folder) / "run.json").recipe.get("quantize")
    return require_mapping(section, f"{folder}/run.json: quantize")
