"""Reader of the list of accepted differences, ``accepted_differences.txt``.

An entry is a heading, then the lines of the published package (``-``) and ours (``+``)::

    [B8 C3] operation_run / the_tasks_run_in_order x2
    - t1 runs PENDING
    + t1 runs RUNNING

The heading names the decisions, the scenario, the case (``*`` stands for any case of the scenario) and how often the
difference occurs there (default: once). Lines that begin with ``#`` are comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("accepted_differences.txt")

ANY_CASE = "*"

_HEADING = re.compile(
    r"\[(?P<ids>[A-Z]\d+[a-z]?(?: [A-Z]\d+[a-z]?)*)\] (?P<scenario>\w+) / (?P<case>\w+|\*)(?: x(?P<times>\d+))?"
)


@dataclass(frozen=True)
class Hunk:
    """A place in a case where the two traces differ."""

    case: str
    theirs: tuple[str, ...]
    ours: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*(f"- {line}" for line in self.theirs), *(f"+ {line}" for line in self.ours)])


@dataclass(frozen=True)
class Difference:
    """An accepted difference: a hunk with the decisions that require it."""

    ids: tuple[str, ...]
    scenario: str
    hunk: Hunk
    times: int = 1

    def __str__(self) -> str:
        times = f" x{self.times}" if self.times > 1 else ""
        return f"[{' '.join(self.ids)}] {self.scenario} / {self.hunk.case}{times}\n{self.hunk}"


def accepted_differences() -> list[Difference]:
    """Return all entries of the list."""
    return list(parse(LIST.read_text(encoding="utf-8")))


def parse(text: str) -> Iterator[Difference]:
    """Yield the entries of a list.

    :raises ValueError: a line is neither a heading nor part of an entry nor a comment.
    """
    heading: re.Match[str] | None = None
    theirs: list[str] = []
    ours: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.startswith("- ") and heading:
            theirs.append(line[2:])
        elif line.startswith("+ ") and heading:
            ours.append(line[2:])
        elif line.startswith("#"):
            continue
        elif found := _HEADING.fullmatch(line):
            if heading:
                yield _difference(heading, theirs, ours)
            heading, theirs, ours = found, [], []
        elif line:
            raise ValueError(f"line {number} of the list of differences cannot be read: {line!r}")
    if heading:
        yield _difference(heading, theirs, ours)


def _difference(heading: re.Match[str], theirs: list[str], ours: list[str]) -> Difference:
    if theirs == ours:
        raise ValueError(f"an entry of the list of differences has no difference: {heading.group()!r}")
    return Difference(
        ids=tuple(heading["ids"].split()),
        scenario=heading["scenario"],
        hunk=Hunk(heading["case"], tuple(theirs), tuple(ours)),
        times=int(heading["times"] or 1),
    )
