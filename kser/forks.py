"""Renewal of Kafka clients in a forked process.

A client has threads, locks and connections of its own, which belong to the process that created the client. A forked
process inherits the object without its threads: a call would wait for ever, and destroying the object would disturb the
connections of the parent process. So the child keeps the inherited client untouched, and creates a new client when it
first needs one.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Renewable(Protocol):
    """An object whose clients belong to one process."""

    def _kser_renew_after_fork(self) -> None:
        """Replace locks and forget inherited clients. A child process calls this method directly after the fork."""


class ProcessClient:
    """An attribute that is created at its first use, and at its first use in each forked process.

    After the first use, the value is an ordinary attribute of the object, so that each further access costs nothing
    extra.

    :param make: creates the value for an object. Threads that use the attribute for the first time at the same time get
        the same value.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make
        self._name = ""
        self._lock = threading.RLock()
        renew_after_fork(self)

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        with self._lock:
            values = vars(instance)
            if self._name not in values:
                values[self._name] = self._make(instance)
            return values[self._name]

    def drop(self, instance: Any, value: Any) -> bool:
        """Forget the value of an object, so that the next use creates a new value.

        :return: False if the attribute does not have this value any more, because another thread has dropped it.
        """
        with self._lock:
            is_current = vars(instance).get(self._name) is value
            if is_current:
                del vars(instance)[self._name]
            return is_current

    def _kser_renew_after_fork(self) -> None:
        # Another thread of the parent process may have held the lock during the fork, and does not exist here.
        self._lock = threading.RLock()


_renewables: weakref.WeakSet[Any] = weakref.WeakSet()
_owners: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def renew_after_fork(renewable: Renewable) -> None:
    """Call ``_kser_renew_after_fork`` of an object in each process that is forked from this one."""
    _renewables.add(renewable)


def keep_for_ever(client: Any) -> None:
    """Prevent that an inherited client is ever destroyed, also at the end of the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))


def keep_in_children(owner: Any, attribute: str) -> None:
    """Prevent that a forked process destroys the client in an attribute of ``owner``."""
    _owners[owner] = attribute


def _renew() -> None:
    for owner, attribute in list(_owners.items()):
        if (client := getattr(owner, attribute)) is not None:
            keep_for_ever(client)
    for renewable in list(_renewables):
        renewable._kser_renew_after_fork()


os.register_at_fork(after_in_child=_renew)
