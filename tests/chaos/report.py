"""The figures of runs, one row per run, for the table in the documentation."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.chaos import ledger, promises
from tests.chaos.run import Outcome

#: The variable with the path of the file to which runs add their rows.
TABLE = "KSER_TEST_CHAOS_TABLE"

HEADER = (
    "Run",
    "Client",
    "Seed",
    "Seconds",
    "Processes",
    "Messages",
    "Done",
    "Dead-lettered",
    "Missing",
    "Faults that hit",
    "Doubled, allowed",
    "Doubled, not allowed",
    "Out of order",
    "Offsets sampled",
    "Committed too far",
    "Longest pause, s",
)


def row(outcome: Outcome) -> dict[str, str]:
    """Return the figures of one group in one run."""
    history = outcome.history
    done = {entry.subject for entry in history.entries if entry.event == ledger.END}
    dead = {letter.subject for letter in history.dead}
    duplicates = promises.duplicates(history)
    values = (
        outcome.name,
        outcome.transport.replace("python_kafka", "kafka-python"),
        outcome.seed,
        f"{outcome.seconds:.0f}",
        outcome.processes,
        len(history.log),
        len(done),
        len(dead),
        sum(record.subject not in history.finished for record in history.log),
        _counts_text(outcome.hits),
        _counts_text(promises.duplicates_by_cause(history)),
        len({duplicate.subject for duplicate in duplicates if duplicate.cause is None}),
        len(promises.overtaken(history)) + len(promises.overlapping(history)),
        sum(sample.committed is not None for sample in history.samples),
        len(promises.covered_unfinished(history)),
        f"{promises.longest_pause(history):.1f}",
    )
    return dict(zip(HEADER, map(str, values), strict=True))


def _counts_text(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"


def text(outcome: Outcome) -> str:
    """Return the figures as lines."""
    return "\n".join(f"{name + ':':<22} {value}" for name, value in row(outcome).items())


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the figures as CSV, for the directive ``csv-table`` of reStructuredText."""
    file = io.StringIO()
    writer = csv.DictWriter(file, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(outcome) for outcome in outcomes)
    return file.getvalue()


def add_to_table(outcomes: Iterable[Outcome]) -> None:
    """Add the figures to the file that ``KSER_TEST_CHAOS_TABLE`` names; a new file gets the header first."""
    if name := os.environ.get(TABLE):
        path = Path(name)
        header, _, rows = table(outcomes).partition("\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(rows if path.stat().st_size else f"{header}\n{rows}")
