"""Table of crash points in the documentation, written from the recovery at each crash point."""

from __future__ import annotations

import csv
import io
from collections import defaultdict

from tests.crash.faults import (
    CRASH_POINTS,
    KILLED_AFTER,
    KILLED_BEFORE,
    RECORD_LOST,
    REFUSED,
    REPLY_LOST,
    STALLED_AFTER,
    STALLED_BEFORE,
)
from tests.crash.invariants import duplicate_runs
from tests.crash.simulation import Simulation

COLUMNS = ("Point", "What goes wrong", "In the database then", "What happens next", "Doubled runs at most", "Cases")

#: The texts of the faults in the table.
DESCRIPTIONS = {
    REFUSED: "the call is rejected",
    REPLY_LOST: "the call takes effect without a confirmation",
    RECORD_LOST: "the record is lost",
    KILLED_BEFORE: "killed before the call",
    KILLED_AFTER: "killed after the call",
    STALLED_BEFORE: "stopped before the call, continues later",
    STALLED_AFTER: "stopped after the call, continues later",
}


class CrashPointTable:
    """The recoveries of many runs, grouped by crash point and kind of fault."""

    def __init__(self) -> None:
        self._stored_states: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._continuations: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._duplicates: dict[tuple[str, str], int] = defaultdict(int)
        self._cases: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, simulation: Simulation) -> None:
        """Add a run with one fault."""
        for fault, call in simulation.injected:
            key = call.crash_point, fault.kind
            self._cases[key] += 1
            self._duplicates[key] = max(self._duplicates[key], duplicate_runs(simulation))
            for recovery in simulation.recoveries:
                self._stored_states[key].add(recovery.stored_state)
                self._continuations[key].add(recovery.continued_by or "nothing: the operation has ended")

    @property
    def missing(self) -> list[tuple[str, str]]:
        """The crash points and faults without a case."""
        return [
            (point, kind) for point, kinds in CRASH_POINTS.items() for kind in kinds if not self._cases[point, kind]
        ]

    def text(self) -> str:
        """Return the table as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for point, kinds in CRASH_POINTS.items():
            for kind in kinds:
                key = point, kind
                stored_states = "; ".join(sorted(self._stored_states[key]))
                continuations = "; ".join(sorted(self._continuations[key]))
                writer.writerow(
                    (point, DESCRIPTIONS[kind], stored_states, continuations, self._duplicates[key], self._cases[key])
                )
        return out.getvalue()
