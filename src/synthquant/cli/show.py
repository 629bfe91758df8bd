"""`list`, `show` and `report`: what there is, and what came out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import typer
from pydantic import BaseModel

from synthquant.cli import options
from synthquant.cli.output import print_json
from synthquant.core.errors import UnknownNameError
from synthquant.core.progress import ConsoleProgress
from synthquant.core.registry import Registry
from synthquant.core.settings import Settings, allowed_range, settings_in
from synthquant.methods import EXPORTERS, FINE_TUNERS, QUANTIZERS, SELECTORS, SYNTHESIZERS
from synthquant.models.zoo import ZOO
from synthquant.report.html import write_report

Method = Annotated[str, typer.Argument(metavar="METHOD", help="A name that `list` prints.", show_default=False)]

_METHODS: dict[str, Registry[Any]] = {
    "synthesize": SYNTHESIZERS,
    "select": SELECTORS,
    "quantize": QUANTIZERS,
    "finetune": FINE_TUNERS,
    "export": EXPORTERS,
}


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or one that `select` made.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page to write.")] = Path("report.html"),
    json: options.Json = False,
) -> None:
    """Write one self-contained HTML page about one or several runs side by side, or about a selection of images."""
    page = write_report(runs, out, ConsoleProgress())
    print_json({"report": str(page)}) if json else print(page)


def list_methods(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join([*_METHODS, 'zoo'])}; all without it.")] = None,
    json: options.Json = False,
) -> None:
    """List the methods of each kind and the bundled networks."""
    tables = {name: {entry: _title(method) for entry, method in methods.items()} for name, methods in _METHODS.items()}
    tables["zoo"] = {f"zoo/{name}": f"{len(entry.class_names)} classes" for name, entry in ZOO.items()}
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
            print(f"{name:<12}{entry:<{width}}{title}")


def show(
    method: Method,
    json: options.Json = False,
) -> None:
    """Show what a method is and all its settings: what --set and recipes take."""
    found = [methods.get(method) for methods in _METHODS.values() if method in methods]
    if not found:
        raise UnknownNameError("method", method, [name for methods in _METHODS.values() for name in methods.names()])
    cls = cast(type[Settings], found[0])
    fields = list(_explained(cls))
    if json:
        print_json({"name": method, "description": inspect.getdoc(cls), "settings": fields})
        return
    print(f"{method}: {inspect.getdoc(cls)}\n")
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


def _title(method: object) -> str:
    return (inspect.getdoc(method) or "").partition("\n")[0]


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(one) for one in get_args(annotation))
    if annotation is NoneType:
        return "None"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
