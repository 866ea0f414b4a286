"""Shared harness of the documentation's tests: its folders, and its example programs in processes of their own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kser
from tests.support import ROOT

DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
QUICKSTART = EXAMPLES / "docs" / "quickstart"
TESTING = EXAMPLES / "docs" / "testing"
PRODUCTION = EXAMPLES / "production"

#: The documented outputs of the dice game and of the shop.
DICE_OUTPUT = EXAMPLES / "docs" / "demo.txt"
SHOP_OUTPUT = EXAMPLES / "docs" / "shop.txt"

#: Programs whose output is documented in a ``.txt`` file in the same folder.
SCRIPTS = [EXAMPLES / "readme.py", *sorted((EXAMPLES / "docs").glob("*.py"))]
PAGES = sorted(DOCS.glob("*.rst"))

#: Seconds after which a program is killed.
TIMEOUT_SECONDS = 60

#: Patterns of the texts that differ from run to run, with their replacements.
VARIABLE_TEXTS = (
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<uuid>"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"), "<time>"),
    (re.compile(r"You made a [1-6]"), "You made a <number>"),
    # On a busy machine kafka-python logs warnings about its own speed and about a topic that is being created.
    (re.compile(r".*(It is blocking the event loop|No partition metadata for topic).*\n"), ""),
)


def normalized(text: str) -> str:
    """Replace the texts that differ from run to run."""
    for pattern, replacement in VARIABLE_TEXTS:
        text = pattern.sub(replacement, text)
    return text


def without_figures(table: str) -> str:
    """Replace the process ids and seconds in the buyer's table."""
    return re.sub(r" +\d+ +\d+\.\d\d *", " <process> <seconds> ", table)


def program_environment(lock_path: Path) -> dict[str, str]:
    """Return the environment of a program: this checkout of kser, and control files in ``lock_path``."""
    control_files = ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("KSER_") and name not in control_files
    }
    package = str(Path(kser.__file__).parent.parent)
    return {**kept, "LOCK_PATH": str(lock_path), "PYTHONPATH": package, "PYTHONUNBUFFERED": "1"}


def output_of(*arguments: str | Path, lock_path: Path, with_stderr: bool = True, **options: Any) -> str:
    """Run Python, which must succeed, and return the output."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if with_stderr else subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        **{"env": program_environment(lock_path), **options},
    )
    assert process.returncode == 0, process.stdout + (process.stderr or "")
    return process.stdout


@contextmanager
def killed_after_timeout(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the process if it still runs after the timeout."""
    watchdog = threading.Timer(TIMEOUT_SECONDS, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        watchdog.join()


def outputs_of_quickstart(lock_path: Path) -> dict[Path, str]:
    """Run the three terminals of the quickstart, and return the outputs that the page shows."""
    environment = program_environment(lock_path)
    broker = subprocess.Popen(**_terminal(1, environment), stderr=subprocess.DEVNULL)
    consumer = None
    with killed_after_timeout(broker):
        try:
            exports = [shlex.split(broker.stdout.readline()) for _ in range(2)]
            environment |= dict(words[1].split("=", 1) for words in exports if words)
            consumer = subprocess.Popen(**_terminal(2, environment), stderr=subprocess.STDOUT)
            order = output_of(*_words(3)[1:], lock_path=lock_path, env=environment, cwd=QUICKSTART)
            consumer_lines = []
            for line in consumer.stdout:
                consumer_lines.append(line)
                if line.startswith("Controller."):
                    consumer.send_signal(signal.SIGINT)
            assert consumer.wait() == 0, consumer_lines
        finally:
            for process in filter(None, (consumer, broker)):
                process.terminate()
                process.wait()
                process.stdout.close()
    return {QUICKSTART / "order.txt": order, QUICKSTART / "shop.txt": "".join(consumer_lines)}


def _words(terminal: int) -> list[str]:
    """Return the command of a terminal of the quickstart as words."""
    words = shlex.split((QUICKSTART / f"terminal-{terminal}.sh").read_text())
    assert words[0] == "python"
    return words


def _terminal(terminal: int, environment: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of :class:`subprocess.Popen` for a terminal of the quickstart."""
    arguments = [sys.executable, *_words(terminal)[1:]]
    return {"args": arguments, "env": environment, "cwd": QUICKSTART, "stdout": subprocess.PIPE, "text": True}


def output_of_dice_game(lock_path: Path) -> str:
    """Return the output of ``scripts/demo``."""
    return output_of(ROOT / "scripts" / "_demo.py", lock_path=lock_path, with_stderr=False)


def output_of_shop(lock_path: Path) -> str:
    """Return the buyer's part of the output of ``scripts/demo shop``."""
    output = output_of(ROOT / "scripts" / "_demo.py", "shop", lock_path=lock_path, with_stderr=False)
    lines = output.partition("Output of buy.py::\n\n")[2].splitlines()
    return "".join(f"{line[4:]}\n" for line in lines)
