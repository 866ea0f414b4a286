"""The ledger: a file of the starts and ends of tasks, which survives any fault of their process.

Each line is ``event subject process monotonic-seconds``. All processes of a machine share this clock.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from time import monotonic
from typing import NamedTuple

#: A task started, and a task succeeded.
START, END = "start", "end"
#: An attempt failed with an exception, and an attempt failed with SystemExit.
FAIL, EXIT = "fail", "exit"
#: A payload was rejected because it is no message for a task.
REFUSED = "refused"
#: A process has imported its modules and starts to consume.
UP = "up"

#: The number of bytes at the end of a ledger that contain the starts of all running tasks.
TAIL_BYTES = 1 << 14
#: Seconds after which a task that still runs counts as long.
LONG_TASK_SECONDS = 0.05


class Entry(NamedTuple):
    """One line of a ledger."""

    event: str
    subject: str
    process: str
    at: float
    #: The size of the ledger in bytes up to and including this line.
    position: int


class Ledger:
    """The ledger as one process writes to it."""

    def __init__(self, path: Path | str, process: str) -> None:
        self._process = process
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, event: str, subject: str = "-") -> None:
        """Append one line, without a buffer, so that the line survives the process."""
        os.write(self._descriptor, f"{event} {subject} {self._process} {monotonic():.6f}\n".encode())


def size(path: Path) -> int:
    """Return the size of a ledger in bytes."""
    return path.stat().st_size if path.exists() else 0


def read(path: Path) -> list[Entry]:
    """Return the entries in order, without an incomplete last line."""
    entries: list[Entry] = []
    position = 0
    data = path.read_bytes() if path.exists() else b""
    for line in data.split(b"\n")[:-1]:
        position += len(line) + 1
        event, subject, process, at = line.decode().split()
        entries.append(Entry(event, subject, process, float(at), position))
    return entries


def running(path: Path, process: str) -> dict[str, float]:
    """Return the subjects that a process runs, with their start times, from the end of the ledger."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, size(path) - TAIL_BYTES))
        # The first line may be cut off, and the last line may be incomplete.
        lines = [line.decode().split() for line in file.read().split(b"\n")[1:-1]]
    started: dict[str, float] = {}
    for event, subject, writer, at in lines:
        if writer == process and event == START:
            started[subject] = float(at)
        elif writer == process:
            started.pop(subject, None)
    return started


def is_busy(path: Path, process: str) -> bool:
    """Return whether a process runs a long task, which a fault can hit."""
    return min(running(path, process).values(), default=math.inf) < monotonic() - LONG_TASK_SECONDS
