"""Errors that kser raises.

::

    KserError (cdumay_error.Error)
    ├── SettingError (also cdumay_error.types.ConfigurationError)   a setting is missing or wrong
    │   ├── ProducerMissing      there is no producer to send with
    │   ├── TopicMissing         there is no topic to send to
    │   ├── StoreMissing         there is no shared database, and the call needs one
    │   └── SchemaMismatch       the shared database has tables of another version
    ├── UsageError (also TypeError)                                 the call is invalid
    ├── LimitExceeded (also ValueError)                             a message exceeds a limit of a setting
    │   ├── ValueTooLarge        the value is too large
    │   ├── HeadersTooLarge      the headers are too large
    │   ├── TooManyMetadataKeys  the metadata have too many keys
    │   ├── NestedTooDeep        the JSON has too many levels
    │   └── UuidTooLong          the uuid is too long
    ├── MissingDependency        an optional dependency is not installed
    ├── BrokerUnavailable        no broker responds
    ├── ClientError              a call of the Kafka client failed; the consumer retries the call
    │   ├── ClientFenced         another process has taken the group instance id; the consumer ends
    │   └── GroupSettingError (also SettingError)   the group does not accept a setting; the consumer ends
    ├── ClientStuck (also RuntimeError)   the thread of the Kafka client is stuck or dead; the consumer ends
    ├── DeliveryError            delivery was not confirmed
    │   ├── MessageTooLarge      the record exceeds the size limit
    │   └── RecordRejected       the client or the broker rejects the record, and would always do so
    ├── SendError                the message of an operation was not delivered
    ├── RetryLater               a task requests another attempt
    ├── TaskTimeout (also TimeoutError)                             an attempt took longer than its TIME_LIMIT
    ├── StoreUnavailable         the shared database is unavailable; consumers retry the call
    ├── StoreError               the shared database rejects the call
    │   └── FencedError          another owner has claimed the operation
    ├── StateConflict            the state of the operation does not allow the call
    └── WaitTimeout (also TimeoutError)                             an operation has not ended in time

Undecodable messages and missing parameters raise ``cdumay_error.types.ValidationError``, as in 0.8.

All errors of this module are cdumay errors, so ``Result.from_exception`` keeps their ``code``, ``msgid``, ``message``
and ``extra``.
"""

from __future__ import annotations

from typing import Any

from cdumay_error import Error
from cdumay_error.types import ConfigurationError
from cdumay_result import Result


class KserError(Error):
    """Root of the errors of kser"""

    MSGID = "ERR-50300"
    CODE = 500


class SettingError(KserError, ConfigurationError):
    """A setting is missing or wrong"""

    MSGID = "ERR-50301"
    CODE = 400


class ProducerMissing(SettingError):
    """There is no producer to send with"""

    MSGID = "ERR-50302"


class TopicMissing(SettingError):
    """There is no topic to send to"""

    MSGID = "ERR-50303"


class StoreMissing(SettingError):
    """There is no shared database"""

    MSGID = "ERR-50304"


class SchemaMismatch(SettingError):
    """The shared database has tables of another version"""

    MSGID = "ERR-50314"


class UsageError(KserError, TypeError):
    """The call is invalid"""

    MSGID = "ERR-50305"
    CODE = 400


class LimitExceeded(KserError, ValueError):
    """A message exceeds a limit of a setting; see :mod:`kser.limits`"""

    MSGID = "ERR-50330"
    CODE = 413

    #: The uuid and the entrypoint in the message; None if the message was not decoded.
    received: tuple[Any, Any] | None = None


class ValueTooLarge(LimitExceeded):
    """The value of a message is larger than KSER_MAX_VALUE_BYTES"""

    MSGID = "ERR-50331"


class HeadersTooLarge(LimitExceeded):
    """The headers of a message are larger than KSER_MAX_HEADER_BYTES"""

    MSGID = "ERR-50332"


