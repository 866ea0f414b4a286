"""The signals of kser. Listeners connect to a signal of this module.

=====================  =====================  =========================================================
signal                 sender                 keywords
=====================  =====================  =========================================================
``entry_started``      the Entrypoint class   ``entry``
``entry_succeeded``    the Entrypoint class   ``entry``, ``result``
``entry_failed``       the Entrypoint class   ``entry``, ``result``
``entry_retried``      the Entrypoint class   ``entry``, ``result``, ``attempt`` (number of the failed attempt)
``operation_changed``  the registry           ``uuid``, ``entrypoint``, ``old`` and ``new`` (status), ``result``
``task_changed``       the registry           ``operation`` (the root's uuid), ``position``, ``new``, ``attempt``,
                                              ``error``
``message_refused``    the Controller class   ``raw_data``, ``error`` (the exception), ``result``
``message_sent``       the Producer class     ``topic``, ``kmsg``, ``result``
``dead_lettered``      the Consumer class     ``topic``, ``record``, ``failure`` (reason, error_class, message)
=====================  =====================  =========================================================

kser emits ``operation_changed`` and ``task_changed`` only for stored operations, after the store has recorded the
change.

Connect a listener with ``entry_failed.connect(function)``. kser calls the listener as ``function(sender, **keywords)``
in the thread that does the work, and the work continues after the call. If a listener raises an exception, kser logs
the exception and continues the work.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal, Namespace

from kser.escaping import escape_lines

if TYPE_CHECKING:
    from cdumay_result import Result

logger = escape_lines(logging.getLogger(__name__))

_signals = Namespace()
entry_started = _signals.signal("entry-started")
entry_succeeded = _signals.signal("entry-succeeded")
entry_failed = _signals.signal("entry-failed")
entry_retried = _signals.signal("entry-retried")
operation_changed = _signals.signal("operation-changed")
task_changed = _signals.signal("task-changed")
message_refused = _signals.signal("message-refused")
message_sent = _signals.signal("message-sent")
dead_lettered = _signals.signal("dead-lettered")


def emit_operation_changed(
    registry: Any, uuid: str, entrypoint: str, old: str | None, new: str, result: Result | None = None
) -> None:
    """Emit ``operation_changed`` for a change of a root operation's status."""
    emit(operation_changed, registry, uuid=uuid, entrypoint=entrypoint, old=old, new=new, result=result)


def emit(signal: NamedSignal, sender: Any, **keywords: Any) -> None:
    """Call every listener of ``signal``. If a listener raises an exception, log it and call the other listeners."""
    if not signal.receivers:
        return
    for receiver in signal.receivers_for(sender):
        try:
            receiver(sender, **keywords)
        except Exception:
            logger.exception("a listener of %r raised an exception, which is ignored: %r", signal.name, receiver)
