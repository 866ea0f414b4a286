"""Tests of SIGTERM and SIGINT: the first shuts a consumer down gracefully, a second one ends it at once (D8)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kser.consumer.shutdown_signals import REPEATED_SIGNAL_WINDOW
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from tests.consumer.harness import ConsumerThread, committed
from tests.support import ROOT, WAIT_SECONDS, message, wait_until

#: Seconds after which a repeated signal counts as a second one.
SIGNAL_PAUSE = REPEATED_SIGNAL_WINDOW + 0.1

both_signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
one_or_four_workers = pytest.mark.parametrize("workers", [1, 4])

# -- in a process of its own -------------------------------------------------------------------------------------------


class ConsumerProcess:
    """A process of ``program.py``; it is killed at the end of the ``with`` block."""

    def __init__(self, *uuids: str, workers: int = 1, shutdown_timeout: float = 60) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.consumer.program", str(workers), str(shutdown_timeout), *uuids],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> ConsumerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def send_signals(self, *numbers: int, after: str) -> None:
        """Send each signal as a new one, after the process has written a line."""
        assert self._process.stdout
        while (line := self._process.stdout.readline().strip()) != after:
            assert line, f"ended without writing {after!r}: {self._process.stderr and self._process.stderr.read()}"
        for number in numbers:
            self._process.send_signal(number)
            time.sleep(SIGNAL_PAUSE)

    def wait(self) -> tuple[int, list[str], str]:
        """Wait for the end; return the exit status, the remaining lines of the output, and the error output."""
        out, err = self._process.communicate(timeout=WAIT_SECONDS)
        return self._process.returncode, out.splitlines(), err


@both_signals
def test_signal_ends_an_idle_process_with_status_0(number: int) -> None:
    with ConsumerProcess() as process:
        process.send_signals(number, after="ready")
        status, out, err = process.wait()
    assert (status, out, err) == (0, ["committed 0"], "")


@both_signals
@one_or_four_workers
def test_signal_lets_running_tasks_end(number: int, workers: int) -> None:
    with ConsumerProcess("short", workers=workers) as process:
        process.send_signals(number, after="starts short")
        status, out, err = process.wait()
    assert (status, out, err) == (0, ["ends short", "committed 1"], "")


@pytest.mark.parametrize("uuid", ["endless", "stubborn"])
@one_or_four_workers
def test_endless_task_is_abandoned_when_the_process_ends(workers: int, uuid: str) -> None:
    """With one worker, the task runs in the main thread, which the consumer has to interrupt."""
    with ConsumerProcess(uuid, workers=workers, shutdown_timeout=0.5) as process:
        process.send_signals(signal.SIGTERM, after=f"starts {uuid}")
        status, out, err = process.wait()
    assert (status, out) == (0, ["committed 0"])
    assert "Traceback" not in err


@one_or_four_workers
def test_second_sigterm_ends_the_process_with_status_143(workers: int) -> None:
    """128 + 15 is the status that a shell reports for a process that SIGTERM ended."""
    with ConsumerProcess("endless", workers=workers) as process:
        process.send_signals(signal.SIGTERM, signal.SIGTERM, after="starts endless")
        status, out, err = process.wait()
    assert (status, out) == (143, ["committed 0"])
    assert "Traceback" not in err
    assert "shutdown_timeout" not in err


def test_sigterm_after_sigint_writes_no_error() -> None:
    with ConsumerProcess("endless") as process:
        process.send_signals(signal.SIGINT, signal.SIGTERM, after="starts endless")
        status, out, err = process.wait()
    assert (status, out, err) == (143, ["committed 0"], "")


@one_or_four_workers
def test_second_sigint_ends_the_process_with_keyboard_interrupt(workers: int) -> None:
    with ConsumerProcess("endless", workers=workers) as process:
        process.send_signals(signal.SIGINT, signal.SIGINT, after="starts endless")
        status, out, err = process.wait()
    assert (status, out) == (-signal.SIGINT, ["committed 0"])
    assert err.strip().endswith("KeyboardInterrupt")


@one_or_four_workers
def test_task_that_raises_keyboard_interrupt_ends_the_process(workers: int) -> None:
    """C8"""
    with ConsumerProcess("interrupt", workers=workers) as process:
        process.send_signals(after="starts interrupt")
        status, out, err = process.wait()
    assert (status, out) == (-signal.SIGINT, ["committed 0"])
    assert err.strip().endswith("KeyboardInterrupt")


def test_repeated_signals_do_not_delay_the_shutdown() -> None:
    with ConsumerProcess("endless", workers=2) as process:
        process.send_signals(*[signal.SIGTERM] * 4, after="starts endless")
        status, _, _ = process.wait()
    assert status in (143, -signal.SIGTERM)
    # The third or fourth signal can interrupt the clean-up of a slow process, and then the running file keeps a line.
    Path(os.environ["RUNNING_FILE"]).write_text("")


# -- in this process ---------------------------------------------------------------------------------------------------


class SignallingEntrypoint(Entrypoint):
    """An entrypoint that sends its process the signals in its params, and records the handler of SIGTERM."""

    handlers: list[Any] = []  # noqa: RUF012  emptied after each test

    def run(self) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        for number in self.params["signals"]:
            signal.raise_signal(number)
            time.sleep(self.params.get("pause", SIGNAL_PAUSE))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    Controller.register(SignallingEntrypoint.path, SignallingEntrypoint)
    yield
    InMemoryBroker.reset()
    SignallingEntrypoint.handlers.clear()


def consumer_receiving(*numbers: int, pause: float = SIGNAL_PAUSE) -> Consumer:
    """Return a consumer with one message, whose task receives these signals.

    :param pause: seconds between two signals.
    """
    InMemoryBroker.at("").send(
        "dice", message(SignallingEntrypoint, params={"signals": list(numbers), "pause": pause}).dumps().encode()
    )
    return Consumer({}, ["dice"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_starts_a_graceful_shutdown(number: int) -> None:
    with pytest.raises(SystemExit) as caught:
        consumer_receiving(number).run()
    assert (caught.value.code, committed()) == (0, 1)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_sigint_raises_keyboard_interrupt(first: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        consumer_receiving(first, signal.SIGINT).run()
    assert committed() == 0


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_sigterm_exits_with_status_143(first: int) -> None:
    with pytest.raises(SystemExit) as caught:
        consumer_receiving(first, signal.SIGTERM).run()
    assert (caught.value.code, committed()) == (143, 0)


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM] * 3, [signal.SIGINT, signal.SIGTERM]])
def test_signals_within_the_window_count_once(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends a signal to its process group, and a wrapper process of this group forwards it again."""
    monkeypatch.setattr("kser.consumer.shutdown_signals.REPEATED_SIGNAL_WINDOW", WAIT_SECONDS)
    with pytest.raises(SystemExit) as caught:
        consumer_receiving(*numbers, pause=0).run()
    assert (caught.value.code, committed()) == (0, 1)


def test_signal_handlers_are_restored_after_the_run() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        consumer_receiving(signal.SIGTERM).run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert SignallingEntrypoint.handlers != [before[0]]


def test_signal_handlers_are_unchanged_outside_the_main_thread() -> None:
    consumer = consumer_receiving()
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: SignallingEntrypoint.handlers)
        consumer.stop()
        ending = thread.join()
    assert isinstance(ending, SystemExit)
    assert (ending.code, committed()) == (0, 1)
    assert SignallingEntrypoint.handlers == [signal.getsignal(signal.SIGTERM)]
