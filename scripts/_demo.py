"""The dice game of the documentation, from start to end; ``scripts/demo`` starts it.

One process has the broker, the documented consumer runs in a second one, and the documented producer and ``launch.py``
send to it. It ends when the consumer has logged the results of both; then both logs are shown.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from kser.embedded import EmbeddedBroker
from kser.errors import KserError

DICE = Path(__file__).resolve().parent.parent / "examples" / "dice"
TOPIC = "dice"

#: Joining a group takes about 3 s, everything else about 2 s; the rest is for slow machines.
DEADLINE_SECONDS = 25
#: Of a consumer that was asked to end.
GRACE_SECONDS = 5

RESULTS = tuple(f"Controller.Success: __main__.{name}[" for name in ("DiceRoll", "DiceLaunch"))

# What kser logs begins with "<Class>.<Action>" or with the registry's name. The Kafka client's lines of level INFO are
# cut, everything else is shown as it was written: also its warnings, and tracebacks, which have no level.
# Of these, one is cut too: a consumer that joins before it has the topic's metadata asks again, and has it then.
INFO_LINE = re.compile(r"\S+ \S+ (INFO|WARNING(?= +No partition metadata for topic)) +(?P<message>.*)")
KSER_MESSAGE = re.compile(
    r"\w+\.\w+(\.\.\.|:| )|\w+: commit=|Operation registry: |Consumer is paused|Closing consumer and exiting"
)


class DemoError(Exception):
    """The demo cannot go on."""


class Stopped(Exception):
    """A signal asks the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.number = number


class Program:
    """One of the example programs, running, with what it has written so far."""

    def __init__(self, name: str, environment: dict[str, str], news: queue.SimpleQueue[int]) -> None:
        self.name = name
        self.lines: list[str] = []
        self._news = news
        self._process = subprocess.Popen(
            [sys.executable, str(DICE / name)],
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
    def status(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def has_logged(self, text: str) -> bool:
        """Whether some line has ``text`` in it."""
        return any(text in line for line in self.lines)

    def stop(self) -> None:
        """Ask it to end, see to it that it does, and read what it has left to say."""
        self._process.terminate()
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


class Demo:
    """The broker's environment, the programs, and the one queue that wakes it up: 0 for news, else a signal."""

    def __init__(self, environment: dict[str, str], news: queue.SimpleQueue[int]) -> None:
        self.programs: list[Program] = []
        self._environment = environment
        self._news = news
        self._deadline = time.monotonic() + DEADLINE_SECONDS

    def play(self) -> None:
        """Start the consumer, send a task and an operation to it, and wait for their results."""
        consumer = self._start("consumer.py")
        for name in ("producer.py", "launch.py"):
            sender = self._start(name)
            while sender.status is None:
                self._wait(f"{name} to end", consumer)
            if sender.status != 0:
                raise DemoError(f"{name} ended with exit status {sender.status}")
        for result in RESULTS:
            while not consumer.has_logged(result):
                self._wait(f"{result!r} in the log of consumer.py", consumer)
        consumer.stop()
        if consumer.status != 0:
            raise DemoError(f"consumer.py ended with exit status {consumer.status} when it was asked to end")

    def stop(self) -> None:
        """End whatever still runs."""
        for program in self.programs:
            program.stop()

    def _start(self, name: str) -> Program:
        say(f"starting {(DICE / name).relative_to(DICE.parent.parent)} ...")
        program = Program(name, self._environment, self._news)
        self.programs.append(program)
        return program

    def _wait(self, what: str, consumer: Program) -> None:
        """Until something is new."""
        if consumer.status is not None:
            raise DemoError(f"consumer.py ended with exit status {consumer.status} while the demo waited for {what}")
        try:
            number = self._news.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            raise DemoError(f"waited for {what}, in vain: {DEADLINE_SECONDS} s are over") from None
        if number:
            raise Stopped(number)


def say(text: str) -> None:
    """Tell the reader how far it is; standard output is for the logs."""
    sys.stderr.write(f"kser: {text}\n")


def show(heading: str, lines: list[str]) -> None:
    """A log under its heading, indented as on the documentation's page."""
    sys.stdout.write(f"\n{heading}::\n\n" + "".join(f"    {line}\n" for line in lines))
    sys.stdout.flush()


def without_client_noise(lines: list[str]) -> list[str]:
    """The lines without those of level INFO that are the Kafka client's."""
    kept = []
    for line in lines:
        info = INFO_LINE.fullmatch(line)
        if info is None or KSER_MESSAGE.match(info["message"]):
            kept.append(line)
    return kept


def environment_for(broker: EmbeddedBroker) -> dict[str, str]:
    """The caller's environment with this demo's settings in place of the caller's own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KSER_")}
    return {**environment, **broker.environment(group_id=TOPIC)}


def main() -> int:
    news: queue.SimpleQueue[int] = queue.SimpleQueue()
    # SimpleQueue.put may be called in a signal handler: nothing is interrupted, the demo ends where it waits.
    for ending in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda number, _frame: news.put(number))
    say("starting the development broker ...")
    with EmbeddedBroker(TOPIC) as broker:
        demo = Demo(environment_for(broker), news)
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
    consumer, *senders = demo.programs
    show("Producer console output", [line for sender in senders for line in without_client_noise(sender.lines)])
    show("Consumer console output", without_client_noise(consumer.lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KserError as error:
        say(f"the demo failed: {error.message}")
        sys.exit(1)
