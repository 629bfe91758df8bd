"""Pages that are written from the code: README as the front page, tutorials, all methods with their settings."""

from __future__ import annotations

import ast
import inspect
import json
from importlib import import_module
from itertools import groupby
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import synthquant as sq
from synthquant.core.settings import allowed_range

ROOT = Path(__file__).parents[1]
TUTORIALS = ("own_network", "segmentation_to_onnx", "text_to_image_data")
KINDS = {
    "Synthesis": sq.SYNTHESIZERS,
    "Selection": sq.SELECTORS,
    "Quantization": sq.QUANTIZERS,
    "Fine-tuning": sq.FINE_TUNERS,
    "Exporters": sq.EXPORTERS,
}

# What is worth reading of the package beyond the names that it announces; of a module that is named, all of it.
FURTHER = (
    *("synthquant.core.errors", "synthquant.diffusion.denoiser", "synthquant.diffusion.pipelines"),
    *("synthquant.diffusion.text_to_image", "synthquant.evaluate.agreement.measure_output_sqnr"),
    *("synthquant.evaluate.agreement.measure_sqnr", "synthquant.evaluate.diversity.measure_diversity"),
    *("synthquant.evaluate.feature_distances", "synthquant.evaluate.image_quality", "synthquant.export.checkpoint"),
    *("synthquant.export.diffusers_folder", "synthquant.methods", "synthquant.nn.scheme.AttentionScheme"),
    *("synthquant.quantize.shortcut_ranges", "synthquant.select.batch_norm.set_sensitivity"),
    *("synthquant.select.energy.energy_score", "synthquant.select.patch_similarity.similarity_entropy"),
    *("synthquant.select.scan.scan", "synthquant.select.write.write_selection"),
    "synthquant.synthesize.class_names.class_names",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the modules and the decisions, in their order."""
    nav = {title: pages for entry in config.nav or [] for title, pages in entry.items()}
    nav["Reference"] += [{name: f"reference/{name}.md"} for name in references()]
    records = sorted(path for path in (ROOT / "docs" / "adr").glob("*.md") if path.name != "README.md")
    config.nav = [*(config.nav or []), {"Decisions": [f"adr/{path.name}" for path in records]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files."""
    pages = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
    for page, name in pages.items():
        # These stand one folder above the documentation.
        content = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=content))
    files.append(File.generated(config, "methods.md", content=methods()))
    for name, content in references().items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    for name in TUTORIALS:
        files.append(File.generated(config, f"tutorials/{name}.md", content=tutorial(name)))
    return files


def methods() -> str:
    """Every registered method: what it is, and each of its settings with default and range."""
    lines = ["# Methods"]
    for kind, registry in KINDS.items():
        lines += ["", f"## {kind}"]
        for name, cls in registry.items():
            lines += ["", f"### {name}", "", inspect.getdoc(cls) or ""]
            for field, info in getattr(cls, "model_fields", {}).items():
                bounds = allowed_range(info)
                default = info.get_default(call_default_factory=True)
                lines += ["", f"`{field}` = `{default}`{f' ({bounds})' if bounds else ''}  ", info.description or ""]
    return "\n".join(lines) + "\n"


def tutorial(name: str) -> str:
    """A script of examples/: its docstring, its comments as prose, its code, and what it printed."""
    text = (ROOT / "examples" / f"{name}.py").read_text()
    docstring = ast.parse(text).body[0]
    title, _, about = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    lines = [f"# {title.rstrip('.')}", about]
    for is_prose, part in groupby(text.splitlines()[docstring.end_lineno :], lambda line: line.startswith("# ")):
        block = "\n".join(line.removeprefix("# ") if is_prose else line for line in part).strip("\n")
        if block:
            lines += ["", block if is_prose else f"```python\n{block}\n```"]
    found = json.loads((ROOT / "results" / "examples" / f"{name}.json").read_text())
    where = f"{found['seconds'] / 60:.0f} minutes on {found['environment']['cpu']}, {found['environment']['threads']}"
    lines += ["", f"It prints ({where} threads):", "", f"```text\n{found['printed']}```"]
    return "\n".join(lines) + "\n"


def references() -> dict[str, str]:
    """A page for each package with what it announces, by name; that of the modules beside them comes first."""
    entries = set(FURTHER)
    for node in ast.parse((ROOT / "src" / "synthquant" / "api.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("synthquant"):
            module = import_module(node.module or "")
            for alias in node.names:
                found = getattr(module, alias.name)
                home = found.__module__ if inspect.isclass(found) or inspect.isfunction(found) else node.module
                entries.add(f"{home}.{alias.name}")
    whole = tuple(f"{entry}." for entry in FURTHER)
    pages: dict[str, list[str]] = {"synthquant": []}
    for entry in sorted(entries, key=lambda one: (".verbs." not in one, one)):
        room = entry.split(".")[1]
        is_package = (ROOT / "src" / "synthquant" / room).is_dir()
        if not entry.startswith(whole):
            pages.setdefault(f"synthquant.{room}" if is_package else "synthquant", []).append(f"::: {entry}")
    return {name: "\n\n".join([f"# {name}", _about(name), *found]) + "\n" for name, found in pages.items()}


def _about(name: str) -> str:
    """The first sentence of a package's docstring."""
    return (inspect.getdoc(import_module(name)) or "").split("\n\n")[0]
