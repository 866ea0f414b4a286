"""The consumer processes of one group, and the faults that hit them."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from tests.chaos import ledger
from tests.chaos.history import FENCED, JOIN, KILL, STOP, TERM, Fault, Rules
from tests.kafka.helpers import REPOSITORY, Program

PYTHON_KAFKA, CONFLUENT = "python_kafka", "confluent"

#: Seconds that a process may need to dump the stacks of its threads.
DUMP_SECONDS = 0.3
#: Seconds that a process may need to take a group instance id: it must start and join the group.
FENCE_SECONDS = 20
#: The exit status of a process whose group instance id another process has taken.
FENCED_STATUS = 76
#: The number of lines of a process's output that a problem shows.
LAST_LINES = 30

#: Options whose name in librdkafka is not that of kafka-python with dots.
OTHER_NAMES = {"metadata_max_age_ms": "topic.metadata.refresh.interval.ms"}


@dataclass(frozen=True)
class Settings:
    """The settings of the consumers of a group."""

    transport: str = PYTHON_KAFKA
    rules: Rules = field(default_factory=Rules)
    workers: int = 4
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    #: True if each process has a group instance id, which the process in its place gets too.
    has_instances: bool = False

    def client(self, servers: str, group: str) -> dict[str, Any]:
        """Return the options of the Kafka client, with short intervals."""
        options = {
            "bootstrap_servers": servers,
            "group_id": group,
            "session_timeout_ms": int(self.rules.session_timeout * 1000),
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
        """Return the options of the consumer."""
        options = {
            "workers": self.workers,
            "ordering": self.rules.ordering,
            "shutdown_timeout": self.rules.shutdown_timeout,
            "revoke_timeout": self.rules.revoke_timeout,
            # The consumer reports a stall, with its cause, before the test does.
            "stall_timeout": self.rules.stall_seconds / 2,
            **self.options,
        }
        return options | ({"dead_letter": dead_topic} if dead_topic else {})


class Fleet:
    """Consumer processes of one group; leaving the ``with`` block kills the remaining ones."""

    #: The module that the processes run.
    WORKER: ClassVar[str] = "tests.chaos.worker"
    #: Seconds that a process may need to end in addition to its shutdown_timeout.
    GRACE_SECONDS: ClassVar[float] = 5

    def __init__(self, settings: Settings, servers: str, topic: str, dead_topic: str | None, folder: Path) -> None:
        self.settings = settings
        self.group = f"chaos-{settings.transport}"
        self.topic = topic
        self.dead_topic = dead_topic
        self.ledger = folder / f"{settings.transport}.ledger"
        self.faults: list[Fault] = []
        #: Texts about processes that ended without a fault, with a wrong status or too late.
        self.problems: list[str] = []
        self._servers = servers
        self._folder = folder
        self._members: dict[str, Program] = {}
        self._terminated: dict[str, float] = {}
        self._stopped: dict[str, float] = {}
        #: The time of the fault and the successor, by the name of a process whose group instance id is taken.
        self._fenced: dict[str, tuple[float, str]] = {}
        self._instances: dict[str, str] = {}
        self.started = 0
        #: Additional environment variables of the processes.
        self.environment: dict[str, str] = {}
        #: Names by process id, also of ended processes.
        self.pids: dict[int, str] = {}
        self._programs: dict[str, Program] = {}

    def start(self, joins: bool = True, instead_of: str | None = None) -> str:
        """Start a process, and return its name.

        :param joins: the process joins a running group, which is a fault because it causes a rebalance.
        :param instead_of: the process whose group instance id the new process gets.
        """
        self.started += 1
        settings = self._settings()
        name = f"{settings.transport}-{self.started}"
        if settings.has_instances:
            instance = self._instances[name] = self._instances.get(instead_of or "", name)
            settings = replace(settings, config={**settings.config, "group_instance_id": instance})
        at = time.monotonic()
        self._members[name] = self._programs[name] = self._program(name, settings)
        self.pids[self._members[name].pid] = name
        if joins:
            self.faults.append(Fault(JOIN, name, at, at))
        return name

    def _settings(self) -> Settings:
        """Return the settings of the next process."""
        return self.settings

    def _program(self, name: str, settings: Settings) -> Program:
        worker = {
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
            {"PYTHONPATH": str(REPOSITORY), "KSER_TEST_WORKER": json.dumps(worker), **files, **self.environment},
            self._folder / f"{name}.txt",
        )

    def kill(self, name: str) -> None:
        """Kill a process; this is like a crash of its machine."""
        at = time.monotonic()
        self._members[name].end()
        self.faults.append(Fault(KILL, name, at, time.monotonic()))
        del self._members[name]

    def fence(self, name: str) -> str:
        """Start a second process with the group instance id of a process, and return the name of the new process."""
        at = time.monotonic()
        successor = self.start(joins=False, instead_of=name)
        self._fenced[name] = (at, successor)
        return successor

    def sigstop(self, name: str) -> None:
        """Suspend a process until :meth:`sigcont`."""
        self._stopped[name] = self._members[name].send_signal(signal.SIGSTOP)

    def sigcont(self, name: str) -> None:
        """Continue a suspended process."""
        at = time.monotonic()
        self._members[name].process.send_signal(signal.SIGCONT)
        self.faults.append(Fault(STOP, name, self._stopped.pop(name), at))

    def terminate(self, name: str) -> None:
        """Request a graceful shutdown; :meth:`check_processes` checks the result."""
        self._terminated[name] = self._members[name].send_signal(signal.SIGTERM)

    @property
    def names(self) -> list[str]:
        """The names of the processes that were neither terminated nor fenced."""
        return [name for name in self._members if name not in self._terminated and name not in self._fenced]

    def has_event(self, event: str) -> bool:
        """Return whether the ledger contains an event."""
        return any(entry.event == event for entry in ledger.read(self.ledger))

    def is_busy(self, name: str) -> bool:
        """Return whether a process runs a long task."""
        return ledger.is_busy(self.ledger, name)

    def running(self, name: str) -> dict[str, float]:
        """Return the subjects that a process runs, with their start times."""
        return ledger.running(self.ledger, name)

    def has_started_a_task(self, name: str) -> bool:
        """Return whether a process ever started a task."""
        return any(entry.process == name and entry.event == ledger.START for entry in ledger.read(self.ledger))

    def last_output(self) -> list[str]:
        """Return the last lines that each process wrote, also those of ended processes."""
        return [f"{name} wrote:\n{_last_lines(program)}" for name, program in self._programs.items()]

    def dump_stacks(self) -> None:
        """Add the stacks of the threads of each running process to the problems."""
        for name in self.names:
            program = self._members[name]
            length = len(program.text)
            program.send_signal(signal.SIGUSR1)
            time.sleep(DUMP_SECONDS)
            self.problems.append(f"stacks of {name}:\n{program.text[length:]}")

    def check_processes(self) -> None:
        """Record the processes that have ended; a process that ended without a fault or runs too long is a problem."""
        for name, program in list(self._members.items()):
            status = program.process.poll()
            at = self._terminated.get(name)
            now = time.monotonic()
            if name in self._fenced:
                self._check_fenced(name, status, now)
            elif at is None and status is not None:
                self.problems.append(f"{name} ended by itself with status {status}:\n{_last_lines(program)}")
                del self._members[name]
            elif at is not None and status is not None:
                self.faults.append(Fault(TERM, name, at, now))
                # A process that has just started has no signal handler yet, so SIGTERM may kill it.
                if status and not (status == -signal.SIGTERM and not self.has_started_a_task(name)):
                    self.problems.append(f"{name} ended with status {status} at SIGTERM:\n{_last_lines(program)}")
                del self._members[name]
            elif at is not None and now - at > self.settings.rules.shutdown_timeout + self.GRACE_SECONDS:
                self.problems.append(f"{name} still ran {now - at:.1f} s after SIGTERM:\n{_last_lines(program)}")
                self.kill(name)

    def _check_fenced(self, name: str, status: int | None, now: float) -> None:
        """Record that a fenced process has ended; another status or a late end is a problem."""
        at, successor = self._fenced[name]
        limit = FENCE_SECONDS + self.settings.rules.shutdown_timeout + self.GRACE_SECONDS
        if status is not None:
            self.faults.append(Fault(FENCED, name, at, now, successor))
            if status != FENCED_STATUS:
                self.problems.append(
                    f"{name} ended with status {status} when fenced:\n{_last_lines(self._members[name])}"
                )
            del self._members[name]
        elif now - at > limit:
            self.faults.append(Fault(FENCED, name, at, now, successor))
            self.problems.append(f"{name} still ran {limit} s after {successor} began to take its group instance id")
            self.kill(name)

    def finish(self) -> None:
        """Terminate all processes, and wait until they have ended."""
        for name in self.names:
            self.terminate(name)
        while self._members:
            self.check_processes()
            time.sleep(0.05)

    def close(self) -> None:
        """Kill the remaining processes."""
        for program in self._members.values():
            program.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


#: Each process has its own control files, because a killed process leaves its files.
LOCKS = ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE")


def _last_lines(program: Program) -> str:
    """Return the last lines of a program's output."""
    return "\n".join(program.text.splitlines()[-LAST_LINES:])
