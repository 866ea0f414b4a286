"""Runs a scenario with the published package and with ours, and compares the two traces with the list."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import kser
from kser.embedded import EmbeddedBroker

from .accepted_differences import ANY_CASE, Difference, Hunk
from .published_package import ROOT
from .recorder import CASE_MARK

HERE = Path(__file__).parent
SCENARIOS = HERE / "scenarios"

_TIMEOUT_SECONDS = 120


class ScenarioBroken(Exception):
    """A scenario did not run to its end, so there is nothing to compare."""


@dataclass(frozen=True)
class Comparison:
    """The result for a scenario: differences that are not in the list, and entries without a difference."""

    unlisted: list[Hunk]
    stale: list[Difference]

    def problems(self, scenario: str) -> str:
        """Return a text that lists them in the format of the list, or an empty text."""
        texts = [f"a difference that is not in the list:\n[??] {scenario} / {h.case}\n{h}" for h in self.unlisted]
        texts += [f"an entry that no longer matches:\n{entry}" for entry in self.stale]
        return "\n\n".join(texts)


def scenario_names() -> list[str]:
    """Return the names of all scenarios."""
    return sorted(path.stem for path in SCENARIOS.glob("*.py"))


def rows_of(scenario: str) -> dict[str, list[str]]:
    """Return the rows that each case of a scenario names, read without running it."""
    tree = ast.parse((SCENARIOS / f"{scenario}.py").read_text(encoding="utf-8"))
    return {
        function.name: [ast.literal_eval(row) for row in decorator.args]
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "case"
    }


@functools.cache
def topics_of(scenario: str) -> tuple[str, ...]:
    """Return the topics that a scenario declares; a scenario with topics gets a broker."""
    tree = ast.parse((SCENARIOS / f"{scenario}.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "TOPICS":
            return tuple(ast.literal_eval(statement.value))
    return ()


def traces(scenario: str, published: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the traces of a scenario with the published package and with ours, which run concurrently.

    :param published: the interpreter of the published package.
    :param folder: gets one folder for each of the two.
    """
    # Fill the cache first: Python 3.11 may fail to parse in two threads at the same time.
    topics_of(scenario)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(trace, scenario, published, folder / "theirs", {"PYTHONPATH": str(HERE)})
        second = pool.submit(trace, scenario, Path(sys.executable), folder / "ours", environment_of_ours())
        return first.result(), second.result()


def environment_of_ours() -> dict[str, str]:
    """Return the environment variables with which an interpreter imports our package."""
    package = Path(kser.__file__).parents[1]
    return {
        "PYTHONPATH": os.pathsep.join((str(HERE), str(package))),
        "DIFFERENTIAL_SETUP": str(ROOT / "setup.py"),
        # Measure the coverage in the scenarios too.
        **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")},
    }


def trace(scenario: str, python: Path, folder: Path, variables: dict[str, str]) -> list[str]:
    """Run a scenario in an interpreter and return the lines that it printed.

    :raises ScenarioBroken: the scenario ended with an error, printed nothing, or did not end.
    """
    (folder / "lock").mkdir(parents=True)
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LOCK_PATH": str(folder / "lock"),
        # The default names contain the name of the host.
        "RUNNING_FILE": str(folder / "lock" / "run.lock"),
        "LOCK_FILE": str(folder / "lock" / "pause.lock"),
        "TERMINATE_FILE": str(folder / "lock" / "terminate.lock"),
        "DIFFERENTIAL_TMP": str(folder),
        **variables,
    }
    with ExitStack() as stack:
        if topics := topics_of(scenario):
            environment["DIFFERENTIAL_BROKER"] = stack.enter_context(EmbeddedBroker(*topics)).bootstrap_servers
        try:
            done = subprocess.run(
                [str(python), str(SCENARIOS / f"{scenario}.py")],
                cwd=folder,
                env=environment,
                capture_output=True,
                encoding="utf-8",
                check=False,
                timeout=_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ScenarioBroken(f"{scenario} did not end under {folder.name}") from error
    if done.returncode or not done.stdout:
        tail = "\n".join((done.stdout.splitlines() + done.stderr.splitlines())[-12:])
        raise ScenarioBroken(f"{scenario} broke under {folder.name} (status {done.returncode}):\n{tail}")
    return done.stdout.splitlines()


def compare(theirs: Sequence[str], ours: Sequence[str], entries: Iterable[Difference]) -> Comparison:
    """Compare two traces of a scenario with the entries of the list for it.

    :raises ScenarioBroken: the traces have different cases.
    """
    their_cases, our_cases = _cases(theirs), _cases(ours)
    if list(their_cases) != list(our_cases):
        raise ScenarioBroken(f"the cases are not the same: {list(their_cases)} and {list(our_cases)}")
    expected = list(entries)
    open_counts = Counter({number: entry.times for number, entry in enumerate(expected)})
    unlisted = []
    for name in their_cases:
        for hunk in hunks(name, their_cases[name], our_cases[name]):
            match = _entry_for(hunk, expected, open_counts)
            if match is None:
                unlisted.append(hunk)
            else:
                open_counts[match] -= 1
    return Comparison(unlisted, [entry for number, entry in enumerate(expected) if open_counts[number]])


def _entry_for(hunk: Hunk, entries: Sequence[Difference], open_counts: Counter[int]) -> int | None:
    """Return the number of an unused entry that equals a hunk, or None."""
    for number, entry in enumerate(entries):
        same_case = entry.hunk.case in (ANY_CASE, hunk.case)
        if open_counts[number] and same_case and (entry.hunk.theirs, entry.hunk.ours) == (hunk.theirs, hunk.ours):
            return number
    return None


def hunks(case: str, theirs: Sequence[str], ours: Sequence[str]) -> list[Hunk]:
    """Return the differences between two traces of a case; one equal line between two differences joins them."""
    joined: list[list[int]] = []
    for tag, *opcode in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        start, end, our_start, our_end = opcode
        if joined and start - joined[-1][1] <= 1:
            joined[-1][1], joined[-1][3] = end, our_end
        else:
            joined.append([start, end, our_start, our_end])
    return [
        Hunk(case, tuple(theirs[start:end]), tuple(ours[our_start:our_end]))
        for start, end, our_start, our_end in joined
    ]


def _cases(lines: Sequence[str]) -> dict[str, list[str]]:
    """Return the lines of each case."""
    cases: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith(CASE_MARK):
            cases[line.removeprefix(CASE_MARK)] = []
        else:
            next(reversed(cases.values())).append(line)
    return cases
