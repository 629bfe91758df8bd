from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import synthquant

ROOT = Path(__file__).parents[1]
HEAVY = (
    *("timm", "torchvision", "transformers", "datasets", "diffusers", "accelerate", "huggingface_hub"),
    *("matplotlib", "pandas", "onnx", "onnxruntime", "ray", "pyarrow.dataset", "torch._dynamo", "torch._inductor"),
)


def test_everything_that_is_announced_is_there_and_nothing_else_is() -> None:
    announced = set(synthquant.__all__)
    assert len(announced) == len(synthquant.__all__)
    assert all(hasattr(synthquant, name) for name in announced)
    packages = {
        "api",
        "cli",
        "compare",
        "core",
        "data",
        "diffusion",
        "distributed",
        "evaluate",
        "finetune",
        "export",
        "export_stages",
        "held_out_stage",
        "measure",
        "methods",
        "models",
        "nn",
        "pipeline",
        "quantize",
        "recipe",
    }
    packages |= {
        "make",
        "report",
        "resume",
        "run_stages",
        "runtimes",
        "select",
        "stages",
        "synthesize",
        "targets",
        "annotations",
        "package_version",
        "verbs",
    }
    packages |= {"Any", "TYPE_CHECKING", "find_spec", "import_module", "warn"}
    assert {name for name in vars(synthquant) if not name.startswith("_")} - announced <= packages
    assert announced <= set(dir(synthquant))
    with pytest.raises(AttributeError, match="no attribute 'Recipes'"):
        _ = synthquant.Recipes


@pytest.mark.parametrize("module", ["synthquant", "synthquant.cli"])
def test_importing_loads_nothing_heavy_and_starts_no_gpu(module: str) -> None:
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}; "
        f"print([name for name in {HEAVY!r} if name in set(sys.modules) - before], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_the_version_is_the_newest_of_the_changelog_or_unreleased() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert synthquant.__version__ == project["version"]
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(project["version"] >= version for version in versions[1:])


def test_every_extra_is_in_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.search(r"\[(.+)\]", everything)[1].split(","))  # type: ignore[index]
    assert named == set(extras) - {"all", "dev", "docs"}


def test_no_file_is_too_long_and_no_drawer_is_there() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in ("utils", "helpers", "misc", "common"), path
