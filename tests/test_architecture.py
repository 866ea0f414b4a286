"""Tests of the drawing in the documentation: it shows the imports of the code, and they point down."""

from __future__ import annotations

import _architecture as architecture


def test_drawing_is_up_to_date() -> None:
    drawn = architecture.DRAWING.read_text(encoding="utf-8")
    assert drawn == architecture.draw(), "run python scripts/_architecture.py"


def test_arrows_of_the_drawing_point_down() -> None:
    rows = {component.name: component.row for component in architecture.COMPONENTS}
    arrows = architecture.arrows()
    assert arrows
    assert {(source, target) for source, target in arrows if rows[source] <= rows[target]} == set()
