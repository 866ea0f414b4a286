"""Tests of SIGTERM and SIGINT: the first shuts a consumer down gracefully, a second one ends it at once (D8)."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kser.consumer.shutdown_signals import REPEATED_SIGNAL_WINDOW
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from tests.consumer.harness import committed
from tests.support import ROOT, message

PROGRAM = """
import os, sys, threading
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.schemas import Message

never = threading.Event()

def say(*words):
    # In one piece: two threads speak.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

class Busy(Entrypoint):
    def run(self):
        say("busy")
        while not consumer._kser_stopping:
            never.wait(0.01)
        say("stopping")
        if self.uuid == "endless":
            never.wait(30)

class Told(Consumer):
    told = False

    @classmethod
    def is_active(cls):
        if not cls.told:
            cls.told = True
            say("ready")
        return True

Controller.register(Busy.path, Busy)
for uuid in sys.argv[1:]:
    InMemoryBroker.at("").send("dice", Message(uuid, Busy.path).dumps().encode())
consumer = Told({}, ["dice"])
try:
    consumer.run()
finally:
    commit = InMemoryBroker.at("").committed.get(("dummy", ("dice", 0)))
    say("committed", commit.offset if commit else 0)
"""


class Program:
    """The program above in a process of its own, ended at the latest with the ``with`` block."""

    def __init__(self, *uuids: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *uuids],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def hears(self, number: int, after: str) -> None:
        assert self._process.stdout
        while (line := self._process.stdout.readline().strip()) != after:
            assert line, f"it ended without saying {after!r}"
        # Sooner it would be the last one once more.
        time.sleep(PAUSE)
        self._process.send_signal(number)

    def end(self) -> tuple[int, list[str], str]:
        out, err = self._process.communicate(timeout=30)
        return self._process.returncode, out.split(), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_an_idle_process_with_status_0(number: int) -> None:
    with Program() as program:
        program.hears(number, after="ready")
        code, out, err = program.end()
    assert (code, out[-2:], err) == (0, ["committed", "0"], "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_a_busy_process_finish_and_commit_its_message(number: int) -> None:
    with Program("1", "2") as program:
        program.hears(number, after="busy")
        code, out, err = program.end()
    assert (code, out, err) == (0, ["stopping", "committed", "1"], "")


def test_second_sigint_ends_the_process_with_its_message_uncommitted() -> None:
    with Program("endless") as program:
        program.hears(signal.SIGINT, after="busy")
        program.hears(signal.SIGINT, after="stopping")
        code, out, err = program.end()
    assert (code, out) == (-signal.SIGINT, ["committed", "0"])
    assert err.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_sigterm_ends_the_process_at_once_with_status_143(first: int) -> None:
    """128 + 15: what a shell says of a process that SIGTERM ended; nothing more is written."""
    with Program("endless") as program:
        program.hears(first, after="busy")
        program.hears(signal.SIGTERM, after="stopping")
        code, out, err = program.end()
    assert (code, out, err) == (143, ["committed", "0"], "")


#: Seconds after which a signal is another one.
PAUSE = REPEATED_SIGNAL_WINDOW + 0.05


# -- in this process ---------------------------------------------------------------------------------------------------


class Raise(Entrypoint):
    """Sends its process the signals that its params name, and notes who handles them."""

    handlers: list[Any] = []  # noqa: RUF012  emptied after each test

    def run(self) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        for number in self.params["signals"]:
            signal.raise_signal(number)
            time.sleep(self.params.get("pause", PAUSE))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    Controller.register(Raise.path, Raise)
    yield
    InMemoryBroker.reset()
    Raise.handlers.clear()


def consumer_with(*numbers: int, pause: float = PAUSE) -> Consumer:
    InMemoryBroker.at("").send(
        "dice", message(Raise, params={"signals": list(numbers), "pause": pause}).dumps().encode()
    )
    return Consumer({}, ["dice"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_starts_a_graceful_shutdown(number: int) -> None:
    with pytest.raises(SystemExit) as caught:
        consumer_with(number).run()
    assert (caught.value.code, committed()) == (0, 1)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_sigint_raises_keyboard_interrupt(first: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        consumer_with(first, signal.SIGINT).run()
    assert committed() == 0


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_sigterm_exits_with_status_143(first: int) -> None:
    with pytest.raises(SystemExit) as caught:
        consumer_with(first, signal.SIGTERM).run()
    assert (caught.value.code, committed()) == (143, 0)


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM] * 3, [signal.SIGINT, signal.SIGTERM]])
def test_signal_received_twice_at_once_counts_once(numbers: list[int]) -> None:
    """By a terminal to all of a group, and by a wrapper that is in it."""
    with pytest.raises(SystemExit) as caught:
        consumer_with(*numbers, pause=0).run()
    assert (caught.value.code, committed()) == (0, 1)


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        consumer_with(signal.SIGTERM).run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert Raise.handlers != [before[0]]


def test_signal_handlers_are_unchanged_outside_the_main_thread() -> None:
    consumer = consumer_with()
    ends: list[Any] = []

    def run() -> None:
        try:
            consumer.run()
        except SystemExit as exit_:
            ends.append(exit_.code)

    thread = threading.Thread(target=run)
    thread.start()
    while not committed() and thread.is_alive() and not Raise.handlers:
        thread.join(0.01)
    consumer.stop()
    thread.join(10)
    assert (ends, committed()) == ([0], 1)
    assert Raise.handlers == [signal.getsignal(signal.SIGTERM)]
