"""Consumers of one group and one database, and how soon stored operations continue with them.

All times come from the database: the store's clock is the clock of this machine.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kser.status import FAILED, RUNNING, SUCCESS
from kser.store import open_store
from kser.store.base import Store
from kser.store.model import EventRow
from tests.kafka.broker import Kafka
from tests.kafka.helpers import Worker, config, message, send_records, uuids, wait_until

if TYPE_CHECKING:
    from kser.schemas import Message

#: The default of ``KSER_LEASE``.
DEFAULT_LEASE = 15.0
#: The delay of the retries.
RETRY_DELAY = 1.0
#: The time of an event that did not happen.
NEVER = float("inf")

#: An operation in one consumer, and an operation over the consumers.
LOCAL, DISTRIBUTED = "__main__.Job", "__main__.SpreadJob"


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
    """Workers of one group and one database, and the store in which their operations are stored.

    :param folder: folder of the ledger.
    :param threads: number of threads of each worker.
    """

    def __init__(self, kafka: Kafka, topic: str, case: Case, folder: Path, threads: int = 24) -> None:
        self.kafka = kafka
        self.topic = topic
        self.case = case
        self.lease = case.lease or DEFAULT_LEASE
        self.store = open_store(case.uri)
        self.store.check()
        self._config = config(kafka, session_timeout_ms=45_000)
        self._ledger = folder / "ledger"
        self._threads = threads
        self._trusted_at = NEVER
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
            KSER_WORKERS=str(self._threads),
            **lease,
        )
        self._workers.append(worker)
        return worker

    def start_two(self) -> None:
        """Start two workers. One of them has the partition, and the other one is idle."""
        self.start().wait_for_partitions(1, 30)
        self.start().wait_for_text("Starting", 30)
        self._trusted_at = time.monotonic() + self.lease + 2

    def wait_for_trust(self) -> None:
        """Wait until the workers trust expired leases: a consumer that has just started trusts them after a lease."""
        wait_until(lambda: time.monotonic() > self._trusted_at, "a lease of contact", 30)

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


def retry_delays(fleet: Fleet, count: int) -> list[float]:
    """Return how many seconds after they were due the two retries of each of ``count`` operations began."""
    retried = fleet.send(*(message("__main__.RetriedJob", times=2) for _ in range(count)))
    fleet.wait_for_end(retried, SUCCESS)
    snapshots = [snapshot for uuid in retried if (snapshot := fleet.store.snapshot(uuid)) is not None]
    pairs = [pair for snapshot in snapshots for pair in itertools.pairwise(snapshot.attempts)]
    assert len(pairs) == 2 * count
    return [later.started_at - (earlier.ended_at + RETRY_DELAY) for earlier, later in pairs]


def resume_delays(fleet: Fleet, count: int) -> list[float]:
    """Return how many seconds after their resume, which sends nothing, ``count`` failed operations were claimed."""
    failed = fleet.send(*(message(LOCAL, then="fail") for _ in range(count)))
    fleet.wait_for_end(failed, FAILED)
    resumed_at: dict[str, float] = {}
    for uuid in failed:
        row = fleet.store.get_operation(uuid)
        assert row is not None
        resumed_at[uuid] = time.time()
        fleet.store.resume(uuid, row.epoch, f"token {uuid}")
    fleet.wait_for_end(failed, FAILED)
    return [first_at(fleet.store, uuid, "claimed", at) - at for uuid, at in resumed_at.items()]


def delays_after_kill(fleet: Fleet, entrypoints: Sequence[str], count: int) -> list[float]:
    """Kill one of two workers, and return after how many seconds each of its ``count`` operations was claimed again.

    :param entrypoints: the classes of the operations, in turn.
    """
    classes = itertools.cycle(entrypoints)
    running = fleet.send(*(message(next(classes), seconds=8) for _ in range(count)))
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
    # The session of the group lasts longer than this, so nothing went through the partition of the killed worker.
    assert survivor.recorded("assigned")[-1:] in ([], ["0"]), "the partition still belongs to the killed worker"
    # The survivor ends after its running tasks.
    survivor.send_signal(signal.SIGTERM)
    assert survivor.wait(60) == 0
    assert all(not fleet.owner_of(uuid) for uuid in running)
    return [first_at(fleet.store, uuid, "claimed", killed_at) - killed_at for uuid in running]
