"""The consumer processes of one group, and what is done to them."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from tests.chaos import ledger
from tests.chaos.history import JOIN, KILL, STOP, TERM, Fault, Rules
from tests.kafka.helpers import REPOSITORY, Program

PYTHON_KAFKA, CONFLUENT = "python_kafka", "confluent"

#: Seconds that a process may need to say where it is.
DUMPING = 0.3
#: Lines that a process wrote last, shown when it ended as it must not.
LAST_WORDS = 30

#: librdkafka's name of an option is kafka-python's with dots, but for these.
OTHER_NAMES = {"metadata_max_age_ms": "topic.metadata.refresh.interval.ms"}


@dataclass(frozen=True)
class Settings:
    """How the consumers of a group are set up."""

    transport: str = PYTHON_KAFKA
    rules: Rules = field(default_factory=Rules)
    workers: int = 4
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def client(self, servers: str, group: str) -> dict[str, Any]:
        """Options of the Kafka client: a group in which everything goes quickly."""
        options = {
            "bootstrap_servers": servers,
            "group_id": group,
            "session_timeout_ms": int(self.rules.session * 1000),
            "heartbeat_interval_ms": 300,
            "auto_commit_interval_ms": int(self.rules.commit_interval * 1000),
            "reconnect_backoff_max_ms": 500,
            "metadata_max_age_ms": 1000,
            **self.config,
        }
        if self.transport == PYTHON_KAFKA:
            return options
        return {OTHER_NAMES.get(name, name.replace("_", ".")): value for name, value in options.items()}

    def consumer(self, dead_topic: str | None) -> dict[str, Any]:
        """Arguments of the consumer."""
        options = {
            "workers": self.workers,
            "ordering": self.rules.ordering,
            "shutdown_timeout": self.rules.shutdown_timeout,
            "revoke_timeout": self.rules.revoke_timeout,
            # It should notice before the test does, and say what it waits for.
            "stall_timeout": self.rules.patience / 2,
            **self.options,
        }
        return options | ({"dead_letter": dead_topic} if dead_topic else {})


class Fleet:
    """Consumer processes of one group. Whatever happens, none is left when it is over."""

    #: What they run.
    WORKER: ClassVar[str] = "tests.chaos.worker"
    #: Seconds that a process may need to end on top of its shutdown_timeout.
    GRACE: ClassVar[float] = 5

    def __init__(self, settings: Settings, servers: str, topic: str, dead_topic: str | None, folder: Path) -> None:
        self.settings = settings
        self.group = f"chaos-{settings.transport}"
        self.topic = topic
        self.dead_topic = dead_topic
        self.ledger = folder / f"{settings.transport}.ledger"
        self.faults: list[Fault] = []
        #: What processes did that nobody did to them.
        self.problems: list[str] = []
        self._servers = servers
        self._folder = folder
        self._members: dict[str, Program] = {}
        self._terminated: dict[str, float] = {}
        self._stopped: dict[str, float] = {}
        self.started = 0
        #: What they find in their environment.
        self.environment: dict[str, str] = {}
        #: Names by process id, of all that ever were.
        self.pids: dict[int, str] = {}
        self._programs: dict[str, Program] = {}

    def start(self, guest: bool = True) -> str:
        """Start a process, and return its name.

        :param guest: it joins a group that others are in: a fault for them.
        """
        self.started += 1
        settings = self._settings()
        name = f"{settings.transport}-{self.started}"
        at = time.monotonic()
        self._members[name] = self._programs[name] = self._program(name, settings)
        self.pids[self._members[name].pid] = name
        if guest:
            self.faults.append(Fault(JOIN, name, at, at))
        return name

    def _settings(self) -> Settings:
        """How the next process is set up."""
        return self.settings

    def _program(self, name: str, settings: Settings) -> Program:
        given = {
            "transport": settings.transport,
            "process": name,
            "ledger": str(self.ledger),
            "config": settings.client(self._servers, self.group),
            "topic": self.topic,
            "options": settings.consumer(self.dead_topic),
        }
        files = {variable: str(self._folder / f"{name}.{variable}") for variable in LOCKS}
        return Program(
            [sys.executable, "-m", self.WORKER],
            {"PYTHONPATH": str(REPOSITORY), "KSER_TEST_WORKER": json.dumps(given), **files, **self.environment},
            self._folder / f"{name}.txt",
        )

    def kill(self, name: str) -> None:
        """End it at once, as a crash of its machine would."""
        at = time.monotonic()
        self._members[name].end()
        self.faults.append(Fault(KILL, name, at, time.monotonic()))
        del self._members[name]

    def stop(self, name: str) -> None:
        """Let it stand still, until :meth:`go_on`."""
        self._stopped[name] = self._members[name].send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        at = time.monotonic()
        self._members[name].process.send_signal(signal.SIGCONT)
        self.faults.append(Fault(STOP, name, self._stopped.pop(name), at))

    def terminate(self, name: str) -> None:
        """Ask it to end in order; :meth:`look` sees whether it did."""
        self._terminated[name] = self._members[name].send_signal(signal.SIGTERM)

    @property
    def names(self) -> list[str]:
        """Processes that were not told to end."""
        return [name for name in self._members if name not in self._terminated]

    def has_noted(self, event: str) -> bool:
        """Whether an event is in the ledger."""
        return any(entry.event == event for entry in ledger.read(self.ledger))

    def is_busy(self, name: str) -> bool:
        """Whether a process runs a task."""
        return ledger.is_busy(self.ledger, name)

    def running(self, name: str) -> dict[str, float]:
        """What a process runs, and since when."""
        return ledger.running(self.ledger, name)

    def has_begun(self, name: str) -> bool:
        """Whether a process ever ran a task."""
        return any(entry.process == name and entry.event == ledger.START for entry in ledger.read(self.ledger))

    def last_words(self) -> list[str]:
        """What each process wrote last, of all that ever were."""
        return [f"{name} wrote:\n{_last_words(program)}" for name, program in self._programs.items()]

    def report_stuck(self) -> None:
        """Have each process say where it is."""
        for name in self.names:
            program = self._members[name]
            said = len(program.text)
            program.send_signal(signal.SIGUSR1)
            time.sleep(DUMPING)
            self.problems.append(f"{name} was here:\n{program.text[said:]}")

    def look(self) -> None:
        """Take note of processes that have ended, or should have."""
        for name, program in list(self._members.items()):
            status = program.process.poll()
            at = self._terminated.get(name)
            now = time.monotonic()
            if at is None and status is not None:
                self.problems.append(f"{name} ended by itself with status {status}:\n{_last_words(program)}")
                del self._members[name]
            elif at is not None and status is not None:
                self.faults.append(Fault(TERM, name, at, now))
                # One that has only just been started does not yet know what to do at a signal.
                if status and not (status == -signal.SIGTERM and not self.has_begun(name)):
                    self.problems.append(f"{name} ended with status {status} at SIGTERM:\n{_last_words(program)}")
                del self._members[name]
            elif at is not None and now - at > self.settings.rules.shutdown_timeout + self.GRACE:
                self.problems.append(f"{name} still ran {now - at:.1f} s after SIGTERM:\n{_last_words(program)}")
                self.kill(name)

    def finish(self) -> None:
        """Tell all to end, and wait for that."""
        for name in self.names:
            self.terminate(name)
        while self._members:
            self.look()
            time.sleep(0.05)

    def close(self) -> None:
        """End whatever there still is."""
        for program in self._members.values():
            program.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


#: Each process has lock files of its own: those of a killed one stay.
LOCKS = ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")


def _last_words(program: Program) -> str:
    return "\n".join(program.text.splitlines()[-LAST_WORDS:])
