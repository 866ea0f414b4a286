"""The figures of runs, as a row of a table each; the documentation shows the table."""

from __future__ import annotations

import csv
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.chaos import ledger
from tests.chaos_operations import promises
from tests.chaos_operations.orders import CANCELLED, LAUNCH, SPREAD
from tests.chaos_operations.run import Outcome

#: Where runs add their rows to, when it is set.
TABLE = "KSER_TEST_OPERATIONS_TABLE"


def row(outcome: Outcome) -> dict[str, str]:
    """The figures of a run."""
    history = outcome.history
    statuses = Counter(kept.status for kept in history.kept.values())
    events = Counter(kind for kept in history.kept.values() for kind, _, _ in kept.events)
    causes = promises.caused(history)
    forbidden = causes.pop("no cause", 0)
    spread = sum(order.way in (LAUNCH, SPREAD) for order in history.orders)
    values = {
        "Database": outcome.database,
        "Seed": outcome.seed,
        "Seconds": f"{outcome.seconds:.0f}",
        "Processes": outcome.processes,
        "Operations": len(history.orders),
        "Over the consumers": spread,
        "Succeeded": statuses["SUCCESS"],
        "Cancelled": f"{statuses['CANCELLED']} of {sum(order.kind == CANCELLED for order in history.orders)}",
        "Resumed": len(history.resumed),
        "Not ended": sum(kept.ended is None for kept in history.kept.values()),
        "Tasks begun": sum(entry.event == ledger.START for entry in history.entries),
        "Attempts recorded": sum(len(kept.attempts) for kept in history.kept.values()),
        "Sent again by the reaper": events["sent-again"],
        "Faults that hit": _counted(outcome.hits),
        "Run again, allowed": _counted(causes),
        "Run again, not allowed": forbidden,
        "Seconds from a kill until its task was sent again": _spread(promises.waits(history)),
        "Promises broken": len(outcome.broken),
        "Longest pause, s": f"{promises.longest_pause(history):.1f}",
    }
    return {name: str(value) for name, value in values.items()}


def _spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.1f}, at most {numbers[-1]:.1f}" if numbers else "none"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"


def text(outcome: Outcome) -> str:
    """The figures for people."""
    return "\n".join(f"{name + ':':<50} {value}" for name, value in row(outcome).items())


def add_to_table(outcomes: Iterable[Outcome], path: Path | None = None) -> None:
    """Add the figures to a file that begins with the header, as ``csv-table`` of reStructuredText reads it.

    :param path: the file; the one that ``KSER_TEST_OPERATIONS_TABLE`` names when None, if any.
    """
    name = path or os.environ.get(TABLE)
    if not name:
        return
    with Path(name).open("a", encoding="utf-8", newline="") as file:
        for figures in map(row, outcomes):
            writer = csv.DictWriter(file, list(figures), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(figures)
