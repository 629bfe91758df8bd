"""What somebody meets who has just installed the package."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import typer
from tests.cli.conftest import Command

from synthquant.cli import doctor, group
from synthquant.cli.app import app
from synthquant.core import extras
from synthquant.core.version import package_version
from synthquant.recipe import Recipe
from synthquant.stages import STAGES

LOADS = """
import resource, sys
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_utime
before = used()
{}
print(used() - before, *sorted({{"torch", "numpy"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "code", ["import synthquant", "from synthquant.cli.app import run; run(['--help']); run(['--version']); run([])"]
)
def test_what_says_what_there_is_loads_nothing_that_takes_long(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOADS.format(code)], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.splitlines()[-1].split()
    assert loaded == [] and float(seconds) < 0.5


def test_no_command_is_answered_with_the_help(synthquant: Command) -> None:
    alone, asked = synthquant(), synthquant("--help")
    assert alone.status == 0 and alone.err == "" and alone.out == asked.out and "quantize" in alone.out
    assert synthquant("--version").out == f"synthquant {package_version()}\n"
    assert "Did you mean 'quantize'" in synthquant("quantise").error


def test_python_m_is_the_command_line_and_completion_knows_the_commands() -> None:
    def of_python(*arguments: str, **environment: str) -> str:
        command = [sys.executable, "-m", "synthquant", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment or None).stdout

    assert of_python("--version") == f"synthquant {package_version()}\n"
    words = {"_SYNTHQUANT_COMPLETE": "complete_bash", "COMP_WORDS": "synthquant syn", "COMP_CWORD": "1"}
    assert of_python(**words, PYTHONPATH=":".join(sys.path)).split() == ["synthesize"]


def test_the_help_of_each_command_is_its_docstring() -> None:
    listed = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in group.COMMANDS:
        callback = group.load_command(name).callback
        assert listed[name].help.splitlines()[0] == (inspect.getdoc(callback) or "").splitlines()[0]


def test_lists_fit_a_terminal_and_name_what_is_bundled(synthquant: Command) -> None:
    lines = synthquant("list").out.splitlines()
    assert max(map(len, lines)) <= 80
    (start,) = {line.index("10 classes") for line in lines if line.endswith(" 10 classes")}
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)
    assert "bundled/cifar10-test" in synthquant("list", "data").out and "5000 images, labelled" in "\n".join(lines)
    assert set(json.loads(synthquant("list", "pipeline", "--json").out)["pipeline"]) >= {"zoo/cifar10-ddpm"}


def test_schemes_and_recipes_are_shown(synthquant: Command) -> None:
    shown = synthquant("show", "w4a4").out
    assert shown.startswith("W4A4 (weights 4 bit asymmetric per channel") and "num_bits: 4" in shown
    assert "deploy (Literal['papers', 'full']) = papers" in synthquant("show", "scheme").out
    names = [one["name"] for one in json.loads(synthquant("show", "recipe", "--json").out)["settings"]]
    assert {"images.method", "images.source", "quantize.target", "export.target", "benchmark.threads"} <= set(names)
    assert not any("settings" in name or name == "added" for name in names)
    sections = dict.fromkeys(name.partition(".")[0] for name in names)
    assert list(sections) == [name for name in (*Recipe.model_fields, *STAGES.names()) if name != "added"]
    assert "W1A4: weights cannot have 1 bits" in synthquant("show", "W1A4").error


def test_doctor_says_what_is_missing_and_how_to_get_it(synthquant: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "extras", lambda: {"onnx": {"onnx": "1.23", "onnxruntime": None}, "ray": {"ray": "2"}})
    lines = dict(line.split(maxsplit=1) for line in synthquant("doctor").out.splitlines())
    assert lines["synthquant"] == package_version() and "8-bit dot products (VNNI)" in lines["features"]
    assert lines["[onnx]"] == "onnx 1.23; onnxruntime missing: pip install 'synthquant[onnx]'"
    assert lines["[ray]"] == "ray 2" and lines["memory"].endswith("GiB free")
    found = json.loads(synthquant("doctor", "--json").out)
    assert found["free_memory_bytes"] > 0 and found["extras"]["ray"] == {"ray": "2"}


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch>=2", "nowhere>=1; extra == 'far'", "torch[x]>=2; extra == 'far'", "ruff; extra == 'dev'"]
    monkeypatch.setattr(extras.metadata, "requires", lambda _: [*required, "synthquant[far]; extra == 'far'"])
    found = extras.extras()
    assert list(found) == ["far"] and found["far"]["nowhere"] is None and found["far"]["torch"]
