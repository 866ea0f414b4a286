"""Section 8: signals during a message."""

import os
import signal
import subprocess
import sys

from recorder import case, emit, file, main, normalise
from wire import feed

TOPICS = ("sigterm", "sigint")

CHILD = """
import logging, os, signal, sys
from recorder import TraceHandler
from wire import CLIENT
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer

logging.getLogger("kser.python_kafka").addHandler(TraceHandler())
logging.getLogger("kser.python_kafka").setLevel(logging.INFO)

class Probe(Entrypoint):
    def run(self):
        print("task begins", flush=True)
        os.kill(os.getpid(), int(sys.argv[2]))
        print("task ends", flush=True)

Controller.register("probe", Probe)
Consumer({**CLIENT, "auto_offset_reset": "earliest"}, [sys.argv[1]]).run()
"""


def child(topic: str, number: int) -> None:
    """Run a consumer whose only task sends a signal to the process."""
    feed(topic, b'{"uuid": "u", "entrypoint": "probe"}')
    done = subprocess.run(
        [sys.executable, "-c", CHILD, topic, str(number)], capture_output=True, text=True, check=False, timeout=60
    )
    for line in done.stdout.splitlines():
        emit(normalise(line))
    emit(f"exit {done.returncode} {'KeyboardInterrupt' if 'KeyboardInterrupt' in done.stderr else ''}")
    file("running", os.environ["RUNNING_FILE"])


@case("8.signals.term")
def sigterm_while_a_task_runs() -> None:
    child("sigterm", signal.SIGTERM)


@case("8.signals.int")
def sigint_while_a_task_runs() -> None:
    child("sigint", signal.SIGINT)


if __name__ == "__main__":
    main()
