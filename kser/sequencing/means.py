"""What the runs of stored operations share in one process: database, classes, producer, and who holds what."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from cdumay_result import Result

from kser import status as states
from kser.config import Settings
from kser.errors import SettingError
from kser.outgoing import OutgoingProducer
from kser.results import failure
from kser.schemas import OPERATION, Message
from kser.sequencing.patience import Patience
from kser.sequencing.stored import ClassFinder
from kser.store.base import Store
from kser.store.rows import Claimant, Target

if TYPE_CHECKING:
    from kser.controller import BaseProducer
    from kser.sequencing.registry import OperationRegistry
    from kser.sequencing.task import Task

logger = logging.getLogger(__name__)

#: Seconds that sending a step may take: what could not be sent then, the reaper sends.
SEND_TIMEOUT = 10.0


class Held(Protocol):
    """A claim that this process holds."""

    @property
    def key(self) -> tuple[int, int]:
        """Its root's id, and its epoch."""
        ...

    @property
    def label(self) -> str:
        """Its root, for the log."""
        ...

    @property
    def is_abandoned(self) -> bool:
        """Whether what runs under it was given up."""
        ...

    def release(self) -> None:
        """Give it back."""


class Terms:
    """Times and limits of claims, as the settings have them.

    =================== ======= ====================================================================================
    setting             default what it is
    =================== ======= ====================================================================================
    ``KSER_LEASE``      30      seconds after which a claim that nobody prolongs is over
    ``KSER_HEARTBEAT``  10      seconds between two prolongations, less than half a lease
    ``KSER_REAPER``     1       seconds between two looks for operations that nobody goes on with
    ``KSER_RESEND``     60      seconds until a step is sent again that nobody claims; doubled each time, to an hour
    ``KSER_MAX_CLAIMS`` 20      claims of one step without a recorded end, after which it has failed
    =================== ======= ====================================================================================

    :raises kser.errors.SettingError: one of them makes no sense.
    """

    def __init__(self, settings: Settings) -> None:
        self.lease = _number(settings, "KSER_LEASE", 30)
        self.heartbeat = _number(settings, "KSER_HEARTBEAT", self.lease / 3)
        self.reaper = _number(settings, "KSER_REAPER", 1)
        self.resend = _number(settings, "KSER_RESEND", 60)
        self.max_claims = int(_number(settings, "KSER_MAX_CLAIMS", 20, whole=True))
        if self.heartbeat * 2 >= self.lease:
            raise SettingError(
                f"KSER_HEARTBEAT must be less than half of KSER_LEASE ({self.lease:g} s); it is {self.heartbeat:g} s"
            )


def _number(settings: Settings, name: str, default: float, *, whole: bool = False) -> float:
    value = settings.get(name)
    try:
        number = float(default if value is None else value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not 0 < number < float("inf") or (whole and number % 1):
        raise SettingError(f"{name} must be a {'whole ' * whole}number above 0; it is {value!r}")
    return number


class Means:
    """What runs share.

    :param registry: whose classes, producer and settings they use.
    :param store: the database.
    """

    def __init__(self, registry: OperationRegistry, store: Store) -> None:
        self.registry = registry
        self.store = store
        self.patience = Patience()
        self.terms = Terms(registry.settings)
        #: This process, for claims: random, and with what somebody needs who looks for it.
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:16]}"
        self.classes = ClassFinder(lambda path: registry.controller.ENTRYPOINTS.get(path))
        self._lock = threading.Lock()
        self._held: dict[int, Held] = {}
        #: Steps that were sent and are not recorded so, each ``(root_id, epoch)``.
        self.sent: deque[tuple[int, int]] = deque()

    def claimant(self) -> Claimant:
        """For a new claim."""
        return Claimant(self.owner, uuid4().hex, self.terms.lease, self.terms.max_claims)

    def hold(self, run: Held) -> None:
        """A claim is held from now on."""
        with self._lock:
            self._held[run.key[0]] = run

    def let_go(self, run: Held) -> None:
        """A claim is held no longer."""
        with self._lock:
            if self._held.get(run.key[0]) is run:
                del self._held[run.key[0]]

    def held(self) -> list[Held]:
        """The claims that are held."""
        with self._lock:
            return list(self._held.values())

    def holder(self, root_id: int) -> Held | None:
        """The claim on a root that is held."""
        with self._lock:
            return self._held.get(root_id)

    def send(
        self,
        target: Target,
        root_uuid: str,
        mark: tuple[int, int] | None = None,
        key: str | bytes | None = None,
        timeout: float = SEND_TIMEOUT,
    ) -> Result:
        """Send a step.

        :param mark: the root's id and epoch, to record that it was sent.
        :return: the producer's result; a failed one leaves the rest to the reaper.
        """
        options: dict[str, Any] = {} if key is None else {"key": key}
        try:
            answer = self.producer.send(target.topic, step_message(target, root_uuid), timeout, **options)
        except Exception as error:
            # Producers may be anybody's; whatever it is, the step is recorded, and ready to be sent.
            answer = failure(error, target.uuid)
        return self._told(target, root_uuid, mark, answer)

    def post(self, target: Target, root_uuid: str, mark: tuple[int, int]) -> None:
        """Send a step, and go on meanwhile where the producer can.

        :param mark: the root's id and epoch, to record that it was sent.
        """
        try:
            producer = self.producer
            if not isinstance(producer, OutgoingProducer):
                # Whatever stands in front of it has a send of its own.
                self.send(target, root_uuid, mark)
                return
            producer.post(
                target.topic,
                step_message(target, root_uuid),
                partial(self._told, target, root_uuid, mark),
                SEND_TIMEOUT,
            )
        except Exception as error:
            self._told(target, root_uuid, mark, failure(error, target.uuid))

    def _told(self, target: Target, root_uuid: str, mark: tuple[int, int] | None, answer: Any) -> Result:
        """What came of sending."""
        if not isinstance(answer, Result):
            # Nobody can tell from a hook that returns nothing whether the message was delivered.
            return Result(uuid=target.uuid)
        if states.outcome(answer) == states.SUCCESS:
            if mark is not None:
                self.sent.append(mark)
            return answer
        logger.warning(
            f"{target.entrypoint}[{target.uuid}] of operation {root_uuid} could not be sent, and will be by the reaper"
            f" of a consumer: {answer.stderr}"
        )
        return answer

    def topic_finder(self, fallback: str) -> Callable[[Task], str]:
        """Tells where tasks are sent.

        :param fallback: where to when neither their class nor ``KSER_TOPICS`` says so.
        """
        default = next(iter(self.registry.settings.topics), fallback)
        return lambda task: task.TOPIC or default

    @property
    def producer(self) -> BaseProducer:
        """What steps are sent with.

        :raises kser.errors.ProducerMissing: there is none.
        """
        return self.registry.producer


def step_message(target: Target, root_uuid: str) -> Message:
    """The message that asks for a step: all the rest is in the database."""
    return Message(uuid=target.uuid, entrypoint=target.entrypoint, metadata={OPERATION: root_uuid})
