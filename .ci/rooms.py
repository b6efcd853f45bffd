"""Draws docs/rooms.svg: the rooms of the house, and who imports whom, read from the imports themselves.

    python .ci/rooms.py            draws it again (`make format` does that, too)
    python .ci/rooms.py --check    exit status 1 if the picture is not of today's imports

A room is a folder of `coordinator/` or `cache/`; its sentence is the first line of its `__init__`. A room
lies above all that it imports, and directly under the lowest that imports it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from textwrap import wrap

from product import ROOT, Module, arrows, modules

PICTURE = ROOT / "docs" / "rooms.svg"
WIDTH, MARGIN, GAP, ROW_GAP, PADDING = 1000, 16, 10, 26, 10
LINE, SMALL_LINE = 16, 14
LETTER, SMALL_LETTER = 7.2, 6.4  # mean width of a letter of the two sizes in a wide font, px
PANELS = {"coordinator": (MARGIN, 552), "cache": (MARGIN + 552 + 24, 392)}  # left edge, width
GROUND = "ground"  # of the cache: single files, and the scripts
DOORS = "doors"  # of the coordinator: single files
STYLE = """\
    .page { fill: #ffffff } .panel { fill: #f1f4f8 } .room { fill: #ffffff; stroke: #7a8797 }
    text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1c2530 }
    .name { font-weight: 600; font-size: 14px } .head { font-weight: 600; font-size: 15px; fill: #45566b }
    .uses { font-size: 11.5px; fill: #0b62a8 } .note { font-size: 12px; fill: #45566b }
    .arrow { fill: none; stroke: #5f6f82; stroke-width: 1.4; marker-end: url(#head) }
    #head path { fill: #5f6f82 }
    @media (prefers-color-scheme: dark) {
      .page { fill: #11161d } .panel { fill: #1a212b } .room { fill: #242d39; stroke: #6d7b8d }
      text { fill: #e3e8ee } .head, .note { fill: #a9b7c8 } .uses { fill: #7cc0ff }
      .arrow { stroke: #97a6b8 } #head path { fill: #97a6b8 }
    }"""


@dataclass
class Room:
    """One box.

    Attributes:
        panel: "coordinator" or "cache".
        name: as it is written on the box.
        sentence: what it is for.
        below: the rooms of its panel that it imports.
        uses: the rooms of the other panel that it imports.
        floor: how far up it lies.
    """

    panel: str
    name: str
    sentence: str
    below: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    floor: int = 0


def home(module: Module) -> tuple[str, str] | None:
    """(panel, room) of a module; None for what only opens the three packages' old names."""
    parts = module.name.split(".")[1:]
    if parts == ["doors"]:
        return None
    if not parts or parts[0] in ("__main__", "tasks"):
        return "coordinator", "tasks/" if parts[:1] == ["tasks"] else "torchord/"
    panel, inside = parts[0], parts[1:]
    if panel == "cache" and not inside:
        return None
    single = len(inside) < 2 and module.path.name != "__init__.py"
    if panel == "coordinator" and (single or not inside):
        return panel, DOORS
    if panel == "cache" and (single or inside[0] == "scripts"):
        return panel, GROUND
    return panel, f"{inside[0]}/"


def rooms() -> dict[tuple[str, str], Room]:
    """Every room by (panel, name), with what it imports, on its floor."""
    known, graph = modules(), arrows()
    found: dict[tuple[str, str], Room] = {}
    singles: dict[str, list[str]] = {DOORS: [], GROUND: []}
    for module in known.values():
        place = home(module)
        if place is None:
            continue
        room = found.setdefault(place, Room(*place, ""))
        if place[1] in singles:
            name = module.path.parent.name if module.path.name == "__init__.py" else module.path.stem
            singles[place[1]].append("" if name == "coordinator" else name)
        elif module.path.name == "__init__.py" and not room.sentence:
            room.sentence = (ast.get_docstring(module.tree) or "").partition("\n")[0].replace("`", "")
        for name in graph[module.name]:
            target = home(known[name])
            if target is not None and target != place:
                (room.below if target[0] == place[0] else room.uses).add(target[1])
    for room in found.values():
        if room.name in singles:
            room.sentence = ", ".join(sorted(filter(None, singles[room.name])))
    for panel in PANELS:
        _raise_to_floors({room.name: room for room in found.values() if room.panel == panel})
    return found


def _raise_to_floors(panel: dict[str, Room]) -> None:
    """Put each room above what it imports, then up to right below the lowest that imports it."""
    order: list[Room] = []

    def visit(room: Room) -> None:
        if room in order:
            return
        for name in sorted(room.below):
            visit(panel[name])
        room.floor = 1 + max((panel[name].floor for name in room.below), default=-1)
        order.append(room)

    for name in sorted(panel):
        visit(panel[name])
    for room in reversed(order):
        above = [other.floor for other in order if room.name in other.below]
        room.floor = min(above) - 1 if above else room.floor


def _needed(panel: dict[str, Room], room: Room) -> list[str]:
    """The arrows that do not follow from others."""

    def reached(name: str) -> set[str]:
        return set().union(*({below} | reached(below) for below in panel[name].below))

    return sorted(room.below - set().union(*(reached(name) for name in room.below)))


# --- drawing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """Where a room is drawn, in px, and its lines."""

    room: Room
    left: float
    top: float
    width: float
    height: float
    sentence: list[str]
    uses: list[str]

    def drawn(self) -> list[str]:
        """Its elements."""
        x, y = self.left + PADDING, self.top + 19
        found = [
            f'<rect class="room" x="{self.left:g}" y="{self.top:g}" width="{self.width:g}" '
            f'height="{self.height:g}" rx="5"/>',
            f'<text class="name" x="{x:g}" y="{y:g}">{escape(self.room.name)}</text>',
        ]
        for kind, lines, step in (("", self.sentence, LINE), ("uses", self.uses, SMALL_LINE)):
            for line in lines:
                y += step
                style = f' class="{kind}"' if kind else ""
                found.append(f'<text{style} x="{x:g}" y="{y:g}">{escape(line)}</text>')
        return found


def _lines(room: Room, space: float) -> tuple[list[str], list[str]]:
    """(sentence, rooms of the cache) of a room, broken so that they take no more than `space` px."""
    uses = f"cache: {', '.join(name.rstrip('/') for name in sorted(room.uses))}" if room.uses else ""
    return wrap(room.sentence, int(space / LETTER)), wrap(uses, int(space / SMALL_LETTER))


def _boxes(panel: dict[str, Room], left: float, width: float, top: float) -> tuple[dict[str, Box], float]:
    """The boxes of a panel, floor by floor, and where they end."""
    boxes: dict[str, Box] = {}

    def under(room: Room) -> tuple[float, str]:
        """Where on its floor a room lies: below those that import it, so that few arrows cross."""
        above = [box.left + box.width / 2 for box in boxes.values() if room.name in _needed(panel, box.room)]
        return sum(above) / len(above) if above else 0.0, room.name

    for floor in sorted({room.floor for room in panel.values()}, reverse=True):
        row = sorted((room for room in panel.values() if room.floor == floor), key=under)
        each = (width - GAP * (len(row) + 1)) / len(row)
        texts = [_lines(room, each - 2 * PADDING) for room in row]
        height = 28 + max(LINE * len(sentence) + SMALL_LINE * len(uses) for sentence, uses in texts)
        for number, (room, (sentence, uses)) in enumerate(zip(row, texts, strict=True)):
            x = left + GAP + number * (each + GAP)
            boxes[room.name] = Box(room, round(x, 1), top, round(each, 1), height, sentence, uses)
        top += height + ROW_GAP
    return boxes, top - ROW_GAP


def _arrow(upper: Box, lower: Box, boxes: Iterable[Box]) -> str:
    """A line from a box to one below, upright where their edges overlap, and past the boxes on its way."""
    left, right = max(upper.left, lower.left), min(upper.left + upper.width, lower.left + lower.width)
    if right - left > 20:
        start = end = (left + right) / 2
    else:
        start, end = upper.left + upper.width / 2, lower.left + lower.width / 2
    points = [(start, upper.top + upper.height)]
    floors: dict[float, list[Box]] = {}
    for box in boxes:
        if upper.top < box.top < lower.top:
            floors.setdefault(box.top, []).append(box)
    for top, row in sorted(floors.items()):
        gap = min((box.left - GAP / 2 for box in row), key=lambda x: abs(x - end))
        points += [(gap, top - GAP / 2), (gap, top + row[0].height + GAP / 2)]
    points.append((end, lower.top - 2))
    return f'<path class="arrow" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def drawn() -> str:
    """The picture as SVG text."""
    house = rooms()
    body: list[str] = []
    bottom = 0.0
    for name, (left, width) in PANELS.items():
        panel = {room.name: room for room in house.values() if room.panel == name}
        boxes, end = _boxes(panel, left, width, MARGIN + 34)
        bottom = max(bottom, end + GAP)
        title = "torchord/, tasks/ and coordinator/" if name == "coordinator" else "cache/"
        body.append(f'<text class="head" x="{left + GAP}" y="{MARGIN + 23}">{title}</text>')
        arrows_of = [(boxes[room], boxes[below]) for room in panel for below in _needed(panel, panel[room])]
        body += [_arrow(upper, lower, boxes.values()) for upper, lower in arrows_of]
        body += [line for box in boxes.values() for line in box.drawn()]
    panels = [
        f'<rect class="panel" x="{left}" y="{MARGIN}" width="{width}" height="{bottom - MARGIN:g}" rx="8"/>'
        for left, width in PANELS.values()
    ]
    notes = [
        "An arrow: the upper room imports the lower one. What follows from two others is left out.",
        "Blue: the rooms of cache/ that a room imports itself. The cache imports nothing from the left.",
    ]
    for number, note in enumerate(notes):
        body.append(f'<text class="note" x="{MARGIN}" y="{bottom + 22 + 17 * number:g}">{note}</text>')
    height = bottom + 22 + 17 * len(notes)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" aria-label="The rooms of torchord and their imports">',
            f"  <style>\n{STYLE}\n  </style>",
            '  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            f'  <rect class="page" width="{WIDTH}" height="{height:g}"/>',
            *(f"  {line}" for line in [*panels, *body]),
            "</svg>",
            "",
        ]
    )


def main() -> int:
    """Draw, or check what was drawn."""
    if sys.argv[1:] == ["--check"]:
        if PICTURE.read_text(encoding="utf-8") != drawn():
            print("docs/rooms.svg is not of today's imports: run `make format`")
            return 1
        return 0
    PICTURE.write_text(drawn(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
