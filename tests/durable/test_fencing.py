"""Test of fencing with two real processes: the first one is stopped for longer than its lease."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from kser.schemas import Message
from kser.store.model import OperationSnapshot
from tests.support import ROOT, WAIT_SECONDS, wait_until

#: A consumer. Its first task waits for a file with the name of the process, its second task for the file ``second``.
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

def wait_for(file):
    (folder / f"{name} waits for {file}").touch()
    while not (folder / file).exists():
        time.sleep(0.01)

class First(Task):
    def run(self):
        wait_for(f"first of {name}")
        (folder / f"{name} ran first").touch()
        return Result(retval={"first": name})

class Second(Task):
    def run(self):
        wait_for("second")
        return Result(retval={"second": name, "received": self.result.retval["first"]})

class Order(Operation):
    def build_tasks(self, **kwargs):
        return [First(), Second()]

for cls in (First, Second, Order):
    oregistry.subscribe(cls)
if message:
    InMemoryBroker.at("").send("orders", message.encode())
Consumer({}, ["orders"]).run()
"""


class Consumers:
    """Consumer processes that share a database; each has its own in-memory broker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'shop.db'}"
        self._started: list[subprocess.Popen[str]] = []

    def start(self, name: str, message: str = "") -> subprocess.Popen[str]:
        """Start a consumer, and send a message to it."""
        files = {key: str(self.folder / f"{name} {key}") for key in ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")}
        settings = {"KSER_LEASE": "2", "KSER_HEARTBEAT": "0.5", "KSER_REAPER": "0.2", "KSER_DATABASE_URI": self.uri}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.folder), name, message],
            env={**os.environ, **files, **settings},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def wait_for(self, file: str) -> None:
        """Wait until a consumer has created a file."""
        wait_until((self.folder / file).exists)

    def create(self, file: str) -> None:
        """Create a file, so that the consumers that wait for it continue."""
        (self.folder / file).touch()

    def stop(self, process: subprocess.Popen[str]) -> str:
        """Stop a consumer gracefully, and return its log."""
        process.terminate()
        _, log = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, log
        return log

    def close(self) -> None:
        """Kill all consumers that still run."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def consumers(tmp_path: Path) -> Iterator[Consumers]:
    with contextlib.closing(Consumers(tmp_path)) as consumers:
        yield consumers


def test_consumer_stopped_beyond_its_lease_is_fenced(consumers: Consumers) -> None:
    """durability rules 8 and 9: the stopped process still works under its claim, which is no longer in force."""
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
    # Both consumers now run the first task, each under its own claim.
    consumers.create("first of stale")
    stale.send_signal(signal.SIGCONT)
    consumers.wait_for("stale ran first")
    assert "the outcome of its step is dropped" in consumers.stop(stale)
    assert without_lease(store.snapshot(uuid)) == without_lease(claimed)
    consumers.create("first of other")
    consumers.create("second")
    wait_until(lambda: store.get_operation(uuid).ended_at is not None)
    consumers.stop(other)
    stored: OperationSnapshot = store.snapshot(uuid)
    store.close()
    assert stored.operation.status == "SUCCESS"
    retval = json.loads(stored.operation.result or "{}")["retval"]
    assert retval == {"first": "other", "second": "other", "received": "other"}
    assert [(row.position, row.number, row.epoch) for row in stored.attempts] == [(0, 1, 2), (1, 1, 2)]


def without_lease(snapshot: OperationSnapshot) -> OperationSnapshot:
    """Return a snapshot without the end of the lease, which each heartbeat changes."""
    return snapshot._replace(operation=snapshot.operation._replace(lease_until=None, take_at=None, send_at=None))
