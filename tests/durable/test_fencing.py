"""Test with two real processes that both believe to own an operation: the stopped one is fenced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kser.schemas import Message
from kser.store.model import OperationSnapshot
from tests.support import ROOT, wait_until

#: A consumer; the first task waits for a file of its process's name, the second one for one that all wait for.
PROGRAM = """
import sys, time
from pathlib import Path
from cdumay_result import Result
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

folder, name, message = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
oregistry = OperationRegistry()

def wait(what):
    (folder / f"{name} waits for {what}").touch()
    while not (folder / what).exists():
        time.sleep(0.01)

class First(Task):
    def run(self):
        wait(f"first of {name}")
        (folder / f"{name} ran first").touch()
        return Result(retval={"first": name})

class Second(Task):
    def run(self):
        wait("second")
        return Result(retval={"second": name, "seen": self.result.retval["first"]})

class Order(Operation):
    def build_tasks(self, **kwargs):
        return [First(), Second()]

for each in (First, Second, Order):
    oregistry.subscribe(each)
if message:
    InMemoryBroker.at("").send("orders", message.encode())
Consumer({}, ["orders"]).run()
"""


class Consumers:
    """Processes that share a database, each with a bus of its own: what they have of each other comes from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'shop.db'}"
        self._started: list[subprocess.Popen[str]] = []

    def start(self, name: str, message: str = "") -> subprocess.Popen[str]:
        """Start one; it gets a message if there is one."""
        own = {key: str(self.folder / f"{name} {key}") for key in ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")}
        terms = {"KSER_LEASE": "2", "KSER_HEARTBEAT": "0.5", "KSER_REAPER": "0.2", "KSER_DATABASE_URI": self.uri}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.folder), name, message],
            env={**os.environ, **own, **terms},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def wait_for(self, file: str) -> None:
        """Wait until a consumer has made a file."""
        wait_until((self.folder / file).exists)

    def let(self, file: str) -> None:
        """Let consumers go on that wait for a file."""
        (self.folder / file).touch()

    def end(self, process: subprocess.Popen[str]) -> str:
        """End one in order; returns what it logged."""
        process.terminate()
        _, logged = process.communicate(timeout=20)
        assert process.returncode == 0, logged
        return logged

    def close(self) -> None:
        """End all that there are."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def consumers(tmp_path: Path) -> Any:
    found = Consumers(tmp_path)
    yield found
    found.close()


def test_consumer_stopped_beyond_its_lease_is_fenced(consumers: Consumers) -> None:
    """Rules 8 and 9: the stopped process still believes in its claim, and the database does not."""
    sql = pytest.importorskip("kser.store.sql")
    store = sql.SQLStore(consumers.uri)
    uuid = str(uuid4())
    stale = consumers.start("stale", Message(uuid=uuid, entrypoint="__main__.Order").dumps())
    consumers.wait_for("stale waits for first of stale")
    stale.send_signal(signal.SIGSTOP)
    other = consumers.start("other")
    consumers.wait_for("other waits for first of other")
    claimed: OperationSnapshot = store.snapshot(uuid)
    assert claimed.operation.epoch == 2
    # Now both are in the first task, each under a claim of its own.
    consumers.let("first of stale")
    stale.send_signal(signal.SIGCONT)
    consumers.wait_for("stale ran first")
    logged = consumers.end(stale)
    assert "the outcome of its step is dropped" in logged
    after: OperationSnapshot = store.snapshot(uuid)
    assert _without_lease(after) == _without_lease(claimed)
    consumers.let("first of other")
    consumers.let("second")
    wait_until(lambda: store.get_operation(uuid).ended_at is not None)
    consumers.end(other)
    found: OperationSnapshot = store.snapshot(uuid)
    store.close()
    assert found.operation.status == "SUCCESS"
    assert '"first": "other"' in (found.operation.result or "")
    assert '"seen": "other"' in (found.operation.result or "")
    assert [(row.position, row.number, row.epoch) for row in found.attempts] == [(0, 1, 2), (1, 1, 2)]


def _without_lease(found: OperationSnapshot) -> OperationSnapshot:
    """What its owner prolongs all the time left out."""
    return found._replace(operation=found.operation._replace(next_check_at=None))
