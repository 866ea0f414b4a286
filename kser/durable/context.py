"""Durable context: the store, the classes, the producer and the claims that all executions of a process share."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from cdumay_result import Result

from kser import status as states
from kser.config import Settings
from kser.durable.serialization import EntrypointLoader
from kser.entry import RegistryProtocol
from kser.errors import ProducerMissing, SettingError
from kser.escaping import escape_lines
from kser.limits import Limits
from kser.producer import KafkaProducerBase
from kser.results import failed_result
from kser.schemas import OPERATION_KEY, Message
from kser.store.base import Store
from kser.store.model import Claim, ClaimRequest, OperationRow, StepMessage
from kser.store.retrying import RetryingStore
from kser.store.transitions import needed_entrypoints

if TYPE_CHECKING:
    from kser.controller import BaseProducer

logger = escape_lines(logging.getLogger(__name__))

#: Seconds between the reservation of a step whose lease has expired and its claim. The owner may have been unable to
#: renew the lease, because its row or the whole database was locked; now that the reservation has succeeded, the owner
#: can renew the lease too, and its heartbeat tries this more often than once in the grace period.
GRACE = 0.8

#: Seconds for which a process remembers that a step became due.
DUE_TIMES_KEPT = 10.0

#: Maximum duration of a send in seconds. If the broker does not confirm a step's message within this time, the reaper
#: sends the message later.
SEND_TIMEOUT = 10.0


class ActiveClaim(Protocol):
    """Claim that this process holds now."""

    @property
    def key(self) -> tuple[int, int]:
        """Id of the root and epoch of the claim."""
        ...

    @property
    def label(self) -> str:
        """Label of the root operation for log lines."""
        ...

    @property
    def is_abandoned(self) -> bool:
        """True if the consumer has abandoned the attempt that runs under the claim."""
        ...

    def release(self) -> None:
        """Release the claim."""


class DurabilitySettings:
    """Settings of leases, heartbeat, takeovers and reaper.

    ====================== ======= =================================================================================
    setting                default meaning
    ====================== ======= =================================================================================
    ``KSER_LEASE``         15      seconds after which a claim expires if no heartbeat renews it
    ``KSER_HEARTBEAT``     3       seconds between two heartbeats, less than half of the lease
    ``KSER_LOOK``          0.25    seconds between two looks for due steps to take over, while a worker is free
    ``KSER_RESERVATION``   5       seconds for which a step is reserved for a consumer that takes it over
    ``KSER_REAPER``        1       seconds between two searches for due steps to send, and between two looks for due
                                   steps while all workers are busy
    ``KSER_RESEND``        60      seconds until an unclaimed step is sent again; doubled each time, up to an hour
    ``KSER_MAX_CLAIMS``    20      maximum number of claims of an operation at one step; the next claim fails the step
    ``KSER_MAX_SENDS``     20      number of messages of a step that no consumer knows, after which the step fails
    ``KSER_UNKNOWN_AFTER`` 3600    minimum number of seconds before a step that no consumer knows fails
    ====================== ======= =================================================================================

    :raises kser.errors.SettingError: a setting has an invalid value.
    """

    def __init__(self, settings: Settings) -> None:
        self.lease = settings.number("KSER_LEASE", 15)
        self.heartbeat = settings.number("KSER_HEARTBEAT", self.lease / 5)
        self.look = settings.number("KSER_LOOK", 0.25)
        self.reservation = settings.number("KSER_RESERVATION", 5)
        self.grace = min(GRACE, self.lease / 5)
        self.reaper = settings.number("KSER_REAPER", 1)
        self.resend = settings.number("KSER_RESEND", 60)
        self.max_claims = int(settings.number("KSER_MAX_CLAIMS", 20, whole=True))
        self.max_sends = int(settings.number("KSER_MAX_SENDS", 20, whole=True))
        self.unknown_after = settings.number("KSER_UNKNOWN_AFTER", 3600)
        if self.heartbeat * 2 >= self.lease:
            raise SettingError(
                f"KSER_HEARTBEAT must be less than half of KSER_LEASE ({self.lease:g} s); it is {self.heartbeat:g} s"
            )


class DurableContext:
    """The durable context that all executions of a process share.

    :param registry: the registry with the classes, the producer and the settings.
    :param store: the shared database.
    """

    def __init__(self, registry: RegistryProtocol, store: Store) -> None:
        self.registry = registry
        #: The store, which repeats each call during an outage. ``store.direct`` makes each call only once.
        self.store = RetryingStore(store)
        self.settings = DurabilitySettings(registry.settings)
        #: The limits of the operations that this process sends.
        self.limits = Limits.from_settings(registry.settings)
        #: The name of this process as an owner of claims: the host and the process id, which help operators, and a
        #: random part.
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:16]}"
        self.loader = EntrypointLoader(registry)
        #: The clock of this process, in seconds, and the function that waits; tests may replace both.
        self.clock: Callable[[], float] = time.monotonic
        self.sleep: Callable[[float], object] = time.sleep
        self._lock = threading.Lock()
        # The times at which steps become due that this process has released with a delay, in ascending order.
        self._due_times: list[float] = []
        self._active_claims: dict[int, ActiveClaim] = {}
        #: Steps that were sent but are not marked as sent in the store yet, each as a pair ``(root_id, epoch)`` of its
        #: root.
        self.unrecorded_sends: deque[tuple[int, int]] = deque()

    def new_claim_request(self, topic: str | None = None, **values: Any) -> ClaimRequest:
        """Return a new claim request with a random token.

        :param topic: the topic of the record or takeover that requests the step; None to claim a step of any topic.
        :param values: other fields of the request.
        """
        settings = self.settings
        return ClaimRequest(
            owner=self.owner,
            token=uuid4().hex,
            lease=settings.lease,
            max_claims=settings.max_claims,
            topic=topic,
            **values,
        )

    def known_classes(self) -> Collection[str]:
        """Return the paths of the classes that this process knows, whichever registry they are subscribed to."""
        return frozenset(path for path in list(self.registry.controller.ENTRYPOINTS) if isinstance(path, str))

    def unknown_classes(self, row: OperationRow) -> list[str]:
        """Return the paths of the classes that the current step of a root needs and this process does not know."""
        return [path for path in needed_entrypoints(row) if self.loader.lookup(path) is None]

    def reclaim(self, claim: Claim) -> Claim | None:
        """Read a claim of this process from the store again and return it, or return None if the claim was lost."""
        request = replace(self.new_claim_request(), token=claim.root.token or "")
        renewed = self.store.claim(claim.root.uuid, claim.root.target.uuid, request)
        return renewed if isinstance(renewed, Claim) and renewed.epoch == claim.epoch else None

    def note_due(self, delay: float) -> None:
        """Remember that a step that this process has released becomes due, so that a consumer looks at that time.

        :param delay: seconds until the step is due.
        """
        with self._lock:
            insort(self._due_times, self.clock() + delay)

    def next_due(self, after: float) -> float:
        """Return the first time after ``after`` at which a remembered step becomes due; infinity if there is none."""
        with self._lock:
            # Other consumers of the process may look later, so keep the times of the last seconds.
            del self._due_times[: bisect_left(self._due_times, after - DUE_TIMES_KEPT)]
            position = bisect_right(self._due_times, after)
            return self._due_times[position] if position < len(self._due_times) else float("inf")

    def register_claim(self, claim: ActiveClaim) -> None:
        """Register an active claim, so that the heartbeat renews its lease."""
        with self._lock:
            self._active_claims[claim.key[0]] = claim

    def release_claim(self, claim: ActiveClaim) -> None:
        """Unregister a claim, so that the heartbeat no longer renews its lease."""
        root_id, _ = claim.key
        with self._lock:
            if self._active_claims.get(root_id) is claim:
                del self._active_claims[root_id]

    def active_claims(self) -> list[ActiveClaim]:
        """Return the claims that this process holds now."""
        with self._lock:
            return list(self._active_claims.values())

    def claim_for(self, root_id: int) -> ActiveClaim | None:
        """Return the active claim on a root, or None if this process has no claim on the root."""
        with self._lock:
            return self._active_claims.get(root_id)

    def send(
        self,
        target: StepMessage,
        root_uuid: str,
        step_key: tuple[int, int] | None = None,
        key: str | bytes | None = None,
        timeout: float = SEND_TIMEOUT,
    ) -> Result:
        """Send the message of a step, and wait for the delivery of the message.

        :param step_key: id and epoch of the root, which are needed to mark the step as sent.
        :return: the Result of the producer. If this Result is a failure, the reaper sends the message later.
        """
        options: dict[str, Any] = {} if key is None else {"key": key}
        try:
            result = self.producer.send(target.topic, step_message(target, root_uuid), timeout, **options)
        except Exception as error:
            # A third-party producer may raise any exception. The store contains the step as ready to run, so the reaper
            # sends the message of the step.
            result = failed_result(error, target.uuid)
        return self._on_sent(target, root_uuid, step_key, result)

    def send_nowait(self, target: StepMessage, root_uuid: str, step_key: tuple[int, int]) -> None:
        """Send the message of a step without waiting for its delivery, if the producer supports this.

        :param step_key: id and epoch of the root, which are needed to mark the step as sent.
        """
        try:
            producer = self.producer
            if not isinstance(producer, KafkaProducerBase):
                # Only KafkaProducerBase has send_nowait. A wrapper or a third-party producer has its own send, so call
                # this send.
                self.send(target, root_uuid, step_key)
                return
            producer.send_nowait(
                target.topic,
                step_message(target, root_uuid),
                partial(self._on_sent, target, root_uuid, step_key),
                SEND_TIMEOUT,
            )
        except Exception as error:
            self._on_sent(target, root_uuid, step_key, failed_result(error, target.uuid))

    def _on_sent(self, target: StepMessage, root_uuid: str, step_key: tuple[int, int] | None, result: Any) -> Result:
        """Handle the result of the producer.

        If the message was delivered, put its step into the queue of the steps to mark as sent. If the send failed, log
        the failure.
        """
        if not isinstance(result, Result):
            # A hook of the producer returned no Result, so it is unknown whether the message was delivered. So do not
            # mark the step as sent.
            return Result(uuid=target.uuid)
        if states.final_status(result) == states.SUCCESS:
            if step_key is not None:
                self.unrecorded_sends.append(step_key)
            return result
        logger.warning(
            f"{target.entrypoint}[{target.uuid}] of operation {root_uuid} could not be sent: {result.stderr}; the"
            " reaper of a consumer will send it"
        )
        return result

    @property
    def producer(self) -> BaseProducer:
        """Producer that sends the messages of steps.

        :raises kser.errors.ProducerMissing: the registry has no producer.
        """
        producer: BaseProducer = self.registry.producer
        return producer


def step_value(context: DurableContext, target: StepMessage, root_uuid: str) -> bytes | None:
    """Return the value of the message that starts a step, as the producer of this process would send it.

    The function waits for no broker.

    :return: None as long as the producer is made.
    :raises Exception: a hook of the producer raised this exception.
    """
    kmsg = step_message(target, root_uuid)
    try:
        producer = context.registry._kser_prepared_producer()
    except ProducerMissing:
        return kmsg.dumps().encode("utf-8")
    if producer is None:
        return None
    if isinstance(producer, KafkaProducerBase):
        return producer._kser_record_value(target.topic, kmsg)
    return kmsg.dumps().encode("utf-8")


def step_message(target: StepMessage, root_uuid: str) -> Message:
    """Return the message that starts a step, without params and results, which stay in the database."""
    return Message(uuid=target.uuid, entrypoint=target.entrypoint, metadata={OPERATION_KEY: root_uuid})
