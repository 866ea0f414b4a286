"""The figures of runs, one row per run, for the table in the documentation."""

from __future__ import annotations

import csv
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.chaos import ledger
from tests.chaos_operations import promises
from tests.chaos_operations.orders import CANCELLED, LAUNCH, MESSAGE_DISTRIBUTED
from tests.chaos_operations.run import Outcome

#: The variable with the path of the file to which runs add their rows.
TABLE = "KSER_TEST_OPERATIONS_TABLE"


def row(outcome: Outcome) -> dict[str, str]:
    """Return the figures of a run."""
    history = outcome.history
    statuses = Counter(operation.status for operation in history.stored.values())
    events = Counter(event.kind for operation in history.stored.values() for event in operation.events)
    causes = promises.reruns_by_cause(history)
    forbidden = causes.pop("no cause", 0)
    distributed = sum(order.way in (LAUNCH, MESSAGE_DISTRIBUTED) for order in history.orders)
    values = {
        "Database": outcome.database,
        "Seed": outcome.seed,
        "Seconds": f"{outcome.seconds:.0f}",
        "Processes": outcome.processes,
        "Operations": len(history.orders),
        "Over the consumers": distributed,
        "Succeeded": statuses["SUCCESS"],
        "Cancelled": f"{statuses['CANCELLED']} of {sum(order.kind == CANCELLED for order in history.orders)}",
        "Resumed": len(history.resumed),
        "Not ended": sum(operation.ended is None for operation in history.stored.values()),
        "Tasks begun": sum(entry.event == ledger.START for entry in history.entries),
        "Attempts recorded": sum(len(operation.attempts) for operation in history.stored.values()),
        "Sent again by the reaper": events["sent-again"],
        "Faults that hit": _counts_text(outcome.hits),
        "Run again, allowed": _counts_text(causes),
        "Run again, not allowed": forbidden,
        "Seconds from a kill until its task was sent again": _times_text(promises.recovery_times(history)),
        "Promises broken": len(outcome.violations),
        "Longest pause, s": f"{promises.longest_pause(history):.1f}",
    }
    return {name: str(value) for name, value in values.items()}


def _times_text(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.1f}, at most {numbers[-1]:.1f}" if numbers else "none"


def _counts_text(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"


def text(outcome: Outcome) -> str:
    """Return the figures as lines."""
    return "\n".join(f"{name + ':':<50} {value}" for name, value in row(outcome).items())


def add_to_table(outcomes: Iterable[Outcome], path: Path | None = None) -> None:
    """Add the figures to a CSV file for the directive ``csv-table`` of reStructuredText; a new file gets the header.

    :param path: the file; if None, the one that ``KSER_TEST_OPERATIONS_TABLE`` names, if any.
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
