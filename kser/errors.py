"""Every error that kser raises on its own account, in one flat file.

::

    KserError (cdumay_error.Error)
    ├── SettingError (also cdumay_error.types.ConfigurationError)   a setting is missing or wrong
    │   ├── ProducerMissing      nothing to send with
    │   ├── TopicMissing         nowhere to send to
    │   ├── StoreMissing         no shared database for what needs one
    │   └── SchemaMismatch       the shared database has tables of another version
    ├── UsageError (also TypeError)                                 a call that cannot be meant
    ├── MissingDependency        an optional part is not installed
    ├── BrokerUnavailable        no broker answers
    ├── ClientTrouble            the Kafka client cannot do something now; it is tried again
    ├── NotDelivered             delivery was not confirmed
    │   └── MessageTooLarge      it exceeds what may be sent
    ├── SendError                an operation was not delivered
    ├── RetryLater               a task wants to be tried again
    ├── TaskTimeout (also TimeoutError)                             an attempt took longer than its TIMEOUT
    ├── StoreUnavailable         the shared database cannot be used now; it is tried again
    ├── StoreError               the shared database refuses something
    │   └── Fenced               somebody else has claimed the operation
    ├── StateConflict            an operation is in a state that does not allow this
    └── WaitTimeout (also TimeoutError)                             an operation has not ended in time

Messages that cannot be read and parameters that are missing are ``cdumay_error.types.ValidationError``, as in 0.8.

All are cdumay errors, so ``Result.from_exception`` keeps their ``code``, ``msgid``, ``message`` and ``extra``.
"""

from __future__ import annotations

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
    """The call cannot be meant as it was written"""

    MSGID = "ERR-50305"
    CODE = 400


class MissingDependency(KserError):
    """An optional part is not installed"""

    MSGID = "ERR-50306"
    CODE = 501


class BrokerUnavailable(KserError):
    """No broker answers"""

    MSGID = "ERR-50307"
    CODE = 503


class ClientTrouble(KserError):
    """The Kafka client cannot do something now

    :param fatal: this client will never do it: another one is to take its place.
    :param passing: it is normal for a while, as during a rebalance.
    """

    MSGID = "ERR-50309"
    CODE = 503

    def __init__(self, message: str, *, fatal: bool = False, passing: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal
        self.passing = passing


class NotDelivered(KserError):
    """Delivery of a record was not confirmed"""

    MSGID = "ERR-50310"
    CODE = 503


class MessageTooLarge(NotDelivered):
    """A record exceeds what may be sent"""

    MSGID = "ERR-50311"
    CODE = 413


class RetryLater(KserError):
    """A task wants to be tried again

    :param seconds: how long to wait before.
    :raises SettingError: they are no number of seconds.
    """

    MSGID = "ERR-50312"
    CODE = 503

    def __init__(self, seconds: float) -> None:
        if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
            raise SettingError(f"Retry.later takes a number of seconds, 0 or more; it is {seconds!r}")
        super().__init__(f"the task asked to be tried again in {seconds:g} s")
        self.seconds = seconds


class TaskTimeout(KserError, TimeoutError):
    """An attempt took longer than its class allows"""

    MSGID = "ERR-50313"
    CODE = 504


class SendError(KserError):
    """A message was not delivered

    :param result: what the producer answered: its ``stderr`` says why.
    """

    MSGID = "ERR-50308"

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message, extra={"uuid": result.uuid})
        self.result = result


class StoreUnavailable(KserError):
    """The shared database cannot be used now

    Nobody knows whether what was asked for took effect: it is asked for again, in the same words.
    """

    MSGID = "ERR-50315"
    CODE = 503


class StoreError(KserError):
    """The shared database refuses something"""

    MSGID = "ERR-50316"


class Fenced(StoreError):
    """Somebody else has claimed the operation, or it has ended: nothing was recorded"""

    MSGID = "ERR-50317"
    CODE = 409


class StateConflict(KserError):
    """An operation is in a state that does not allow this"""

    MSGID = "ERR-50318"
    CODE = 409


class WaitTimeout(KserError, TimeoutError):
    """An operation has not ended in time"""

    MSGID = "ERR-50319"
    CODE = 504
