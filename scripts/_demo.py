"""Run an example of the documentation; ``scripts/demo`` starts this script.

This process runs the broker. Each program of the example runs in its own process.

dice    The script starts the documented consumer, then the documented producer and ``launch.py``, which send messages
        to the consumer. When the consumer has logged the results of both messages, the script shows the logs and ends.
shop    The script starts two workers with one database. When both workers have joined their groups, a buyer sends two
        operations, resumes the operations after they failed, and shows the attempts of each task.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from kser.embedded import EmbeddedBroker
from kser.errors import KserError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

#: Time limit of a demo. Joining a group takes about 3 s. The rest takes 2 s (dice) or 5 s (shop). Slow machines need
#: more time.
DEADLINE_SECONDS = 25
#: Time limit of a consumer's shutdown, after which it is killed.
GRACE_SECONDS = 5

DICE_RESULTS = tuple(f"Controller.Success: __main__.{name}[" for name in ("DiceRoll", "DiceLaunch"))
#: Log line of kafka-python when a consumer has joined its group.
JOINED = "Setting newly assigned partitions"

# The output omits the INFO lines of the Kafka client. The lines of kser match KSER_MESSAGE, for example
# "<Class>.<Action>". The output contains all other lines unchanged, including warnings of the client, and tracebacks,
# which have no level. The output omits one warning: if a consumer joins before it has the metadata of the topic, it
# requests the metadata again and then succeeds.
INFO_LINE = re.compile(r"\S+ \S+ (INFO|WARNING(?= +No partition metadata for topic)) +(?P<message>.*)")
KSER_MESSAGE = re.compile(
    r"\w+\.\w+(\.\.\.|:| )|\w+: commit=|[\w.]+\[[\w-]+\](:| of operation )|Operation registry: |Consumer is paused"
    r"|Closing consumer and exiting"
)


class DemoError(Exception):
    """An error that ends the demo."""


class Stopped(Exception):
    """A stop signal for the demo."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.number = number


class Program:
    """A running example program and its output so far.

    :param name: the name of the program in messages of the demo.
    :param path: the path of the program.
    """

    def __init__(self, name: str, path: Path, environment: dict[str, str], news: queue.SimpleQueue[int]) -> None:
        self.name = name
        self.lines: list[str] = []
        self._news = news
        self._asked = False
        self._process = subprocess.Popen(
            [sys.executable, str(path)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}")
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status; None while the process runs."""
        return self._process.poll()

    def has_logged(self, text: str) -> bool:
        """Return whether a line of the output contains ``text``."""
        return any(text in line for line in self.lines)

    def terminate(self) -> None:
        """Send SIGTERM, at most once, because a second signal makes a consumer exit immediately."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def stop(self) -> None:
        """Terminate the process, kill it after ``GRACE_SECONDS``, and read the rest of its output."""
        self.terminate()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))
                self._news.put(0)
        self._process.wait()
        self._news.put(0)


