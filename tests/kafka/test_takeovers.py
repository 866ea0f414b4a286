"""Tests of how soon operations continue: after the death of a consumer, for a retry, and after a resume.

All times come from the database: the store's clock is the clock of this machine.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from kser.status import FAILED, RUNNING, SUCCESS
from kser.store import open_store
from kser.store.base import Store
from kser.store.model import EventRow
from tests.kafka.broker import Kafka
from tests.kafka.helpers import Worker, config, message, send_records, uuids, wait_until

if TYPE_CHECKING:
    from kser.schemas import Message
    from tests.postgres import Database

pytest.importorskip("sqlalchemy")

#: Seconds after the end of a lease by which operations continue.
AFTER_LEASE = 2.0
#: Seconds that the machine of the tests may add, because other programs use its processors.
LOAD = 4.0

#: The delay of the retries.
RETRY_DELAY = 1.0

#: The default of ``KSER_LEASE``.
DEFAULT_LEASE = 15.0
#: The time of an event that did not happen.
NEVER = float("inf")

JOBS = ("__main__.Job", "__main__.SpreadJob")
THREADS = 24


def events(store: Store, uuid: str) -> list[EventRow]:
    """Return the events of an operation."""
    snapshot = store.snapshot(uuid)
    return [] if snapshot is None else list(snapshot.events)


def first_at(store: Store, uuid: str, kind: str, after: float) -> float:
    """Return the time of an operation's first event of a kind after a time; infinity if there is none."""
    return min((event.at for event in events(store, uuid) if event.kind == kind and event.at > after), default=NEVER)


def percentile(values: list[float], share: float) -> float:
    """Return the value that ``share`` of the values do not exceed."""
    return sorted(values)[max(round(len(values) * share) - 1, 0)]


class Case(NamedTuple):
    """A transport, the address of a database, and the lease; None for the default lease."""

    transport: str
    uri: str
    lease: float | None = None

    def __str__(self) -> str:
        return f"{self.transport}, {self.uri.partition(':')[0]}, lease {self.lease or DEFAULT_LEASE:g} s"


class Fleet:
    """Workers of one group and one database, and the store that a test reads."""

    def __init__(self, kafka: Kafka, topic: str, case: Case, folder: Path) -> None:
        self.kafka = kafka
        self.topic = topic
        self.case = case
        self.lease = case.lease or DEFAULT_LEASE
        self.store = open_store(case.uri)
        self.store.check()
        self._config = config(kafka, session_timeout_ms=45_000)
        self._ledger = folder / "ledger"
        self._workers: list[Worker] = []

    def start(self) -> Worker:
        """Start a worker; all of its settings but the lease have their defaults."""
        lease = {} if self.case.lease is None else {"KSER_LEASE": str(self.case.lease)}
        worker = Worker(
            self._config,
            self.topic,
            self._ledger,
            transport=self.case.transport,
            KSER_DATABASE_URI=self.case.uri,
            KSER_WORKERS=str(THREADS),
            **lease,
        )
        self._workers.append(worker)
        return worker

    def send(self, *messages: Message) -> list[str]:
        """Send messages, and return their uuids."""
        send_records(self.kafka, self.topic, messages)
        return uuids(messages)

    def owner_of(self, uuid: str) -> str:
        """Return the owner of a running operation, or an empty text."""
        row = self.store.get_operation(uuid)
        return "" if row is None or row.owner is None or row.status != RUNNING else row.owner

    def split_by_owner(self, operations: list[str]) -> tuple[Worker, Worker]:
        """Return the worker that holds the claims on operations, and the other worker."""
        (pid,) = {int(self.owner_of(uuid).split(":")[1]) for uuid in operations}
        first, second = self._workers
        return (first, second) if first.pid == pid else (second, first)

    def wait_for_end(self, operations: list[str], status: str) -> None:
        """Wait until operations have ended with a status."""
        wait_until(
            lambda: all((row := self.store.get_operation(uuid)) and row.status == status for uuid in operations),
            f"all operations {status}",
            60,
        )

    def close(self) -> None:
        """End the workers and close the store."""
        for worker in self._workers:
            worker.__exit__(None, None, None)
        self.store.close()


