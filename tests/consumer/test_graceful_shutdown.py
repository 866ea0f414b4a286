"""Tests of the graceful shutdown: running records are finished or abandoned, and offsets are committed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kser.retry import Retry
from tests.consumer.harness import (
    MANUAL_COMMIT,
    ConsumerThread,
    FaultyConsumer,
    ScriptedTask,
    committed,
    new_consumer,
    send_messages,
)
from tests.support import ROOT, WAIT_SECONDS, lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")


# -- in threads of this process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_graceful_shutdown_commits_running_records_and_starts_no_other(workers: int) -> None:
    gate = threading.Event()
    uuids = [str(number) for number in range(workers + 5)]
    ScriptedTask.script.update(dict.fromkeys(uuids, lambda: gate.wait(WAIT_SECONDS)))
    send_messages(*uuids)
    consumer = new_consumer({"auto_commit_interval_ms": 600_000}, workers=workers)
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: len(ScriptedTask.ran) == workers)
        consumer.stop()
        wait_until(lambda: consumer._kser_poller.shutting_down)
        gate.set()
        ending = thread.join()
    assert isinstance(ending, SystemExit)
    assert ending.code == 0
    assert (sorted(ScriptedTask.ran), committed()) == (sorted(uuids[:workers]), workers)


def test_graceful_shutdown_keeps_polling_the_group() -> None:
    """A running task may take longer than a member may be silent."""
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1")
    consumer = FaultyConsumer()
    with ConsumerThread(consumer):
        wait_until(lambda: ScriptedTask.ran)
        consumer.stop()
        wait_until(lambda: consumer._kser_poller.shutting_down)
        polls = len(consumer.current_client.polls)
        wait_until(lambda: len(consumer.current_client.polls) > polls + 2)
        assert consumer.current_client.closed == 0
        gate.set()
    assert (consumer.current_client.closed, committed()) == (1, 1)


@pytest.mark.parametrize("workers", [2, 3])
def test_graceful_shutdown_abandons_records_after_shutdown_timeout(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    ScriptedTask.script["slow"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("quick", "slow")
    consumer = new_consumer(workers=workers, shutdown_timeout=0.2)
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: len(ScriptedTask.ran) == 2)
        consumer.stop()
        began = time.monotonic()
        ending = thread.join()
        assert time.monotonic() - began < 5
        assert isinstance(ending, SystemExit)
        assert (ending.code, committed()) == (0, 1)
        gate.set()
        wait_until(lambda: not [each for each in threading.enumerate() if each.name == "kser-worker"])
    assert committed() == 1
    told = [line for line in lines(caplog, logging.WARNING) if "shutdown_timeout" in line]
    assert told == [
        "Consumer: the message at offset 1 of dice[0] still runs after shutdown_timeout (0.2 s): its attempt is"
        " abandoned, and the message will run again"
    ]
    ScriptedTask.script.clear()
    new_consumer().run_until_idle()
    assert ScriptedTask.ran.count("slow") == 2


def test_graceful_shutdown_releases_records_waiting_for_a_retry() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    send_messages("1", "2")
    consumer = new_consumer(MANUAL_COMMIT, retry=Retry(delay=60), shutdown_timeout=30)
    began = time.monotonic()
    with ConsumerThread(consumer):
        wait_until(lambda: len(ScriptedTask.ran) == 2)
    assert (committed(), time.monotonic() - began < 5) == (0, True)
    new_consumer().run_until_idle()
    assert ScriptedTask.ran == ["1", "2", "1"]


def test_graceful_shutdown_with_commit_before_runs_every_committed_record() -> None:
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1", "2", "3", key=b"a")
    consumer = new_consumer({**MANUAL_COMMIT, "auto_offset_reset": "earliest"}, commit="before", workers=2)
    with ConsumerThread(consumer):
        wait_until(lambda: committed() and ScriptedTask.ran)
        consumer.stop()
        wait_until(lambda: consumer._kser_poller.shutting_down)
        gate.set()
    assert ScriptedTask.ran == ["1", "2", "3"][: committed()]


def test_graceful_shutdown_leaves_the_group() -> None:
    consumer = new_consumer(workers=2)
    with ConsumerThread(consumer):
        wait_until(lambda: consumer.assignment)
    other = new_consumer()
    other.step(timeout=0)
    assert len(other.assignment) == 1


def test_graceful_shutdown_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    send_messages("1")
    consumer = new_consumer(workers=3)
    with ConsumerThread(consumer):
        wait_until(lambda: ScriptedTask.ran)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_graceful_shutdown_of_an_idle_consumer_is_quick() -> None:
    consumer = new_consumer()
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: consumer.assignment)
        began = time.monotonic()
        consumer.stop()
        thread.join()
    assert time.monotonic() - began < 2


def test_consumer_stopped_before_its_start_ends_at_once() -> None:
    send_messages("1")
    consumer = new_consumer()
    consumer.stop()
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert (caught.value.code, ScriptedTask.ran) == (0, [])


def test_closing_twice_is_harmless() -> None:
    consumer = FaultyConsumer()
    consumer.close()
    consumer.close()
    assert consumer.current_client.closed == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_dead_poller_thread_ends_the_consumer_with_an_error(workers: int) -> None:
    """An idle process would go unnoticed, and so would one that reports a regular end."""
    consumer = new_consumer(workers=workers)
    consumer._kser_poller.poll_once = lambda timeout: None  # type: ignore[method-assign,assignment,return-value]
    consumer._kser_poller.stop(0)
    with ConsumerThread(consumer) as thread:
        ending = thread.join()
    assert isinstance(ending, RuntimeError)


def test_raising_should_stop_ends_the_consumer_in_order() -> None:
    class Failing(FaultyConsumer):
        @staticmethod
        def should_stop() -> bool:
            if ScriptedTask.ran:
                raise ConnectionError("no redis")
            return False

    send_messages("1")
    consumer = Failing(MANUAL_COMMIT, workers=2)
    with ConsumerThread(consumer) as thread:
        ending = thread.join()
    assert isinstance(ending, ConnectionError)
    assert (consumer.current_client.closed, committed()) == (1, 1)


def test_terminate_file_ends_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = new_consumer(MANUAL_COMMIT, workers=3)
    send_messages("1", "2")
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: committed() == 2)
        Path(os.environ["TERMINATE_FILE"]).touch()
        ending = thread.join()
    assert isinstance(ending, SystemExit)
    assert ending.code == 0


# -- in a process of its own -------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, threading, time
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.schemas import Message

def say(*words):
    # In one piece: several threads speak.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

class Say(Entrypoint):
    def run(self):
        say("begins", self.uuid)
        if self.uuid == "short":
            while not consumer._kser_stopping:
                time.sleep(0.01)
            time.sleep(0.2)
        elif self.uuid == "stuck":
            time.sleep(60)
        elif self.uuid == "deaf":
            while True:
                try:
                    time.sleep(60)
                except Exception:
                    pass
        elif self.uuid == "interrupts":
            raise KeyboardInterrupt
        say("ends", self.uuid)

    def onerror(self, result):
        say("onerror", self.uuid, result.stderr)
        return result

Controller.register(Say.path, Say)
for uuid in sys.argv[3:]:
    InMemoryBroker.at("").send("dice", Message(uuid, Say.path).dumps().encode())
consumer = Consumer({}, ["dice"], workers=int(sys.argv[1]), shutdown_timeout=float(sys.argv[2]))
try:
    consumer.run()
finally:
    say("committed", InMemoryBroker.at("").committed["dummy", ("dice", 0)])
"""


