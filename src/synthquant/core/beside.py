"""Paths in a recipe: what lies beside the file that names it is meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACES = (
    *("model.source", "model.weights", "quantize.run", "evaluate.data", "export.data"),
    "evaluate.metric",
    *("images.source", "images.generator", "images.classes", "images.prompts", "images.embedding"),
    *("prompt_tuning.images", "prompt_tuning.generator"),
)
"""Settings of a recipe that may be paths; they may be other names as well."""

_FILES = ("images.classes", "images.prompts")  # a folder of such a name is something else
_LIBRARIES = ("transformers/", "diffusers/")  # before the name of a folder


def paths_beside(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe whose paths say where files lie beside its own file, seen from the working directory.

    What does not exist there stays as it is: the name of a network or of a dataset, an absolute path, or a path that
    is relative to the working directory.

    Args:
        values: the sections of the recipe.
        folder: where its file is.
    """
    found = dict(values)
    for place in PLACES:
        section, key = place.split(".")
        settings = found.get(section)
        if isinstance(settings, Mapping) and isinstance(settings.get(key), str):
            name = _beside(settings[key], folder, file_only=place in _FILES)
            found[section] = {**settings, key: name}
    return found


def _beside(name: str, folder: Path, *, file_only: bool) -> str:
    library = next((prefix for prefix in _LIBRARIES if name.startswith(prefix)), "")
    file, colon, function = name.removeprefix(library).partition(".py:")
    path = folder / (file + (".py" if colon else ""))
    try:
        there = path.is_file() if file_only else path.exists()
    except (OSError, ValueError):  # no name that a file can have
        return name
    return f"{library}{path}{':' if colon else ''}{function}" if there else name
