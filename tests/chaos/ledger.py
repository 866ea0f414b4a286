"""The ledger: what tasks note about themselves, in a file that survives whatever happens to their process.

Each line is ``event subject process monotonic-seconds``. The clock is the one that all processes of a machine share.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

#: A task began, and ended well.
START, END = "start", "end"
#: An attempt failed: with an exception, and with SystemExit.
FAIL, EXIT = "fail", "exit"
#: A payload was refused, which is nobody's task.
REFUSED = "refused"
#: A process has imported everything and begins to consume.
UP = "up"

#: Bytes at the end of a ledger in which tasks that run now have noted their beginning.
RECENT = 1 << 14
#: Seconds after which a task that still runs is one of the longer ones.
MOMENT = 0.05


class Entry(NamedTuple):
    """One line."""

    event: str
    subject: str
    process: str
    at: float
    #: The size of the ledger up to and including this line.
    position: int


class Ledger:
    """Where one process notes."""

    def __init__(self, path: Path | str, process: str) -> None:
        self._process = process
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, event: str, subject: str = "-") -> None:
        """Append one line; it is with the system when this returns, so a killed process has noted all that it did."""
        os.write(self._descriptor, f"{event} {subject} {self._process} {time.monotonic():.6f}\n".encode())


def size(path: Path) -> int:
    """How much was noted so far."""
    return path.stat().st_size if path.exists() else 0


def read(path: Path) -> list[Entry]:
    """What was noted, in order; a line that is being written is left out."""
    entries: list[Entry] = []
    position = 0
    data = path.read_bytes() if path.exists() else b""
    for line in data.split(b"\n")[:-1]:
        position += len(line) + 1
        event, subject, process, at = line.decode().split()
        entries.append(Entry(event, subject, process, float(at), position))
    return entries


def running(path: Path, process: str) -> dict[str, float]:
    """What a process runs, and since when, as far as the last lines tell."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, size(path) - RECENT))
        # The first one may be cut off, and the last may be incomplete.
        lines = [line.decode().split() for line in file.read().split(b"\n")[1:-1]]
    found: dict[str, float] = {}
    for event, subject, who, at in lines:
        if who == process and event == START:
            found[subject] = float(at)
        elif who == process:
            found.pop(subject, None)
    return found


def is_busy(path: Path, process: str) -> bool:
    """Whether a process runs a task that will not be over in a moment."""
    return min(running(path, process).values(), default=math.inf) < time.monotonic() - MOMENT
