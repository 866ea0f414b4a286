"""The exit statuses of a consumer process."""

from __future__ import annotations

import threading
from enum import IntEnum

from kser.errors import ClientFenced, ClientStuck, SettingError


class ExitStatus(IntEnum):
    """An exit status of a consumer process. After a second SIGTERM, the status is 143, as in a shell."""

    #: An orderly end.
    OK = 0
    #: The thread that owns the Kafka client is stuck or dead. A restart of the process helps.
    CLIENT = 70
    #: Another process has taken the group instance id. A restart would fence that process.
    FENCED = 76
    #: The consumer cannot work with its settings. A restart does not help.
    SETTING = 78


#: The exit status of each error that ends a consumer.
_STATUSES: tuple[tuple[type[Exception], ExitStatus], ...] = (
    (ClientStuck, ExitStatus.CLIENT),
    (ClientFenced, ExitStatus.FENCED),
    (SettingError, ExitStatus.SETTING),
)


def exit_status(error: BaseException | None) -> ExitStatus | None:
    """Return the exit status of a process whose consumer ended with ``error``.

    :return: None if the error has no exit status of its own, so that Python prints it and exits with status 1.
    """
    if error is None:
        return ExitStatus.OK
    return next((status for cls, status in _STATUSES if isinstance(error, cls)), None)


def end_with(error: Exception) -> None:
    """End ``run()`` with an error: in the main thread with the exit status of the error, if it has one.

    :raises SystemExit: the error has an exit status, and this thread is the main thread.
    :raises Exception: ``error``, in any other case.
    """
    status = exit_status(error)
    if status is None or threading.current_thread() is not threading.main_thread():
        raise error
    raise SystemExit(int(status)) from error