class Program:
    """The program above in a process of its own, ended at the latest with the ``with`` block."""

    def __init__(self, *uuids: str, workers: int = 1, timeout: float = 20) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(workers), str(timeout), *uuids],
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

    def hears(self, *numbers: int, after: str) -> None:
        assert self._process.stdout
        while (line := self._process.stdout.readline().strip()) != after:
            assert line, f"it ended without saying {after!r}: {self._process.stderr and self._process.stderr.read()}"
        for number in numbers:
            self._process.send_signal(number)
            # Two of the same kind that wait to be handled are one.
            time.sleep(0.3)

    def end(self) -> tuple[int, list[str], str]:
        out, err = self._process.communicate(timeout=WAIT_SECONDS)
        return self._process.returncode, out.splitlines(), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 4])
def test_signal_lets_running_tasks_end(number: int, workers: int) -> None:
    with Program("short", workers=workers) as program:
        program.hears(number, after="begins short")
        code, out, err = program.end()
    assert (code, out, err) == (0, ["ends short", "committed Commit(offset=1, metadata='')"], "")


@pytest.mark.parametrize("uuid", ["stuck", "deaf"])
@pytest.mark.parametrize("workers", [1, 4])
def test_endless_task_is_abandoned_when_the_process_ends(workers: int, uuid: str) -> None:
    """With one worker that is the main thread, which has to be got out of it."""
    with Program(uuid, workers=workers, timeout=0.5) as program:
        began = time.monotonic()
        program.hears(signal.SIGTERM, after=f"begins {uuid}")
        code, out, err = program.end()
    assert time.monotonic() - began < 10
    assert (code, out) == (0, ["committed Commit(offset=0, metadata='')"])
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", [1, 4])
def test_second_sigterm_ends_the_process_at_once_with_status_143(workers: int) -> None:
    with Program("stuck", workers=workers) as program:
        program.hears(signal.SIGTERM, signal.SIGTERM, after="begins stuck")
        began = time.monotonic()
        code, out, err = program.end()
    # Not even a rebalance is waited for.
    assert time.monotonic() - began < 5
    assert (code, out) == (143, ["committed Commit(offset=0, metadata='')"])
    assert "Traceback" not in err
    assert "shutdown_timeout" not in err


@pytest.mark.parametrize("workers", [1, 4])
def test_second_sigint_raises_keyboard_interrupt(workers: int) -> None:
    with Program("stuck", workers=workers) as program:
        program.hears(signal.SIGINT, signal.SIGINT, after="begins stuck")
        code, out, err = program.end()
    assert (code, out) == (-signal.SIGINT, ["committed Commit(offset=0, metadata='')"])
    assert err.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("workers", [1, 4])
def test_task_that_raises_keyboard_interrupt_ends_the_process(workers: int) -> None:
    """C8"""
    with Program("interrupts", workers=workers) as program:
        program.hears(after="begins interrupts")
        code, out, err = program.end()
    assert (code, out[-1]) == (-signal.SIGINT, "committed Commit(offset=0, metadata='')")
    assert err.strip().endswith("KeyboardInterrupt")


def test_repeated_signals_do_not_delay_the_shutdown() -> None:
    with Program("stuck", workers=2) as program:
        program.hears(*[signal.SIGTERM] * 4, after="begins stuck")
        code, _, _ = program.end()
    assert code in (143, -signal.SIGTERM)