class TooManyMetadataKeys(LimitExceeded):
    """The metadata of a message have more than KSER_MAX_METADATA_KEYS keys"""

    MSGID = "ERR-50333"


class NestedTooDeep(LimitExceeded):
    """The JSON of a message has more than KSER_MAX_JSON_DEPTH levels"""

    MSGID = "ERR-50334"


class UuidTooLong(LimitExceeded):
    """The uuid of a message has more than KSER_MAX_UUID_LENGTH characters"""

    MSGID = "ERR-50335"


class MissingDependency(KserError):
    """An optional dependency is not installed"""

    MSGID = "ERR-50306"
    CODE = 501


class BrokerUnavailable(KserError):
    """No broker responds"""

    MSGID = "ERR-50307"
    CODE = 503


class ClientError(KserError):
    """A call of the Kafka client failed

    :param kind: the same for each repetition of the failure; a consumer logs each kind once and repeats it after a
        while. By default, the kind is the message.
    :param fatal: True if the client cannot recover, so that a new client must replace it.
    :param transient: True if the error is expected and disappears without an action, for example during a rebalance.
    """

    MSGID = "ERR-50309"
    CODE = 503

    def __init__(self, message: str, *, kind: str = "", fatal: bool = False, transient: bool = False) -> None:
        super().__init__(message)
        self.kind = kind or message
        self.fatal = fatal
        self.transient = transient


class DeliveryError(KserError):
    """Delivery of a record was not confirmed"""

    MSGID = "ERR-50310"
    CODE = 503


class MessageTooLarge(DeliveryError):
    """A record exceeds the size limit"""

    MSGID = "ERR-50311"
    CODE = 413


class RecordRejected(DeliveryError):
    """The client or the broker rejects a record, and would reject the same record again"""

    MSGID = "ERR-50325"
    CODE = 400


class RetryLater(KserError):
    """A task requests another attempt

    :param seconds: seconds until the next attempt.
    :raises SettingError: ``seconds`` is not a finite number, or is negative.
    """

    MSGID = "ERR-50312"
    CODE = 503

    def __init__(self, seconds: float) -> None:
        if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
            raise SettingError(f"Retry.later: seconds must be a finite number, 0 or more; it is {seconds!r}")
        super().__init__(f"the task requested another attempt in {seconds:g} s")
        self.seconds = seconds


class TaskTimeout(KserError, TimeoutError):
    """An attempt took longer than its time limit"""

    MSGID = "ERR-50313"
    CODE = 504


class SendError(KserError):
    """The message of an operation was not delivered

    :param result: the Result of the producer; its ``stderr`` has the reason.
    """

    MSGID = "ERR-50308"

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message, extra={"uuid": result.uuid})
        self.result = result


class StoreUnavailable(KserError):
    """The shared database is unavailable

    It is unknown whether the call took effect. A second call with the same arguments does no harm: it never does the
    work twice. Consumers repeat their calls by themselves.
    """

    MSGID = "ERR-50315"
    CODE = 503


class StoreError(KserError):
    """The shared database rejects the call"""

    MSGID = "ERR-50316"


class FencedError(StoreError):
    """Another owner has claimed the operation, or the operation has ended; nothing was recorded"""

    MSGID = "ERR-50317"
    CODE = 409


class StateConflict(KserError):
    """The state of the operation does not allow the call"""

    MSGID = "ERR-50318"
    CODE = 409


class WaitTimeout(KserError, TimeoutError):
    """The operation has not ended in time"""

    MSGID = "ERR-50319"
    CODE = 504


class ClientFenced(ClientError):
    """Another process has taken the group instance id of this consumer"""

    MSGID = "ERR-50326"
    CODE = 409


class GroupSettingError(ClientError, SettingError):
    """The consumer group does not accept a setting of the Kafka client"""

    MSGID = "ERR-50327"
    CODE = 400


class ClientStuck(KserError, RuntimeError):
    """The thread that owns the Kafka client does not respond, or has died"""

    MSGID = "ERR-50328"
    CODE = 503
