"""Table of crash points in the documentation, written from the outcome at each point."""

from __future__ import annotations

import csv
import io
from collections import defaultdict

from tests.crash.faults import KILLED_AFTER, KILLED_BEFORE, POINTS, REFUSED, SLEPT_AFTER, SLEPT_BEFORE, UNKNOWN
from tests.crash.invariants import doubled
from tests.crash.simulation import Simulation

COLUMNS = ("Point", "What goes wrong", "In the database then", "What happens next", "Doubled runs at most", "Cases")

#: What goes wrong, for readers.
WORDS = {
    REFUSED: "the call is rejected",
    UNKNOWN: "the call takes effect without a confirmation",
    KILLED_BEFORE: "killed before the call",
    KILLED_AFTER: "killed after the call",
    SLEPT_BEFORE: "stopped before the call, continues later",
    SLEPT_AFTER: "stopped after the call, continues later",
}


class Table:
    """Counts what was seen."""

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._next: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._doubled: dict[tuple[str, str], int] = defaultdict(int)
        self._cases: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, simulation: Simulation) -> None:
        """Add a run with one fault."""
        for fault, call in simulation.hits:
            key = call.point, fault.kind
            self._cases[key] += 1
            self._doubled[key] = max(self._doubled[key], doubled(simulation))
            for story in simulation.stories:
                self._stored[key].add(story.stored)
                self._next[key].add(story.next or "nothing: the operation has ended")

    @property
    def missing(self) -> list[tuple[str, str]]:
        """What was never hit."""
        return [(point, kind) for point, kinds in POINTS.items() for kind in kinds if not self._cases[point, kind]]

    def text(self) -> str:
        """The table."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for point, kinds in POINTS.items():
            for kind in kinds:
                key = point, kind
                stored, following = ("; ".join(sorted(found[key])) for found in (self._stored, self._next))
                words = WORDS.get(kind, "the record is lost")
                writer.writerow((point, words, stored, following, self._doubled[key], self._cases[key]))
        return out.getvalue()
