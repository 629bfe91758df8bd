"""Pages that are written from the code: README as the front page, one page of all methods with their settings."""

from __future__ import annotations

import inspect
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import synthquant as sq
from synthquant.core.settings import allowed_range

ROOT = Path(__file__).parents[1]
KINDS = {
    "Synthesis": sq.SYNTHESIZERS,
    "Selection": sq.SELECTORS,
    "Quantization": sq.QUANTIZERS,
    "Fine-tuning": sq.FINE_TUNERS,
    "Exporters": sq.EXPORTERS,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the decisions, in their order."""
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
