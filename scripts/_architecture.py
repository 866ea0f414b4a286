"""Draw the architecture of the package: one box per component, and one arrow for the imports between two components.

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


class Component(NamedTuple):
    """A component: a group of modules that the drawing shows as one box.

    :param name: the heading of the box.
    :param text: the purpose of the modules.
    :param prefixes: the modules and packages of the component. The longest matching prefix decides to which component a
        module belongs.
    :param row: the row, counted from the bottom. A component imports only from lower rows.
    :param column: the column, counted from the left.
    """

    name: str
    text: str
    prefixes: tuple[str, ...]
    row: int
    column: float


#: The packages of the clients, and the development broker.
TRANSPORTS = ("kser.python_kafka", "kser.confluent", "kser.dummy", "kser.embedded")

COMPONENTS = (
    Component("values", "errors, settings, policies, messages: every component imports this one", ("kser",), 0, 0),
    Component("messages", "bytes to entrypoint to result", ("kser.attempt", "kser.entry", "kser.controller"), 1, 1),
    Component("store", "contract, rules, memory", ("kser.store",), 2, 0),
    Component("consumer", "records to attempts to commits", ("kser.consumer",), 2, 2),
    Component("producer", "messages to records", ("kser.producer",), 2, 3),
    Component("store/sql", "SQLite and PostgreSQL", ("kser.store.sql", "kser.store.__main__"), 3, 0),
    Component("sequencing", "tasks and operations", ("kser.sequencing",), 3, 1),
    Component("transports", "one package per client", TRANSPORTS, 3, 2.5),
    Component("durable", "stored operations", ("kser.durable",), 4, 1),
    Component("registry", "connects the parts", ("kser.sequencing.registry",), 5, 1),
)


#: The modules in the drawing.
DRAWN = [name for name in MODULES if ".migrations" not in name]

#: Packages. The drawing omits their ``__init__`` modules, because these define nothing.
PACKAGES = {name for name in DRAWN if MODULES[name].name == "__init__.py"}


def component_of(module: str) -> Component:
    """Return the component of a module: the component with the longest prefix of the module's name."""
    fitting = [
        (len(prefix), component)
        for component in COMPONENTS
        for prefix in component.prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fitting, key=lambda pair: pair[0])[1]


def arrows() -> Counter[tuple[str, str]]:
    """Count the imported names between components, except names from the component ``values``.

    Imports inside functions do not count, because functions import only optional dependencies.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for module in DRAWN:
        component = component_of(module)
        for target in imports(tree(module), in_functions=False):
            if target in DRAWN and component_of(target) is not component and component_of(target).name != "values":
                counts[component.name, component_of(target).name] += 1
    return counts


def _lines(component: Component) -> list[str]:
    """Return the names of a component's modules, wrapped to the width of its box."""
    lines = [""]
    for name in DRAWN:
        if component_of(name) is not component or name in ("kser", "kser.store.__main__") or name in PACKAGES:
            continue
        short = name.removeprefix("kser.") if component.prefixes == TRANSPORTS else name.rpartition(".")[2]
        if len(lines[-1]) + len(short) > (28 if component.row else 120) and lines[-1]:
            lines.append("")
        lines[-1] += f"{short}, "
    return [line.rstrip() for line in lines[:-1]] + [lines[-1].rstrip(", ")]


class Box(NamedTuple):
    """The position and size of a component's box in the drawing, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """The horizontal centre of the box."""
        return self.left + self.width / 2


def _layout() -> tuple[dict[str, Box], float]:
    """Place the components in rows, the highest row on top, and return their boxes with the height of the drawing."""
    boxes: dict[str, Box] = {}
    top = float(PADDING)
    for row in sorted({component.row for component in COMPONENTS}, reverse=True):
        components = [component for component in COMPONENTS if component.row == row]
        for component in components:
            width = WIDTH / 4 - PADDING if row else WIDTH - PADDING
            left = component.column * WIDTH / 4 + PADDING / 2
            boxes[component.name] = Box(left, top, width, len(_lines(component)) * LINE + 46)
        top += max(boxes[component.name].height for component in components) + ROW
    return boxes, top - ROW + PADDING


def _arrow(source: Box, target: Box, count: int) -> str:
    """Draw the imports from one component to another as one curve; more imports make it wider."""
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
    title = "The modules of kser by component; each arrow shows imports and points down"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{title}"'
        f' class="kser-house" style="width: 100%; max-width: {WIDTH}px; margin: 1em auto; display: block">',
        f"<title>{title}</title>",
        f"<style>\n{STYLE}\n</style>",
        '<defs><marker id="kser-head" markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9" refX="8" refY="4.5"'
        ' orient="auto"><path class="h" d="M0 0 L9 4.5 L0 9 z"/></marker></defs>',
    ]
    parts += [_arrow(boxes[source], boxes[target], count) for (source, target), count in sorted(arrows().items())]
    for component in COMPONENTS:
        box = boxes[component.name]
        parts.append(f'<rect class="b" x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="6"/>')
        x = box.left + 10
        parts.append(f'<text class="n" x="{x}" y="{box.top + 19}">{escape(component.name)}</text>')
        parts.append(f'<text class="t" x="{x}" y="{box.top + 34}">{escape(component.text)}</text>')
        for number, line in enumerate(_lines(component)):
            y = box.top + 50 + number * LINE
            parts.append(f'<text class="m" x="{x}" y="{y}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
