"""Wrong values for every option of every command, generated from the command tree: one line, before any work."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.conftest import Command
from tests.small_networks import small_float_model, small_images

from synthquant.cli import group
from synthquant.core.errors import RecipeError
from synthquant.core.settings import LARGEST_INT, parse_settings
from synthquant.methods import EXPORTERS, FINE_TUNERS, QUANTIZERS, SELECTORS, SYNTHESIZERS
from synthquant.pipeline import run
from synthquant.recipe import Recipe

COMMANDS: dict[str, Any] = {name: group.load_command(name) for name in group.COMMANDS}
EVERY_TEXT = ("", "  ", "a\0b", "\udcff")
EVERY_NUMBER = ("x", "nan", "1,5", str(10**30), str(-(10**30)), "true")
NUMBERS = {int: (*EVERY_NUMBER, "1.5", "inf", "10^30"), float: (*EVERY_NUMBER, "inf", "1e300", "-1")}
SETTINGS = ("x", "=", "=1", "nix=1", "count", "seed.x=1", f"seed={10**30}", "device=cpu:7", "batch_size=true")
BY_NAME: dict[str, tuple[str, ...]] = {
    "out": ("n" * 300, "d/" * 3000, "{file}/inside"),
    "recipe": ("{folder}", "none.yaml", "{data}", "{file}", "{deep}", "{bomb}", "{latin}", "{list}", "{twice}"),
    "model": ("nix", "none.py:build", "zoo/nix", "{file}", "n" * 5000),
    "weights": ("none.pt", "{file}", "{folder}"),
    "images": ("no/such/folder", "{file}", "{empty}", "n" * 5000),
    "data": ("no/such/folder", "{file}", "{empty}"),
    "source": ("nix", "no/such/folder", "{file}", "{empty}", "zoo/nix"),
    "reference": ("no/such/folder", "{file}", "{empty}"),
    "baseline": ("no/such/folder", "{file}", "{empty}"),
    "metric": ("nix", "none.py:f", "{file}", "{model}:nix", "{model}:build"),
    "features": ("nix", "zoo/nix", "{file}", "none.py:build"),
    "classes": ("nix", "{folder}"),
    "generator": ("zoo/nix",),
    "runs": ("none", "{empty}", "{file}"),
    "run": ("none", "{empty}", "{file}", "{data}"),
    "file": ("none.onnx", "{file}", "{folder}"),
    "input_size": ("0", "-1", "a", "16,16,16", str(10**9), "1.5", "16x", "inf"),
    "mean": ("0.5", "nan,nan,nan", "inf,0,0", "1e300,0,0", "a,b,c"),
    "std": ("0.5", "0,0,0", "-1,1,1", "1e300,1,1", "1e-300,1,1", "nan,1,1"),
    "num_classes": ("0", "-1"),
    "count": ("0", "-1", str(10**12)),
    "seed": ("-1", str(LARGEST_INT + 1)),
    "batch": ("0",),
    "threads": ("0", "100000"),
    "seconds": ("0", "1e9"),
    "batch_size": ("0",),
    "device": ("cpu:7", "mps:3", "toaster", "cuda:99", "meta", "0"),
    "method": ("nix", "GENIE"),
    "scheme": ("W1A4", "W4", "nix", "W4A400"),
    "by": ("nix:0.5", "energy:0", "energy:-1", "energy:nan", "energy:1.5", "energy:100000", "energy:", ":", "9" * 5000),
    "to": ("nix",),
    "preset": ("nix",),
    "runtime": ("nix", "openvino"),
    "target": ("nix", "ort-gpu"),
    "dtype": ("float7",),
    "kind": ("nix",),
    "ray_workers": ("1",),
    "license": ("Apache 2.0", "[mit]"),
    "settings": SETTINGS,
}


def cases() -> Iterator[tuple[str, str]]:
    for command, described in COMMANDS.items():
        for parameter in described.params:
            if parameter.type_descriptor.annotation is not bool:
                yield command, parameter.name


def wrong_values(command: str, name: str) -> tuple[str, ...]:
    (parameter,) = (parameter for parameter in COMMANDS[command].params if parameter.name == name)
    return (*EVERY_TEXT, *NUMBERS.get(parameter.type_descriptor.annotation, ()), *BY_NAME.get(name, ()))


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands are to be given, right and wrong."""
    root = tmp_path_factory.mktemp("arguments")
    source = small_float_model(root).source.source
    small_images(4).save(root / "data")
    recipe = {
        "model": {"source": source, "input_size": [16, 16], "mean": [0.5] * 3, "std": [0.25] * 3},
        "images": {"method": "noise", "count": 4},
        "quantize": {"method": "rtn", "scheme": "W4A4"},
        "device": "cpu",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(Recipe.parse(recipe), root / "run")
    (root / "file").write_text("\x01 mine")
    (root / "empty").mkdir()
    (root / "deep").write_text("a: " + "[" * 3000 + "]" * 3000)
    names = "abcdefghi"
    bomb = [f"{a}: &{a} [{','.join(['*' + b] * 9)}]" for b, a in itertools.pairwise(names)]
    (root / "bomb").write_text("\n".join(["a: &a [x]", *bomb]))
    (root / "latin").write_bytes("model: caf\xe9".encode("latin-1"))
    (root / "list").write_text("- model\n- images\n")
    (root / "twice").write_text((root / "recipe.yaml").read_text() + "\nquantize: {method: rtn, scheme: W8A8}\n")
    (root / "cwd").mkdir()
    return {path.name: path for path in root.iterdir()} | {"folder": root / "data", "root": root, "model": Path(source)}


def right(command: str, things: dict[str, Path]) -> dict[str, list[str]]:
    """What makes the command run, by parameter."""
    flags = {"input_size": ["16"], "mean": ["0.5,0.5,0.5"], "std": ["0.25,0.25,0.25"], "device": ["cpu"]}
    model, data, out = [str(things["model"])], [str(things["data"])], [str(things["cwd"] / "out")]
    return {
        "demo": {"out": out},
        "run": {"recipe": [str(things["recipe.yaml"])], "out": out},
        "synthesize": {"model": model, "out": out, "method": ["noise"], "count": ["2"], **flags},
        "sample": {"source": ["zoo/cifar10-ddpm"], "out": out, "count": ["2"], "steps": ["2"], "device": ["cpu"]},
        "select": {"images": data, "model": model, "by": ["energy:0.5"], "out": out, **flags},
        "quantize": {"model": model, "images": data, "out": out, "method": ["rtn"], "scheme": ["W4A4"], **flags},
        "finetune": {"run": [str(things["run"])], "model": model, "out": out, "device": ["cpu"]},
        "compare": {
            "images": data,
            "reference": data,
            "features": ["zoo/cifar10-resnet20"],
            "out": [f"{out[0]}.html"],
            "device": ["cpu"],
        },
        "evaluate": {"model": model, "data": data, **flags},
        "export": {"run": [str(things["run"])], "out": [f"{out[0]}.onnx"], "preset": ["simulate"]},
        "benchmark": {"file": ["none.onnx"]},
        "report": {"runs": [str(things["run"])], "out": [f"{out[0]}.html"]},
        "card": {"run": [str(things["run"])], "out": [f"{out[0]}.md"]},
        "show": {"method": ["rtn"]},
        "list": {},
        "export-images": {"images": data, "out": out},
        "doctor": {},
        "tune-prompt": {
            "generator": ["zoo/cifar10-text2image"],
            "images": data,
            "classes": ["cifar10"],
            "out": [f"{out[0]}.safetensors"],
            "device": ["cpu"],
        },
    }[command]


def command_line(command: str, values: dict[str, list[str]]) -> list[str]:
    options: list[str] = []
    arguments: list[str] = []
    for parameter in COMMANDS[command].params:
        for value in values.get(parameter.name, []):
            if parameter.param_type_name == "argument":
                arguments.append(value)
            else:
                options += [parameter.opts[0], value]
    return [command, *options, *arguments]


def files(root: Path) -> list[tuple[str, int]]:
    paths = [path for path in root.rglob("*") if "__pycache__" not in path.parts]
    return sorted((str(path.relative_to(root)), path.stat().st_mtime_ns if path.is_file() else 0) for path in paths)


@pytest.mark.parametrize(("command", "name"), list(cases()))
def test_a_wrong_value_is_one_line_before_any_work(
    synthquant: Command, things: dict[str, Path], monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(things["cwd"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (parameter,) = (parameter for parameter in COMMANDS[command].params if parameter.name == name)
    before = files(things["root"])
    for template in wrong_values(command, name):
        value = template.format(**things) if template.startswith("{") else template
        outcome = synthquant(*command_line(command, {**right(command, things), name: [value]}))
        assert outcome.status in (1, 2), (value[:100], outcome)
        said = outcome.err.splitlines()
        assert len(said) == 1 and said[0].startswith("error: ") and len(said[0]) <= 2100, (
            value[:100],
            outcome.err[-2000:],
        )
        assert outcome.out == "", value[:100]
        words = {parameter.opts[0].strip("-"), name, parameter.metavar or name, value[:20], *re.split(r"[=:./]", value)}
        if (command, name) == ("benchmark", "model"):  # an exported file takes too long to make here
            words.add("none.onnx")
        assert any(len(word) > 1 and word in said[0] for word in words), (value[:100], said[0])
        assert files(things["root"]) == before, value[:100]


def test_options_that_would_change_nothing_are_refused(synthquant: Command, things: dict[str, Path]) -> None:
    run, data, onnx = things["run"], things["data"], things["cwd"] / "net.onnx"
    said = synthquant("evaluate", run, "--data", data, "--weights", "w.pt", "--std", "1,1,1").error
    assert f"{run} brings its network with it: --weights, --std would change nothing; leave them out" in said
    missing = synthquant("evaluate", things["cwd"] / "none", "--data", data, "--model", "my.py:build").error
    assert "none is no folder of a run and no exported file: --model would change nothing" in missing
    assert "--input-size would change nothing" in synthquant("evaluate", onnx, "--data", data, "--input-size", 32).error
    assert (
        "--runtime belongs to an exported file"
        in synthquant("evaluate", run, "--data", data, "--runtime", "openvino").error
    )
    assert "did you mean 'openvino'?" in synthquant("evaluate", onnx, "--data", data, "--runtime", "openvin").error
    assert (
        "--data would change nothing" in synthquant("export", run, "--out", onnx, "--no-verify", "--data", data).error
    )


def test_what_is_read_is_not_written_over(synthquant: Command, things: dict[str, Path]) -> None:
    before = files(things["root"])
    run, data = things["run"], things["data"]
    model = command_line("quantize", {**right("quantize", things), "out": [], "images": [str(data)]})
    assert "lies inside" in synthquant(*model, "--out", data / "inside").error
    assert "lies inside" in synthquant(*model, "--out", data).error
    chosen = command_line("select", {**right("select", things), "out": []})
    assert "lies inside" in synthquant(*chosen, "--out", data).error
    tuned = ["finetune", run, "--model", things["model"]]
    assert "lies inside" in synthquant(*tuned, "--out", run / "inside").error
    assert "lies inside" in synthquant(*tuned, "--out", run).error
    assert "is a folder; give the name of a file" in synthquant("export", run, "--out", run).error
    assert "is a file of the run" in synthquant("export", run, "--out", run / "run.json").error
    assert "must end in .html" in synthquant("report", run, "--out", run / "run.json").error
    assert files(things["root"]) == before


def test_filters_that_keep_more_than_there_will_be_are_refused_before_synthesis(
    synthquant: Command, things: dict[str, Path]
) -> None:
    command = ["run", things["recipe.yaml"], "--out", things["cwd"] / "out"]
    said = synthquant(*command, "--set", "select=[energy:5]").error
    assert "energy: 5 images are to stay but there are 4" in said
    said = synthquant(*command, "--set", "select=[energy:0.5, bn_distance:3]").error
    assert "bn_distance: 3 images are to stay but there are 2" in said
    said = synthquant(*command, "--set", "select=[{method: energy, keep: 5, per_class: true}]").error
    assert "5 images are to stay" in said
    assert not (things["cwd"] / "out").exists()


METHODS = [
    pytest.param(cls, id=name)
    for registry in (SYNTHESIZERS, SELECTORS, QUANTIZERS, FINE_TUNERS, EXPORTERS)
    for name, cls in registry.items()
]


@pytest.mark.parametrize("cls", METHODS)
def test_no_setting_of_a_method_takes_what_it_cannot_hold(cls: Any) -> None:
    for name, field in cls.model_fields.items():
        numeric = any(kind in str(field.annotation) for kind in ("int", "float"))
        wrong: list[Any] = [10**30, "a\0b", "\ud800", [10**30], float("nan"), 1e300]
        if numeric and "bool" not in str(field.annotation):
            wrong.append(True)
        for value in wrong:
            with pytest.raises(RecipeError, match=f"here: {name}"):
                parse_settings(cls, {name: value}, "here")
