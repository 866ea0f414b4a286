"""Run tasks and operations (linear sequences of tasks) on Apache Kafka consumers.

Importing the package loads neither a Kafka client nor Flask nor marshmallow, because each class of ``__all__`` is
imported from its module at the first use of the class.
"""

from __future__ import annotations

import os
import socket
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kser.controller import Controller
    from kser.entry import Entrypoint
    from kser.schemas import Message
    from kser.sequencing.operation import Operation
    from kser.sequencing.registry import OperationRegistry
    from kser.sequencing.task import Task

__all__ = ["Controller", "Entrypoint", "Message", "Operation", "OperationRegistry", "Task", "__version__"]

__version__ = "1.0.0.dev0"
__hostname__ = socket.gethostname()

_HOMES = {
    "Controller": "kser.controller",
    "Entrypoint": "kser.entry",
    "Message": "kser.schemas",
    "Operation": "kser.sequencing.operation",
    "OperationRegistry": "kser.sequencing.registry",
    "Task": "kser.sequencing.task",
}

# At import, set the variables that locate the control files: the directory, and the path of each of the three files.
# Scripts and child processes read these variables, as with kser 0.8.
os.environ.setdefault("LOCK_PATH", "/var/run")
for _variable, _suffix in (("RUNNING_FILE", "run"), ("LOCK_FILE", "pause"), ("TERMINATE_FILE", "terminate")):
    os.environ.setdefault(_variable, os.path.join(os.environ["LOCK_PATH"], f"kser-{__hostname__}-{_suffix}.lock"))

KSER_METRICS_ENABLED = os.environ.get("KSER_METRICS_ENABLED", "no")
KSER_TASK_COUNT = None
KSER_TASKS_STATUS = None

if KSER_METRICS_ENABLED == "yes":
    import logging

    logging.getLogger(__name__).warning(
        "KSER_METRICS_ENABLED=yes has no effect: this version of kser exports no metrics yet; unset it to silence this"
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
