"""Faults, and wrappers of store, producer and client that inject them: each call is a crash point."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kser import status as states
from kser.consumer.client import Commit, Partition, Record
from kser.dummy.broker import DummyClient, InMemoryBroker
from kser.dummy.producer import Producer
from kser.errors import ClientError, DeliveryError, StoreUnavailable
from kser.store.model import Checkpoint

if TYPE_CHECKING:
    from tests.crash.process import Process

#: What goes wrong in a call. Of a transaction: its COMMIT is refused, unknown or acknowledged.
REFUSED: Final = "refused"
UNKNOWN: Final = "unknown"
LOST: Final = "lost"
KILLED_BEFORE: Final = "killed before"
KILLED_AFTER: Final = "killed after"
SLEPT_BEFORE: Final = "slept before"
SLEPT_AFTER: Final = "slept after"

KILLED: Final = (KILLED_BEFORE, KILLED_AFTER)
SLEPT: Final = (SLEPT_BEFORE, SLEPT_AFTER)
#: What happens instead of the call, or before it.
BEFORE: Final = (REFUSED, LOST, KILLED_BEFORE, SLEPT_BEFORE)
#: After these the same process goes on.
TROUBLES: Final = (REFUSED, UNKNOWN, LOST)

#: When a process that slept wakes up: another one was told of its step by the reaper, has claimed it, has recorded
#: something, or has ended the operation.
MOMENTS: Final = ("reaped", "claimed", "recorded", "ended")

POLL: Final = "poll"
READ: Final = "read"
SAVE: Final = "save"
CLAIM: Final = "claim"
RUN: Final = "run"
HEARTBEAT: Final = "heartbeat"
RETRY: Final = "retry recorded"
CHECKPOINT: Final = "checkpoint"
SEND: Final = "send next"
SENT: Final = "record sent"
HOOK: Final = "ending hook"
TERMINAL: Final = "terminal write"
RELEASED: Final = "claim released"
TAKE_UP: Final = "reaper take"
REAPER_SEND: Final = "reaper send"
COMMIT: Final = "offset commit"

_WRITE: Final = (REFUSED, UNKNOWN, *KILLED, *SLEPT)
_LOOK: Final = (REFUSED, KILLED_BEFORE, SLEPT_BEFORE)

#: Every point, in the order in which a step comes to them, and what may go wrong there.
POINTS: Final[Mapping[str, Sequence[str]]] = {
    POLL: (REFUSED, *KILLED, *SLEPT),
    READ: _LOOK,
    SAVE: _WRITE,
    CLAIM: _WRITE,
    RUN: (*KILLED, *SLEPT),
    HEARTBEAT: _WRITE,
    RETRY: _WRITE,
    CHECKPOINT: _WRITE,
    SEND: (LOST, *_WRITE),
    SENT: _WRITE,
    HOOK: (*KILLED, *SLEPT),
    TERMINAL: _WRITE,
    RELEASED: _WRITE,
    TAKE_UP: _WRITE,
    REAPER_SEND: (LOST, *_WRITE),
    COMMIT: _WRITE,
}


class Killed(KeyboardInterrupt):
    """The process is dead: nothing that comes after is done by anybody.

    It is a KeyboardInterrupt because no code may take that for a failure of its own.
    """


class Fault(NamedTuple):
    """Something that goes wrong."""

    #: Number of the call, of all those that any process makes.
    at: int
    kind: str
    #: When it wakes up again, if it slept.
    moment: str = ""


class Call(NamedTuple):
    """A call that a process made."""

    number: int
    point: str
    process: str


def point_of(checkpoint: Checkpoint) -> str:
    """Which of the points a checkpoint is."""
    if any(end.status == states.PENDING for end in checkpoint.outcomes):
        return RETRY
    if states.is_final(checkpoint.updates[-1].status):
        return TERMINAL
    return RELEASED if any(note.kind == "released" for note in checkpoint.events) else CHECKPOINT


def _trouble_of_store() -> Exception:
    return StoreUnavailable("the test says that the database does not answer")


class FaultyStore:
    """The database, as one process reaches it."""

    _POINTS: Final = {
        "save": SAVE,
        "claim": CLAIM,
        "mark_sent": SENT,
        "renew": HEARTBEAT,
        "take_due_steps": TAKE_UP,
        "postpone_send": REAPER_SEND,
        "get_operation": READ,
        "get_task": READ,
        "get_tasks": READ,
        "get_children": READ,
    }

    def __init__(self, process: Process, store: Any) -> None:
        self._process = process
        self._store = store
        self.name = store.name

    def check(self) -> None:
        """It fits."""

    def checkpoint(self, checkpoint: Checkpoint) -> Any:
        """Record it, if the test lets it."""
        return self._call(point_of(checkpoint), lambda: self._store.checkpoint(checkpoint))

    def __getattr__(self, name: str) -> Any:
        point, method = self._POINTS[name], getattr(self._store, name)
        return lambda *args, **kwargs: self._call(point, lambda: method(*args, **kwargs))

    def _call(self, point: str, act: Callable[[], Any]) -> Any:
        return self._process.at(point, act, _trouble_of_store)


class FaultyProducer(Producer):
    """A producer of one process."""

    def __init__(self, process: Process) -> None:
        super().__init__({})
        self._process = process

    def _kser_deliver(self, topic: str, value: bytes | None, key: bytes | None, headers: Any, deadline: float) -> None:
        def act() -> None:
            Producer._kser_deliver(self, topic, value, key, headers, deadline)
            self._process.simulation.put(self._process)

        point = REAPER_SEND if self._process.reaps else SEND
        self._process.at(point, act, lambda: DeliveryError("the test says that Kafka does not answer"))


class FaultyClient(DummyClient):
    """A client of one process."""

    def __init__(self, process: Process, broker: InMemoryBroker) -> None:
        super().__init__(broker, "dummy")
        self._process = process

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        return self._process.at(POLL, lambda: DummyClient.poll(self, timeout, limit, paused), _trouble_of_client)

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        def act() -> None:
            DummyClient.commit(self, commits, timeout)
            self._process.simulation.check_commits()

        self._process.at(COMMIT, act, _trouble_of_client)


def _trouble_of_client() -> Exception:
    return ClientError("the test says that Kafka does not answer")
