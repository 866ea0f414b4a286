"""Consumer in a process of its own, for tests that send signals; it runs the uuids of its arguments as messages."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Any

from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.schemas import Message


def write_line(*words: object) -> None:
    """Write a line with one system call, because several threads write."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class ReadyConsumer(Consumer):
    """A consumer that writes ``ready`` when it first checks its control files."""

    is_ready = False

    @classmethod
    def is_active(cls) -> bool:  # type: ignore[override]
        if not cls.is_ready:
            cls.is_ready = True
            write_line("ready")
        return True


class ScriptedEntrypoint(Entrypoint):
    """An entrypoint whose uuid names its action."""

    consumer: Consumer

    def run(self) -> None:
        write_line("starts", self.uuid)
        getattr(self, f"run_{self.uuid}")()
        write_line("ends", self.uuid)

    def run_short(self) -> None:
        """End after the shutdown has started."""
        while not self.consumer._kser_stopping:
            time.sleep(0.01)
        time.sleep(0.2)

    def run_endless(self) -> None:
        """Block until an exception interrupts the task."""
        time.sleep(60)

    def run_stubborn(self) -> None:
        """Block, and catch every exception that interrupts the task."""
        while True:
            with suppress(Exception):
                time.sleep(60)

    def run_hang(self) -> None:
        """Make the next call of the Kafka client block."""
        self.consumer._kser_poller._client.poll = lambda *_: time.sleep(600)  # type: ignore[union-attr,method-assign]

    def run_die(self) -> None:
        """Make the next call of the Kafka client raise an error that nothing handles."""
        self.consumer._kser_poller._client.poll = lambda *_: sys.exit(3)  # type: ignore[union-attr,method-assign]

    def run_interrupt(self) -> None:
        """Raise KeyboardInterrupt."""
        raise KeyboardInterrupt


def main() -> None:
    """Run the consumer; the arguments are the number of workers, the shutdown timeout and the uuids."""
    workers, shutdown_timeout, *uuids = sys.argv[1:]
    Controller.register(ScriptedEntrypoint.path, ScriptedEntrypoint)
    for uuid in uuids:
        InMemoryBroker.at("").send("dice", Message(uuid, ScriptedEntrypoint.path).dumps().encode())
    consumer = ReadyConsumer({}, ["dice"], workers=int(workers), shutdown_timeout=float(shutdown_timeout))
    ScriptedEntrypoint.consumer = consumer
    try:
        consumer.run()
    finally:
        commit: Any = InMemoryBroker.at("").committed.get(("dummy", ("dice", 0)))
        write_line("committed", commit.offset if commit else 0)


if __name__ == "__main__":
    main()
