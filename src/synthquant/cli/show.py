"""`list`, `show`, `report` and `card`: what there is, and what came out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from types import NoneType, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel

from synthquant.cli import options
from synthquant.cli.output import print_json
from synthquant.core.errors import OutputError, UnknownNameError
from synthquant.core.files import write_text
from synthquant.core.progress import ConsoleProgress
from synthquant.core.registry import Registry
from synthquant.core.settings import Settings, allowed_range, settings_in
from synthquant.data.sources import BUNDLED, open_images
from synthquant.export.model_card import checkpoint_card
from synthquant.methods import EXPORTERS, FINE_TUNERS, QUANTIZERS, SELECTORS, SYNTHESIZERS
from synthquant.models.zoo import ZOO
from synthquant.models.zoo.pipelines import PIPELINES, installed_pipelines
from synthquant.nn.scheme import QuantScheme
from synthquant.recipe import FineTuneSection, Recipe, SourceSection, SynthesizeSection
from synthquant.report.html import write_report
from synthquant.stages import STAGES

Method = Annotated[
    str,
    typer.Argument(
        metavar="METHOD",
        help="A name that `list` prints, recipe, scheme, or a scheme such as W4A4.",
        show_default=False,
    ),
]

_SECTIONS = ("recipe", "scheme")
_METHODS: dict[str, Registry[Any]] = {
    "synthesize": SYNTHESIZERS,
    "select": SELECTORS,
    "quantize": QUANTIZERS,
    "finetune": FINE_TUNERS,
    "export": EXPORTERS,
}


_BUNDLED = ("zoo", "pipeline", "data")
_WIDTH = 80


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or one image set.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page to write.")] = Path("report.html"),
    json: options.Json = False,
) -> None:
    """Write one self-contained HTML page about one or several runs side by side, or about a set of images."""
    page = write_report(runs, out, ConsoleProgress())
    print_json({"report": str(page)}) if json else print(page)


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or of a checkpoint.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the card there, not on the terminal.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="License on the card, as the hub calls it: apache-2.0, mit, other.")
    ] = None,
) -> None:
    """Print the model card of a run or checkpoint in the form of Hugging Face; README.md in the checkpoint is the same.

    The card says what was measured, with count and data, and how to load the network; it opens no network.
    """
    if out is not None and (out.suffix != ".md" or out.is_dir()):
        raise OutputError(f"--out {out}: must end in .md, and be no folder")
    text = checkpoint_card(run, license=license)
    if out is None:
        print(text, end="")
        return
    write_text(out, text)
    print(out)


def list_methods(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join([*_METHODS, *_BUNDLED])}; all without it.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List the methods of each kind, and the networks, diffusion pipelines and images that are bundled."""
    tables = {name: {entry: _title(method) for entry, method in methods.items()} for name, methods in _METHODS.items()}
    tables["zoo"] = {f"zoo/{name}": f"{len(entry.class_names)} classes" for name, entry in ZOO.items()}
    tables["pipeline"] = {f"zoo/{name}": PIPELINES[name] for name in installed_pipelines()}
    tables["data"] = {f"bundled/{name}": _size_of(name) for name in sorted(BUNDLED)}
    if kind is not None:
        if kind not in tables:
            raise UnknownNameError("kind", kind, tables)
        tables = {kind: tables[kind]}
    if json:
        print_json(tables)
        return
    width = max(len(entry) for table in tables.values() for entry in table) + 2
    for name, table in tables.items():
        for entry, title in table.items():
            start = f"{name:<12}{entry:<{width}}"
            print(fill(title, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False))


def show(
    method: Method,
    json: options.Json = False,
) -> None:
    """Show a method, `recipe`, `scheme` or a scheme such as W4A4 with all settings: what --set and recipes take."""
    if method in _SECTIONS or re.fullmatch(r"W\d+A\w+", method, re.IGNORECASE):
        _show_section(method, json)
        return
    found = [methods.get(method) for methods in _METHODS.values() if method in methods]
    if not found:
        known = [*_SECTIONS, *(name for methods in _METHODS.values() for name in methods.names())]
        raise UnknownNameError("method", method, known)
    cls = cast(type[Settings], found[0])
    _print_settings(method, inspect.getdoc(cls), list(_explained(cls)), json)


def _show_section(name: str, json: bool) -> None:
    """Show the settings of a recipe or a scheme, or what a scheme by name stands for."""
    if name == "recipe":
        classes: dict[str, Sequence[type[BaseModel]]] = {
            "images": (SourceSection, SynthesizeSection),
            "finetune": (FineTuneSection,),
            **{stage: (cast(type[BaseModel], cls),) for stage, cls in STAGES.items()},
        }
        fields = [one for one in _explained(Recipe) if one["name"].partition(".")[0] not in classes]
        for section, members in classes.items():
            inner = {one["name"]: one for cls in members for one in _explained(cls, f"{section}.")}
            fields += inner.values()
        order = [*Recipe.model_fields, *STAGES.names()]
        fields.sort(key=lambda one: order.index(one["name"].partition(".")[0]))
        # methods write their fields beside their names, and stages stand under their own
        hidden = re.compile(r"added|.*\.settings|quantize\.scheme\..*")
        shown = [one for one in fields if not hidden.fullmatch(one["name"])]
        about = f"{inspect.getdoc(Recipe)} Fields of methods stand beside `method`: see `show METHOD`, `show scheme`."
        _print_settings(name, about, shown, json)
    elif name == "scheme":
        _print_settings(name, inspect.getdoc(QuantScheme), list(_explained(QuantScheme)), json)
    else:
        scheme = QuantScheme.parse(name)
        values = scheme.model_dump(mode="json")
        if json:
            print_json({"name": scheme.name, "description": scheme.describe(), "scheme": values})
        else:
            print(f"{scheme.describe()}\n\n{yaml.safe_dump({'scheme': values}, sort_keys=False)}", end="")


def _print_settings(name: str, description: str | None, fields: list[dict[str, Any]], json: bool) -> None:
    if json:
        print_json({"name": name, "description": description, "settings": fields})
        return
    print(f"{name}: {description}\n")
    for entry in fields:
        allowed = f", {entry['allowed']}" if entry["allowed"] else ""
        default = ", to be given" if entry["required"] else f" = {entry['default']}"
        print(f"  {entry['name']} ({entry['type']}{allowed}){default}\n      {entry['description']}")


def _explained(cls: type[BaseModel], prefix: str = "") -> Iterator[dict[str, Any]]:
    """Each setting, behind those that are settings themselves their own."""
    for name, field in cls.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield {
            "name": f"{prefix}{name}",
            "type": _type_name(field.annotation),
            "default": default.model_dump(mode="json") if isinstance(default, BaseModel) else default,
            "required": field.is_required(),
            "allowed": allowed_range(field),
            "description": " ".join((field.description or "").split()),
        }
        if inner := settings_in(field.annotation):
            yield from _explained(inner, f"{prefix}{name}.")


def _size_of(name: str) -> str:
    images = open_images(f"bundled/{name}")
    return f"{len(images)} images, {'labelled' if images.labels is not None else 'without labels'}"


def _title(method: object) -> str:
    return (inspect.getdoc(method) or "").partition("\n")[0]


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(one) for one in get_args(annotation))
    if annotation is NoneType:
        return "None"
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (tuple, list, dict):
        inner = ("..." if one is Ellipsis else _type_name(one) for one in get_args(annotation))
        return f"{get_origin(annotation).__name__}[{', '.join(inner)}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