def check_retries(fleet: Fleet) -> None:
    """Check that retries begin soon after they are due."""
    retried = fleet.send(*(message("__main__.RetriedJob", times=2) for _ in range(20)))
    fleet.wait_for_end(retried, SUCCESS)
    snapshots = [snapshot for uuid in retried if (snapshot := fleet.store.snapshot(uuid)) is not None]
    pairs = [pair for snapshot in snapshots for pair in itertools.pairwise(snapshot.attempts)]
    delays = [later.started_at - (earlier.ended_at + RETRY_DELAY) for earlier, later in pairs]
    assert len(delays) == 2 * len(retried)
    print(
        f"{fleet.case}: retries begin {percentile(delays, 0.5):.3f} s (median), {percentile(delays, 0.95):.3f} s (p95)"
        f" and {max(delays):.3f} s (longest) after they are due"
    )
    assert percentile(delays, 0.95) <= 0.3 + LOAD


def check_resumes(fleet: Fleet) -> None:
    """Check that operations continue soon after a resume, which sends nothing."""
    failed = fleet.send(*(message("__main__.Job", then="fail") for _ in range(10)))
    fleet.wait_for_end(failed, FAILED)
    resumed_at: dict[str, float] = {}
    for uuid in failed:
        row = fleet.store.get_operation(uuid)
        assert row is not None
        resumed_at[uuid] = time.time()
        fleet.store.resume(uuid, row.epoch, f"token {uuid}")
    fleet.wait_for_end(failed, FAILED)
    waits = [first_at(fleet.store, uuid, "claimed", at) - at for uuid, at in resumed_at.items()]
    print(f"{fleet.case}: resumed operations begin after {percentile(waits, 0.95):.3f} s (p95)")
    assert percentile(waits, 0.95) <= 0.5 + LOAD


def check_continuation(fleet: Fleet) -> None:
    """Check how soon operations begin again after a retry, a resume, and the death of their consumer.

    The consumer that continues them after the kill is idle, and has no partition: the session of the group lasts longer
    than the test, so nothing goes through the partition of the killed consumer.
    """
    fleet.start().wait_for_partitions(1, 30)
    fleet.start().wait_for_text("Starting", 30)
    # A consumer that has just started trusts expired leases after one lease.
    trusts_at = time.monotonic() + fleet.lease + 2
    check_retries(fleet)
    check_resumes(fleet)
    wait_until(lambda: time.monotonic() > trusts_at, "a lease of contact", 30)

    running = fleet.send(*(message(JOBS[number % 2], seconds=8) for number in range(20)))
    wait_until(lambda: all(fleet.owner_of(uuid) for uuid in running), "all operations claimed", 30)
    # The group may have given the partition to either worker.
    victim, survivor = fleet.split_by_owner(running)
    killed_at = time.time()
    victim.send_signal(signal.SIGKILL)
    wait_until(
        lambda: all(first_at(fleet.store, uuid, "claimed", killed_at) < NEVER for uuid in running),
        "all operations continue",
        fleet.lease + 30,
    )
    delays = [first_at(fleet.store, uuid, "claimed", killed_at) - killed_at for uuid in running]
    print(f"{fleet.case}: operations continue {min(delays):.2f} to {max(delays):.2f} s after the kill")
    assert max(delays) <= fleet.lease + AFTER_LEASE + LOAD
    assert survivor.recorded("assigned")[-1:] in ([], ["0"]), "the partition still belongs to the killed consumer"
    # The survivor ends after its running tasks.
    survivor.send_signal(signal.SIGTERM)
    assert survivor.wait(60) == 0
    assert all(not fleet.owner_of(uuid) for uuid in running)


def test_operations_continue_soon_with_the_default_settings(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path
) -> None:
    """durability rules 12, 20, 25 and 27"""
    case = Case("python_kafka", f"sqlite:///{tmp_path / 'kser.db'}")
    with contextlib.closing(Fleet(kafka, topic(), case, tmp_path)) as fleet:
        check_continuation(fleet)


def test_operations_continue_soon_with_postgresql(
    kafka: Kafka, topic: Callable[..., str], database: Database, tmp_path: Path
) -> None:
    """durability rules 12, 20, 25 and 27: with a shorter lease, to save time."""
    database.empty()
    with contextlib.closing(Fleet(kafka, topic(), Case("confluent", database.uri, 3), tmp_path)) as fleet:
        check_continuation(fleet)