class Demo(ABC):
    """An example with its programs.

    A queue wakes the demo. Its items are 0 for new output, and the number of a signal otherwise.
    """

    #: The topics of the broker.
    topics: ClassVar[tuple[str, ...]]

    def __init__(self, broker: EmbeddedBroker, news: queue.SimpleQueue[int]) -> None:
        self.programs: list[Program] = []
        self._broker = broker
        self._news = news
        self._deadline = time.monotonic() + DEADLINE_SECONDS
        self._consumers: list[Program] = []

    @abstractmethod
    def play(self) -> None:
        """Start the programs, and wait until their output is complete."""

    @abstractmethod
    def show(self) -> None:
        """Show the output of the programs."""

    def stop(self) -> None:
        """Stop all programs that still run."""
        for program in self.programs:
            program.terminate()
        for program in self.programs:
            program.stop()

    def _environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of the caller, with the kser settings of this demo."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KSER_")}
        return {**environment, **settings}

    def _start(self, path: Path, environment: dict[str, str], name: str = "", what: str = "") -> Program:
        say(f"starting {path.relative_to(ROOT)}{what} ...")
        program = Program(name or path.name, path, environment, self._news)
        self.programs.append(program)
        return program

    def _consume(self, path: Path, environment: dict[str, str], name: str = "", what: str = "") -> Program:
        """Start a program that must run until the end of the demo."""
        program = self._start(path, environment, name, what)
        self._consumers.append(program)
        return program

    def _finish(self, path: Path, environment: dict[str, str]) -> None:
        """Run a program to its end."""
        program = self._start(path, environment)
        self._wait(f"{program.name} to end", lambda: program.status is not None)
        if program.status != 0:
            raise DemoError(f"{program.name} ended with exit status {program.status}")

    def _end_consumers(self) -> None:
        for program in self._consumers:
            program.terminate()
        for program in self._consumers:
            program.stop()
            if program.status != 0:
                raise DemoError(f"{program.name} ended with exit status {program.status} when it was asked to end")

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` is true."""
        while not condition():
            for program in self._consumers:
                if program.status is not None:
                    status = program.status
                    raise DemoError(f"{program.name} ended with exit status {status} while the demo waited for {what}")
            try:
                number = self._news.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                raise DemoError(f"timed out after {DEADLINE_SECONDS} s while it waited for {what}") from None
            if number:
                raise Stopped(number)


class Dice(Demo):
    """The dice game."""

    topics = ("dice",)
    _folder = EXAMPLES / "dice"

    def play(self) -> None:
        environment = self._environment(**self._broker.environment(group_id="dice"))
        consumer = self._consume(self._folder / "consumer.py", environment)
        for name in ("producer.py", "launch.py"):
            self._finish(self._folder / name, environment)
        for result in DICE_RESULTS:
            self._wait(f"{result!r} in the log of consumer.py", lambda result=result: consumer.has_logged(result))
        self._end_consumers()

    def show(self) -> None:
        consumer, *senders = self.programs
        show("Producer console output", [line for sender in senders for line in without_client_noise(sender.lines)])
        show("Consumer console output", without_client_noise(consumer.lines))


class Shop(Demo):
    """The shop: two workers with different topics."""

    topics = ("orders", "warehouse", "bank")
    _folder = EXAMPLES / "shop"
    _workers: ClassVar[dict[str, str]] = {"warehouse": "orders,warehouse", "bank": "bank"}

    def play(self) -> None:
        with tempfile.TemporaryDirectory(prefix="kser-shop-") as folder:
            try:
                self._play(Path(folder))
            finally:
                # Stop the workers before the folder is removed, because they write to the database in it.
                self.stop()

    def _play(self, folder: Path) -> None:
        shared = {"KSER_DATABASE_URI": f"sqlite:///{folder}/shop.db", "SHOP_PAPER": str(folder / "paper")}
        for group, topics in self._workers.items():
            settings = {**self._broker.environment(group_id=group), **shared, "KSER_TOPICS": topics}
            worker = self._consume(
                self._folder / "worker.py", self._environment(**settings), f"worker.py for {topics}", f" for {topics}"
            )
            say(f"that is process {worker.pid}")
        for worker in self._consumers:
            self._wait(f"{worker.name} to join its group", lambda worker=worker: worker.has_logged(JOINED))
        settings = {**self._broker.environment(), **shared}
        self._finish(self._folder / "buy.py", self._environment(**settings))
        self._end_consumers()

    def show(self) -> None:
        *workers, buyer = self.programs
        for worker in workers:
            show(f"Output of {worker.name} (process {worker.pid})", without_client_noise(worker.lines))
        show("Output of buy.py", buyer.lines)


DEMOS: dict[str, type[Demo]] = {"dice": Dice, "shop": Shop}


def say(text: str) -> None:
    """Print progress on standard error, because standard output is for the logs."""
    sys.stderr.write(f"kser: {text}\n")


def show(heading: str, lines: list[str]) -> None:
    """Print a log under a heading, indented as on the page of the documentation."""
    sys.stdout.write(f"\n{heading}::\n\n" + "".join(f"    {line}\n" for line in lines))
    sys.stdout.flush()


def without_client_noise(lines: list[str]) -> list[str]:
    """Return the lines, except the INFO lines of the Kafka client."""
    kept = []
    for line in lines:
        info = INFO_LINE.fullmatch(line)
        if info is None or KSER_MESSAGE.match(info["message"]):
            kept.append(line)
    return kept


def signals() -> queue.SimpleQueue[int]:
    """Return a queue that receives the stop signals."""
    news: queue.SimpleQueue[int] = queue.SimpleQueue()
    # Use SimpleQueue, because its ``put`` is safe in a signal handler. The demo ends when it next waits for the queue.
    for ending in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda number, _frame: news.put(number))
    return news


def main(arguments: list[str]) -> int:
    name, *more = arguments or ["dice"]
    if name not in DEMOS or more:
        say(f"usage: scripts/demo [{'|'.join(DEMOS)}]")
        return 2
    news = signals()
    say("starting the development broker ...")
    with EmbeddedBroker(*DEMOS[name].topics) as broker:
        demo = DEMOS[name](broker, news)
        try:
            demo.play()
        except DemoError as error:
            demo.stop()
            for program in demo.programs:
                show(f"Whole output of {program.name}", program.lines)
            say(f"the demo failed: {error}; the whole output of its programs is above")
            return 1
        except Stopped as stopped:
            say(f"stopping ({stopped}) ...")
            return 128 + stopped.number
        finally:
            demo.stop()
    demo.show()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KserError as error:
        say(f"the demo failed: {error.message}")
        sys.exit(1)
