"""Faults, and wrappers of store, producer and client that inject them: each call is a crash point."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kser import status as states
from kser.consumer.client import Commit, Partition, Record
from kser.dummy.broker import DummyClient, InMemoryBroker
from kser.dummy.producer import Producer
from kser.errors import ClientError, DeliveryError, StoreUnavailable
from kser.store.model import Checkpoint, Claim, ClaimRequest

if TYPE_CHECKING:
    from tests.crash.process import Process

#: The call fails, and takes no effect.
REFUSED: Final = "refused"
#: The call takes effect, and its reply is lost.
REPLY_LOST: Final = "reply lost"
#: The record is lost, although the producer reports its delivery.
RECORD_LOST: Final = "record lost"
#: The process dies.
KILLED_BEFORE: Final = "killed before"
KILLED_AFTER: Final = "killed after"
#: The process stalls for longer than its lease and its group session, and then continues with the call.
STALLED_BEFORE: Final = "stalled before"
STALLED_AFTER: Final = "stalled after"

KILLED: Final = (KILLED_BEFORE, KILLED_AFTER)
STALLED: Final = (STALLED_BEFORE, STALLED_AFTER)
#: Faults that are injected before the call takes effect, the others after it.
BEFORE_THE_CALL: Final = (REFUSED, RECORD_LOST, KILLED_BEFORE, STALLED_BEFORE)
#: Faults that the process survives without a pause.
CALL_FAULTS: Final = (REFUSED, REPLY_LOST, RECORD_LOST)

#: Events at which a stalled process wakes up: a reaper has taken its step, a consumer has reserved its step, or another
#: process has claimed the operation, has written a checkpoint, or has ended the operation.
WAKE_EVENTS: Final = ("reaped", "reserved", "claimed", "recorded", "ended")

POLL: Final = "poll"
READ: Final = "read"
SAVE: Final = "save"
CLAIM: Final = "claim"
RUN: Final = "run"
HEARTBEAT: Final = "heartbeat"
RETRY_CHECKPOINT: Final = "retry recorded"
CHECKPOINT: Final = "checkpoint"
SEND_NEXT: Final = "send next"
MARK_SENT: Final = "record sent"
END_HOOK: Final = "ending hook"
END_CHECKPOINT: Final = "terminal write"
RELEASE: Final = "claim released"
REAPER_TAKE: Final = "reaper take"
REAPER_SEND: Final = "reaper send"
RESERVE: Final = "reservation"
QUEUE: Final = "takeover queued"
TAKEOVER_CLAIM: Final = "takeover claim"
TAKEOVER_CHECKPOINT: Final = "first checkpoint of a takeover"
RETURN: Final = "reservation returned"
OFFSET_COMMIT: Final = "offset commit"

_WRITE_FAULTS: Final = (REFUSED, REPLY_LOST, *KILLED, *STALLED)
_READ_FAULTS: Final = (REFUSED, KILLED_BEFORE, STALLED_BEFORE)

#: The crash points in the order in which a step passes them, with the faults that are possible at each.
CRASH_POINTS: Final[Mapping[str, Sequence[str]]] = {
    POLL: (REFUSED, *KILLED, *STALLED),
    READ: _READ_FAULTS,
    SAVE: _WRITE_FAULTS,
    CLAIM: _WRITE_FAULTS,
    RUN: (*KILLED, *STALLED),
    HEARTBEAT: _WRITE_FAULTS,
    RETRY_CHECKPOINT: _WRITE_FAULTS,
    CHECKPOINT: _WRITE_FAULTS,
    SEND_NEXT: (RECORD_LOST, *_WRITE_FAULTS),
    MARK_SENT: _WRITE_FAULTS,
    END_HOOK: (*KILLED, *STALLED),
    END_CHECKPOINT: _WRITE_FAULTS,
    RELEASE: _WRITE_FAULTS,
    REAPER_TAKE: _WRITE_FAULTS,
    REAPER_SEND: (RECORD_LOST, *_WRITE_FAULTS),
    RESERVE: _WRITE_FAULTS,
    QUEUE: (*KILLED, *STALLED),
    TAKEOVER_CLAIM: _WRITE_FAULTS,
    TAKEOVER_CHECKPOINT: _WRITE_FAULTS,
    RETURN: _WRITE_FAULTS,
    OFFSET_COMMIT: _WRITE_FAULTS,
}


class ProcessKilled(KeyboardInterrupt):
    """The death of a process: no later call of the process takes effect.

    It is a KeyboardInterrupt, because kser and user code must not handle it as a failure of the task.
    """


class Fault(NamedTuple):
    """A fault at one call."""

    #: Number of the call, counted over all processes.
    call_number: int
    kind: str
    #: The event at which the process wakes up, if it stalls.
    wake_event: str = ""


class Call(NamedTuple):
    """A call of a process at a crash point."""

    number: int
    crash_point: str
    process: str


def crash_point_of(checkpoint: Checkpoint) -> str:
    """Return the crash point of a checkpoint."""
    if any(outcome.status == states.PENDING for outcome in checkpoint.outcomes):
        return RETRY_CHECKPOINT
    if states.is_final(checkpoint.updates[-1].status):
        return END_CHECKPOINT
    return RELEASE if any(event.kind == "released" for event in checkpoint.events) else CHECKPOINT


class FaultyStore:
    """The store of one process, with faults."""

    _CRASH_POINTS: Final = {
        "save": SAVE,
        "mark_sent": MARK_SENT,
        "renew": HEARTBEAT,
        "take_due_steps": REAPER_TAKE,
        "postpone_send": REAPER_SEND,
        "reserve_due_steps": RESERVE,
        "reserve_step": RESERVE,
        "return_reservations": RETURN,
        "postpone_takeover": RETURN,
        "get_operation": READ,
        "get_task": READ,
        "get_tasks": READ,
        "get_children": READ,
    }

    def __init__(self, process: Process, store: Any) -> None:
        self._process = process
        self._store = store
        self.name = store.name
        #: The owner that the process names in its claim requests, None before the first one.
        self.owner: str | None = None
        # The epoch of a takeover's claim before its first checkpoint.
        self._taken_over_epoch = -1

    def check(self) -> None:
        """Accept the schema."""

    def checkpoint(self, checkpoint: Checkpoint) -> Any:
        """Write a checkpoint."""
        point = TAKEOVER_CHECKPOINT if checkpoint.epoch == self._taken_over_epoch else crash_point_of(checkpoint)
        self._taken_over_epoch = -1
        return self._call(point, lambda: self._store.checkpoint(checkpoint))

    def claim(self, uuid: str, step: str, request: ClaimRequest) -> Any:
        """Claim the operation for a record or for a takeover."""
        self.owner = request.owner
        point = CLAIM if request.taken_over is None else TAKEOVER_CLAIM
        claim = self._call(point, lambda: self._store.claim(uuid, step, request))
        if request.taken_over is not None and isinstance(claim, Claim):
            self._taken_over_epoch = claim.epoch
        return claim

    def __getattr__(self, name: str) -> Any:
        crash_point, method = self._CRASH_POINTS[name], getattr(self._store, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            for request in args:
                if isinstance(request, ClaimRequest):
                    self.owner = request.owner
            return self._call(crash_point, lambda: method(*args, **kwargs))

        return call

    def _call(self, crash_point: str, call: Callable[[], Any]) -> Any:
        return self._process.crash_point(crash_point, call, _store_error)


class FaultyProducer(Producer):
    """The producer of one process, with faults."""

    def __init__(self, process: Process) -> None:
        super().__init__({})
        self._process = process

    def _kser_deliver(self, topic: str, value: bytes | None, key: bytes | None, headers: Any, deadline: float) -> None:
        def deliver() -> None:
            Producer._kser_deliver(self, topic, value, key, headers, deadline)
            self._process.simulation.on_record_sent(self._process)

        self._process.crash_point(REAPER_SEND if self._process.is_reaping else SEND_NEXT, deliver, _delivery_error)


class FaultyClient(DummyClient):
    """The client of one process, with faults."""

    def __init__(self, process: Process, broker: InMemoryBroker) -> None:
        super().__init__(broker, "dummy")
        self._process = process

    def poll(self, timeout: float, limit: int, paused: Collection[Partition]) -> Mapping[Partition, Sequence[Record]]:
        return self._process.crash_point(POLL, lambda: DummyClient.poll(self, timeout, limit, paused), _client_error)

    def commit(self, commits: Mapping[Partition, Commit], timeout: float) -> None:
        def commit() -> None:
            DummyClient.commit(self, commits, timeout)
            self._process.simulation.check_committed_offsets()

        self._process.crash_point(OFFSET_COMMIT, commit, _client_error)


def _store_error() -> Exception:
    return StoreUnavailable("injected fault: the database does not respond")


def _delivery_error() -> Exception:
    return DeliveryError("injected fault: Kafka does not respond")


def _client_error() -> Exception:
    return ClientError("injected fault: Kafka does not respond")
