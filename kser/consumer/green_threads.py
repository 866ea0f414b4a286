"""A check for libraries that replace threads, such as gevent and eventlet, with which a consumer cannot work."""

from __future__ import annotations

import sys
from collections.abc import Collection

from kser.errors import SettingError

#: The modules whose replacement by gevent stops a consumer: its client waits in threads and on sockets.
_GEVENT_MODULES = ("threading", "socket", "select")


def check_threads(transport: str, refused: Collection[str]) -> None:
    """Check that no library has replaced the threads of this process.

    :param transport: the package of the consumer, for the error text.
    :param refused: the libraries with which the transport does not work: ``"gevent"``, ``"eventlet"``.
    :raises kser.errors.SettingError: one of these libraries has replaced the threads.
    """
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    patched = {
        "gevent": gevent is not None and any(map(gevent.is_module_patched, _GEVENT_MODULES)),
        "eventlet": eventlet is not None and eventlet.is_monkey_patched("thread"),
    }
    for library in refused:
        if patched[library]:
            raise SettingError(
                f"{library} has replaced the threads or sockets of this process, and a consumer of {transport} cannot"
                f" work without them: run the consumer in a process that does not call the monkey patching of {library}"
            )
