"""SIGTERM and SIGINT end a consumer in order; only a second SIGINT interrupts it (D8)."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kser.controller import Controller
from kser.dummy.bus import Bus
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from tests.support import ROOT, message

PROGRAM = """
import sys, threading
from kser.controller import Controller
from kser.dummy.bus import Bus
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.schemas import Message

never = threading.Event()

class Busy(Entrypoint):
    def run(self):
        print("busy", flush=True)
        while not consumer._stopping:
            never.wait(0.01)
        print("stopping", flush=True)
        if self.uuid == "endless":
            never.wait(30)

class Told(Consumer):
    told = False

    @classmethod
    def is_active(cls):
        if not cls.told:
            cls.told = True
            print("ready", flush=True)
        return True

Controller.register(Busy.path, Busy)
for uuid in sys.argv[1:]:
    Bus.at("").send("dice", Message(uuid, Busy.path).dumps().encode())
consumer = Told({}, ["dice"])
try:
    consumer.run()
finally:
    print("committed", Bus.at("").committed.get(("dummy", "dice")), flush=True)
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
        self._process.send_signal(number)

    def end(self) -> tuple[int, list[str], str]:
        out, err = self._process.communicate(timeout=30)
        return self._process.returncode, out.split(), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_process_exits_with_0(number: int) -> None:
    with Program() as program:
        program.hears(number, after="ready")
        code, out, err = program.end()
    assert (code, out[-2:], err) == (0, ["committed", "None"], "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_busy_process_ends_its_message_and_commits_it(number: int) -> None:
    with Program("1", "2") as program:
        program.hears(number, after="busy")
        code, out, err = program.end()
    assert (code, out, err) == (0, ["stopping", "committed", "1"], "")


def test_a_second_sigint_interrupts_and_leaves_the_message_uncommitted() -> None:
    with Program("endless") as program:
        program.hears(signal.SIGINT, after="busy")
        program.hears(signal.SIGINT, after="stopping")
        code, out, err = program.end()
    assert (code, out) == (-signal.SIGINT, ["committed", "None"])
    assert err.strip().endswith("KeyboardInterrupt")


# -- in this process ---------------------------------------------------------------------------------------------------


class Raise(Entrypoint):
    """Sends its process the signals that its params name, and notes who handles them."""

    handlers: list[Any] = []  # noqa: RUF012  emptied after each test

    def run(self) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        for number in self.params["signals"]:
            signal.raise_signal(number)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    Controller.register(Raise.path, Raise)
    yield
    Bus.reset()
    Raise.handlers.clear()


def consumer_with(*numbers: int) -> Consumer:
    Bus.at("").send("dice", message(Raise, params={"signals": list(numbers)}).dumps().encode())
    return Consumer({}, ["dice"])


def committed() -> int | None:
    return Bus.at("").committed.get(("dummy", "dice"))


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM, signal.SIGINT], [signal.SIGINT]]
)
def test_until_a_second_sigint_everything_ends_in_order(numbers: list[int]) -> None:
    with pytest.raises(SystemExit) as caught:
        consumer_with(*numbers).run()
    assert (caught.value.code, committed()) == (0, 1)


def test_two_sigints_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        consumer_with(signal.SIGINT, signal.SIGINT).run()
    assert committed() is None


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        consumer_with(signal.SIGTERM).run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert Raise.handlers != [before[0]]


def test_handlers_are_left_alone_outside_the_main_thread() -> None:
    consumer = consumer_with()
    ends: list[Any] = []

    def run() -> None:
        try:
            consumer.run()
        except SystemExit as exit_:
            ends.append(exit_.code)

    thread = threading.Thread(target=run)
    thread.start()
    while committed() is None and thread.is_alive() and not Raise.handlers:
        thread.join(0.01)
    consumer.stop()
    thread.join(10)
    assert (ends, committed()) == ([0], 1)
    assert Raise.handlers == [signal.getsignal(signal.SIGTERM)]
