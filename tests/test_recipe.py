from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from synthquant.core.errors import RecipeError, SchemeError, SynthquantError, UnknownNameError
from synthquant.core.overrides import apply_overrides
from synthquant.methods import QUANTIZERS, SELECTORS, SYNTHESIZERS
from synthquant.quantize import GenieM
from synthquant.recipe import Recipe, SourceSection, SynthesizeSection
from synthquant.select import BatchNormSensitivity, Energy
from synthquant.synthesize import GenieD


def values(**changes: Any) -> dict[str, Any]:
    base = {
        "model": {"source": "zoo/cifar10-resnet20"},
        "images": {"method": "genie_d", "count": 48, "iterations": 7},
        "quantize": {"method": "genie_m", "scheme": "W4A4", "iterations": 9},
    }
    return base | changes


def test_the_method_of_each_section_gets_its_own_fields_and_its_own_defaults() -> None:
    recipe = Recipe.parse(values())
    assert isinstance(recipe.images, SynthesizeSection)
    assert recipe.images.build() == GenieD(iterations=7)
    assert recipe.images.count == 48
    assert recipe.quantize.build() == GenieM(iterations=9)


@pytest.mark.parametrize("method", SYNTHESIZERS.names())
def test_every_synthesis_method_can_be_named_and_survives_writing_and_reading(method: str) -> None:
    recipe = Recipe.parse(values(images={"method": method}))
    assert Recipe.parse(recipe.resolved()) == recipe


