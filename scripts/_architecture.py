"""Drawing of the package: one room per group of modules, one arrow per import between rooms.

``python scripts/_architecture.py`` writes ``docs/architecture.svg``; ``tests/test_architecture.py`` compares the file
with the imports of the code.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import NamedTuple

from _modules import MODULES, ROOT, imports, tree

DRAWING = ROOT / "docs" / "architecture.svg"

WIDTH, ROW, PADDING, LINE = 960, 44, 14, 15


class Room(NamedTuple):
    """A group of modules in the drawing.

    :param name: the heading.
    :param text: what the modules do.
    :param prefixes: modules and packages in the room; the longest prefix of a module decides.
    :param row: the row, counted from the bottom: a room imports from lower rows.
    :param column: the column, counted from the left.
    """

    name: str
    text: str
    prefixes: tuple[str, ...]
    row: int
    column: float


#: The packages of the clients, and the development broker.
TRANSPORTS = ("kser.python_kafka", "kser.confluent", "kser.dummy", "kser.embedded")

ROOMS = (
    Room("values", "errors, settings, policies, messages: every room imports them", ("kser",), 0, 0),
    Room("messages", "bytes to entrypoint to result", ("kser.attempt", "kser.entry", "kser.controller"), 1, 1),
    Room("store", "contract, rules, memory", ("kser.store",), 2, 0),
    Room("consumer", "records to attempts to commits", ("kser.consumer",), 2, 2),
    Room("producer", "messages to records", ("kser.producer",), 2, 3),
    Room("store/sql", "SQLite and PostgreSQL", ("kser.store.sql", "kser.store.__main__"), 3, 0),
    Room("sequencing", "tasks and operations", ("kser.sequencing",), 3, 1),
    Room("transports", "one package per client", TRANSPORTS, 3, 2.5),
    Room("durable", "stored operations", ("kser.durable",), 4, 1),
    Room("registry", "connects the parts", ("kser.sequencing.registry",), 5, 1),
)


#: The modules in the drawing.
DRAWN = [name for name in MODULES if ".migrations" not in name]

#: Packages, whose ``__init__`` defines nothing worth a name in the drawing.
PACKAGES = {name for name in DRAWN if MODULES[name].name == "__init__.py"}


def room_of(module: str) -> Room:
    """Return the room of a module: the one with the longest prefix of its name."""
    fitting = [
        (len(prefix), room)
        for room in ROOMS
        for prefix in room.prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fitting, key=lambda pair: pair[0])[1]


def arrows() -> Counter[tuple[str, str]]:
    """Count the imported names from room to room, except those of values.

    Imports inside functions do not count, because functions import only optional dependencies.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for module in DRAWN:
        room = room_of(module)
        for target in imports(tree(module), in_functions=False):
            if target in DRAWN and room_of(target) is not room and room_of(target).name != "values":
                counts[room.name, room_of(target).name] += 1
    return counts


def _lines(room: Room) -> list[str]:
    """Return the module names of a room, wrapped to its width."""
    lines = [""]
    for name in DRAWN:
        if room_of(name) is not room or name in ("kser", "kser.store.__main__") or name in PACKAGES:
            continue
        short = name.removeprefix("kser.") if room.prefixes == TRANSPORTS else name.rpartition(".")[2]
        if len(lines[-1]) + len(short) > (28 if room.row else 120) and lines[-1]:
            lines.append("")
        lines[-1] += f"{short}, "
    return [line.rstrip() for line in lines[:-1]] + [lines[-1].rstrip(", ")]


class Box(NamedTuple):
    """The place of a room in the drawing, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """The horizontal centre."""
        return self.left + self.width / 2


def _layout() -> tuple[dict[str, Box], float]:
    """Place the rooms in rows, the highest row on top, and return their boxes with the height of the drawing."""
    boxes: dict[str, Box] = {}
    top = float(PADDING)
    for row in sorted({room.row for room in ROOMS}, reverse=True):
        rooms = [room for room in ROOMS if room.row == row]
        for room in rooms:
            width = WIDTH / 4 - PADDING if row else WIDTH - PADDING
            left = room.column * WIDTH / 4 + PADDING / 2
            boxes[room.name] = Box(left, top, width, len(_lines(room)) * LINE + 46)
        top += max(boxes[room.name].height for room in rooms) + ROW
    return boxes, top - ROW + PADDING


def _arrow(source: Box, target: Box, count: int) -> str:
    """Draw the imports from one room to another as a curve that is as wide as they are many."""
    width = f"{min(0.8 + count / 8, 4):.1f}"
    y1, y2 = source.top + source.height, target.top
    shift = (source.middle - target.middle) / WIDTH * target.width * 0.6
    bend, end = (y1 + y2) / 2, target.middle + shift
    return (
        f'<path class="a" stroke-width="{width}" d="M{source.middle - shift * 0.4:.0f} {y1:.0f} '
        f'C{source.middle:.0f} {bend:.0f} {end:.0f} {bend:.0f} {end:.0f} {y2:.0f}"/>'
    )


STYLE = """\
  .kser-house text { font: 12px var(--font-stack, sans-serif); fill: var(--color-foreground-primary, #1a1a1a) }
  .kser-house .n { font-size: 13px; font-weight: 600 }
  .kser-house .t { font-size: 11px; fill: var(--color-foreground-secondary, #5a5c63) }
  .kser-house .m { font-size: 10.5px; font-family: var(--font-stack--monospace, monospace) }
  .kser-house .b { fill: var(--color-background-secondary, #f8f9fb); stroke: var(--color-foreground-border, #878787) }
  .kser-house .a { fill: none; stroke: var(--color-brand-primary, #0a4bff); opacity: 0.35; marker-end: url(#kser-head) }
  .kser-house .h { fill: var(--color-brand-primary, #0a4bff) }"""


def draw() -> str:
    """Return the drawing as SVG text."""
    boxes, height = _layout()
    title = "The modules of kser by room; arrows are imports, and they point down"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{title}"'
        f' class="kser-house" style="width: 100%; max-width: {WIDTH}px; margin: 1em auto; display: block">',
        f"<title>{title}</title>",
        f"<style>\n{STYLE}\n</style>",
        '<defs><marker id="kser-head" markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9" refX="8" refY="4.5"'
        ' orient="auto"><path class="h" d="M0 0 L9 4.5 L0 9 z"/></marker></defs>',
    ]
    parts += [_arrow(boxes[source], boxes[target], count) for (source, target), count in sorted(arrows().items())]
    for room in ROOMS:
        box = boxes[room.name]
        parts.append(f'<rect class="b" x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="6"/>')
        x = box.left + 10
        parts.append(f'<text class="n" x="{x}" y="{box.top + 19}">{escape(room.name)}</text>')
        parts.append(f'<text class="t" x="{x}" y="{box.top + 34}">{escape(room.text)}</text>')
        for number, line in enumerate(_lines(room)):
            y = box.top + 50 + number * LINE
            parts.append(f'<text class="m" x="{x}" y="{y}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
