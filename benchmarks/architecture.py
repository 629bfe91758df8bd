"""Draw `docs/architecture.svg`: the rooms of the package, from the import contract in `pyproject.toml`.

    python benchmarks/architecture.py

Each row is a layer of the contract: a room may use what lies below its row, and rooms of one row do not know each
other. What a room is stands in the first sentence of its docstring.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "synthquant"
PICTURE = ROOT / "docs" / "architecture.svg"

WIDTH, EDGE, GAP = 960, 12, 8
LINE, TITLE = 14, 18
# Mean width of a letter [pixels] at the size of the descriptions.
LETTER = 6.2
COLOURS = ("#eef3fb", "#f4f0fa", "#eef7f0", "#fdf5e8")


@dataclass(frozen=True)
class Room:
    """One package or module of the contract."""

    name: str
    about: str
    """Its docstring's first sentence."""
    doors: tuple[str, ...]
    """Optional packages that are only used here."""

    def lines(self, width: float) -> list[str]:
        """The description in lines that fit."""
        lines = textwrap.wrap(self.about, int((width - 16) / LETTER))
        return lines + textwrap.wrap(f"door to {', '.join(self.doors)}", int((width - 16) / LETTER)) * bool(self.doors)


def layers() -> list[list[Room]]:
    """The rooms by layer, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    doors: dict[str, list[str]] = {}
    for contract in contracts:
        for entry in contract.get("ignore_imports", ()):
            room = entry.partition(" ")[0].split(".")[1]
            named = entry.rpartition(" ")[2]
            for package in contract["forbidden_modules"] if named == "*" else [named]:
                if package not in doors.setdefault(room, []):
                    doors[room].append(package)
    rows = [row for row in contracts[0]["layers"] if not row.startswith("_")]  # `python -m` is a door of cli
    return [[find_room(name.strip(), doors) for name in row.split("|")] for row in rows]


def find_room(name: str, doors: dict[str, list[str]]) -> Room:
    """What the contract and the docstring say of a room."""
    path = PACKAGE / name / "__init__.py"
    source = path if path.is_file() else PACKAGE / f"{name}.py"
    text = (ast.get_docstring(ast.parse(source.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    return Room(name, text.split(". ")[0].rstrip(".").replace("`", ""), tuple(doors.get(name, ())))


def draw() -> str:
    """The picture as SVG."""
    top, parts = EDGE, []
    for index, row in enumerate(layers()):
        width = (WIDTH - 2 * EDGE - GAP * (len(row) - 1)) / len(row)
        height = max(len(room.lines(width)) for room in row) * LINE + TITLE + 14
        for place, one in enumerate(row):
            parts += box(one, EDGE + place * (width + GAP), top, width, height, COLOURS[index % len(COLOURS)])
        top += height + GAP
    size = f'width="{WIDTH}" height="{top + EDGE - GAP}" viewBox="0 0 {WIDTH} {top + EDGE - GAP}"'
    style = "text{font-family:sans-serif;font-size:11px;fill:#333}.name{font-size:13px;font-weight:bold;fill:#111}"
    title = "The rooms of synthquant: each uses only what lies below it"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{title}</title><style>{style}</style>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{top + EDGE}" fill="#fff"/>', *parts, "</svg>", ""])


def box(room: Room, left: float, top: float, width: float, height: float, colour: str) -> list[str]:
    """One room."""
    place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    lines = [f'<text class="name" x="{left + 8:g}" y="{top + TITLE:g}">{escape(room.name)}</text>']
    for number, line in enumerate(room.lines(width)):
        lines.append(f'<text x="{left + 8:g}" y="{top + TITLE + 2 + LINE * (number + 1):g}">{escape(line)}</text>')
    return [f'<rect {place} rx="5" fill="{colour}" stroke="#8a94a6"/>', *lines]


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE)