@pytest.mark.parametrize("method", QUANTIZERS.names())
def test_every_quantization_method_can_be_named_and_survives_writing_and_reading(method: str, tmp_path: Path) -> None:
    scheme = {
        "preset": "W2A4",
        "ends": "same",
        "ignore": ["fc"],
        "overrides": {"layer1.*": {"weights": {"num_bits": 8}}},
    }
    recipe = Recipe.parse(values(quantize={"method": method, "scheme": scheme}, evaluate="bundled/cifar10-test"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("method", SELECTORS.names())
def test_every_selection_method_can_be_named_and_survives_writing_and_reading(method: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(values(select=[f"{method}:0.5", {"method": method, "keep": 7, "per_class": True}]))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_filters_are_written_as_text_as_mapping_or_with_the_settings_of_the_pass() -> None:
    first = Recipe.parse(values(select=["energy:0.5", "bn_sensitivity:12"])).select
    second = Recipe.parse(values(select={"by": [{"method": "energy", "keep": 0.5}, "bn_sensitivity:12"]})).select
    assert first is not None and first == second
    assert first.build() == [Energy(keep=0.5), BatchNormSensitivity(keep=12)]
    assert Recipe.parse(values(select="energy:3")).select == Recipe.parse(values(select=["energy:3"])).select
    other = Recipe.parse(values(select={"by": ["energy"], "batch_size": 5})).select
    assert other is not None and other.batch_size == 5 and other.build() == [Energy()]
    assert Recipe.parse(values(select=None)) == Recipe.parse(values())


def test_a_setting_of_one_filter_is_reached_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(Recipe.parse(values(select=["energy:0.5", "bn_distance:1"])).to_yaml())
    changes = ["select.by.1.spread=std", "select.by.0.keep=2", "select.batch_size=3"]
    section = Recipe.load(tmp_path / "recipe.yaml", changes).select
    assert section is not None and section.batch_size == 3
    assert section.by[1].settings["spread"] == "std" and section.by[0].settings["keep"] == 2


def test_the_resolved_recipe_holds_every_field_of_the_method() -> None:
    written = Recipe.parse(values()).resolved()
    off = {name for name, field in GenieM.model_fields.items() if field.exclude_if is not None}  # docs/adr/0038
    assert set(GenieM.model_fields) - set(written["quantize"]) == off == {"error", "fisher_rank", "weight_lr"}
    assert "settings" not in written["quantize"] and "settings" not in written["images"]


def test_a_plain_string_names_model_and_evaluation_data() -> None:
    recipe = Recipe.parse(values(model="timm/resnet18", evaluate="some/folder"))
    assert recipe.model.source == "timm/resnet18"
    assert recipe.evaluate is not None and recipe.evaluate.data == "some/folder"


def test_a_scheme_of_one_word_has_fields_to_set(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{model: zoo/x, images: {source: y}, quantize: {method: rtn, scheme: W8A8}}", encoding="utf-8")
    scheme = Recipe.load(path, ["quantize.scheme.deploy=full"]).quantize.scheme
    assert scheme.deploy == "full" and scheme.name == "W8A8"
    assert Recipe.load(path, ["quantize.scheme=W4A4"]).quantize.scheme.name == "W4A4"


def test_images_that_exist_are_named_by_their_source() -> None:
    assert Recipe.parse(values(images={"source": "x", "count": 3})).images == SourceSection(source="x", count=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantise": {}}, r"recipe: unknown setting 'quantise'; did you mean 'quantize'\?"),
        ({"images": {"method": "genie_d", "iterashuns": 3}}, r"'images.iterashuns'; did you mean 'images.iterations'"),
        ({"images": {"method": "genie_d", "cuont": 3}}, r"did you mean 'images.count'\?"),
        ({"quantize": {"method": "genie_m", "quantize_probabilty": 1}},
         r"'quantize.quantize_probabilty'; did you mean 'quantize.quantize_probability'\?"),
        ({"model": {"source": "zoo/x", "wieghts": "f"}}, r"unknown setting 'model.wieghts'; did you mean 'weights'\?"),
        ({"model": {}}, r"recipe: setting 'model.source' is missing"),
        ({"evaluate": {"batch_size": 4}}, r"setting 'evaluate.data' is missing"),
        ({"select": ["energy:half"]}, r"select 'energy:half': write METHOD:KEEP"),
        ({"select": []}, r"recipe: select: by = .*at least 1"),
        ({"select": {"batch_size": 3}}, r"select.by must be a list of filters such as energy:0.7, not None"),
        ({"select": [3]}, r"recipe: select.by.0 must be a mapping of settings, not int"),
        ({"select": [{"method": "energy", "kep": 1}]}, r"'select.by.0.kep'; did you mean 'select.by.0.keep'\?"),
        ({"select": {"by": ["energy"], "bach_size": 1}}, r"unknown setting 'bach_size'; did you mean 'batch_size'"),
        ({"images": {"count": 3}}, r"images.method is missing; available: .*genie_d"),
        ({"images": {"method": "noise", "source": "x"}}, r"images has both 'method' and 'source'"),
        ({"images": {"method": "genie_d", "count": 0}}, r"images: count = 0: .*allowed: >= 1"),
        ({"images": {"method": "genie_d", "iterations": 0}}, r"images: iterations = 0: .*allowed: >= 1"),
        ({"images": "genie_d"}, r"recipe: images must be a mapping of settings, not str"),
        ({"quantize": {"method": "genie_m"}}, r"quantize: setting 'scheme' is missing"),
        ({"quantize": {"method": "qdrop", "scheme": "W4A4", "keep": 0.5}},
         r"'quantize.keep' is now called 'quantize.quantize_probability'$"),
        ({"seed": -1}, r"seed = -1"),
        ({"version": 2}, r"version = 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_its_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(values(**changes))
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_method_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown synthesis method 'geni_d'; did you mean 'genie_d'\?"):
        Recipe.parse(values(images={"method": "geni_d"}))


@pytest.mark.parametrize("scheme", ["W1A4", "W33A8", "W4A33", "four", {"preset": "W4A1"}, 4, ["W4A4"]])
def test_bits_that_do_not_exist_are_refused(scheme: object) -> None:
    with pytest.raises(SchemeError) as error:
        Recipe.parse(values(quantize={"method": "rtn", "scheme": scheme}))
    assert "\n" not in str(error.value)


def test_overrides_reach_any_depth_and_the_last_one_wins(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(Recipe.parse(values()).to_yaml())
    texts = ["quantize.iterations=5", "quantize.iterations=6", "memory.host_gib=2", "quantize.scheme.ends=same"]
    recipe = Recipe.load(tmp_path / "r.yaml", [*texts, "model.weights=w.safetensors", "images.generator_lr=1e-3"])
    assert recipe.quantize.settings["iterations"] == 6
    assert recipe.quantize.scheme.ends == "same"
    assert recipe.memory.host_gib == 2
    assert recipe.model.weights == "w.safetensors"
    assert isinstance(recipe.images, SynthesizeSection) and recipe.images.settings["generator_lr"] == 1e-3


def test_overrides_leave_what_they_are_given_as_it_was() -> None:
    before = {"a": {"b": {"c": 1}}}
    assert apply_overrides(before, ["a.b.c=2"]) == {"a": {"b": {"c": 2}}}
    assert before == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations", "write it as FIELD=VALUE"),
        ("=3", "write it as FIELD=VALUE"),
        ("seed.x=3", "seed is 0, it has no fields"),
        ("seed=[1", "its value is not YAML"),
        ("by.2=1", "by is a list with entries 0 to 1, not '2'"),
        ("by.first.x=1", "by is a list with entries 0 to 1, not 'first'"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        apply_overrides({"seed": 0, "by": [1, 2]}, [text])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read recipe"),
        ("a: [1", "is not YAML"),
        ("- 1", "must be a mapping"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_a_recipe_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SynthquantError) as error:
        Recipe.load(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_valid(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.parse(recipe.resolved()) == recipe


def test_paths_are_those_beside_the_recipe_and_overrides_those_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        "model: {source: 'net.py:build', weights: w.pt}\nimages: {source: images}\n"
        "quantize: {method: rtn, scheme: W8A8}\n"
    )
    (tmp_path / "net.py").write_text("")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.model.source == f"{tmp_path}/net.py:build" and recipe.model.weights == "w.pt"
    assert isinstance(recipe.images, SourceSection) and recipe.images.source == f"{tmp_path}/images"
    changed = Recipe.load(tmp_path / "recipe.yaml", ["images.source=images"])
    assert isinstance(changed.images, SourceSection) and changed.images.source == "images"
