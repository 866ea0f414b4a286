"""Count the files of kser that process a message, and the calls between these files.

``scripts/flows`` starts this script. A flow is a part of the work on a message. The script profiles four flows, each in
one consumer on the dummy transport, in one call of ``Consumer.step()``:

- a plain message, from poll to commit;
- the first message of a stored operation, from poll to the commit of the first task;
- a task in the middle of this operation, from the commit of the previous task to the commit of this task;
- the end of this operation, from the commit of the last task to the end of the step.

The script counts a call as a call between files if the nearest caller in kser is in another file. It ignores libraries
between the caller and the called function. If user code calls a function of kser, the script counts an entry, and not a
call between files. It counts a generator once, when the generator starts. Logs are at WARNING.

Three events divide a flow into phases: the ``prerun`` hook of the task starts, the ``onsuccess`` hook of the task
returns, and the database receives a COMMIT of a transaction that has written. The report lists the modules that a phase
enters more than once, with the number of entries. ``N up`` counts the entries for which the module was already on the
stack, below another file.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import logging
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TASKS = 5
MIDDLE = 2
WARM_UP = 3
#: The number of recordings of each flow. The most frequent recording counts, because the consumer checks its control
#: files once per second, and this check changes a recording.
TIMES = 5

USER = "user code"
START, TASK_STARTS, TASK_ENDS, COMMIT, END = "start", "task", "end of task", "commit", "end"
MARKS = {START, TASK_STARTS, TASK_ENDS, COMMIT}
WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE")


class Call(NamedTuple):
    """A call of a function of kser, from another file of kser or from outside kser."""

    #: The file of the caller; None if the caller is outside kser.
    caller: str | None
    module: str
    function: str
    #: True if the module was already on the stack, below another file.
    up: bool


class Phase(NamedTuple):
    """A phase: the calls between two marks, and the modules whose functions ran."""

    name: str
    calls: tuple[Call, ...]
    modules: frozenset[str]


class Flow(NamedTuple):
    """A flow: its name and its phases."""

    name: str
    phases: tuple[Phase, ...]

    @property
    def modules(self) -> frozenset[str]:
        """Return the modules whose functions ran."""
        return frozenset().union(*(phase.modules for phase in self.phases))

    @property
    def calls(self) -> list[Call]:
        """Return all calls in order."""
        return [call for phase in self.phases for call in phase.calls]


class Recorder:
    """A profiler that records the calls between the files of kser.

    :param package: the folder of kser.
    """

    def __init__(self, package: Path) -> None:
        self._prefix = f"{package}{os.sep}"
        self._modules: dict[CodeType, str | None] = {}
        self._hooks: dict[tuple[CodeType, str], str] = {}
        self._task: type = type(None)
        self._active = False
        self._generators: dict[int, FrameType] = {}
        self._wrote = False
        #: The calls, names of modules and marks, in order.
        self.events: list[Call | str] = []

    def watch(self, task: Any) -> None:
        """Record a mark when a hook of a task class starts or returns."""
        self._task = task
        self._hooks = {
            (inspect.unwrap(task.prerun).__code__, "call"): TASK_STARTS,
            (inspect.unwrap(task.onsuccess).__code__, "return"): TASK_ENDS,
        }

    def watch_database(self) -> None:
        """Record a mark at each commit of every SQLite connection that is opened from now on."""
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        @event.listens_for(Engine, "connect")
        def connected(connection: Any, _: Any) -> None:
            connection.set_trace_callback(self._statement)

    def record(self, run: Callable[[], object]) -> list[Call | str]:
        """Call a function, and return the recording."""
        self.events, self._generators, self._wrote = [START], {}, False
        gc.collect()
        gc.disable()
        self._active = True
        try:
            run()
        finally:
            self._active = False
            gc.enable()
        return self.events

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if not self._active or event not in ("call", "return"):
            return
        code = frame.f_code
        mark = self._hooks.get((code, event))
        if mark is not None and isinstance(frame.f_locals.get(code.co_varnames[0]), self._task):
            self.events.append(mark)
        if event == "call":
            self._called(frame, code)

    def _called(self, frame: FrameType, code: CodeType) -> None:
        module = self._module(code)
        if module is None or module == USER:
            return
        if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            if id(frame) in self._generators:
                return
            # Keep the frame, because Python would use the address of a deleted frame again.
            self._generators[id(frame)] = frame
        callers = [found for found in map(self._module, _codes_below(frame)) if found is not None]
        caller = callers[0] if callers else USER
        if caller == module:
            self.events.append(module)
        else:
            outside = caller == USER
            self.events.append(Call(None if outside else caller, module, code.co_qualname, module in callers))

    def _module(self, code: CodeType) -> str | None:
        if code not in self._modules:
            name = code.co_filename
            found = None
            if name.startswith(self._prefix):
                found = name[len(self._prefix) :].removesuffix(".py")
            elif name == main.__code__.co_filename:
                found = USER
            self._modules[code] = found
        return self._modules[code]

    def _statement(self, text: str) -> None:
        word = text.lstrip().partition(" ")[0].upper().rstrip(";")
        if word in WRITES:
            self._wrote = True
        elif word == "COMMIT" and self._wrote:
            self._wrote = False
            if self._active:
                self.events.append(COMMIT)


def _codes_below(frame: FrameType) -> Iterable[CodeType]:
    below = frame.f_back
    while below is not None:
        yield below.f_code
        below = below.f_back


def phases_of(events: Sequence[Call | str]) -> list[tuple[str, Phase]]:
    """Divide a recording into phases, each with the mark that begins the phase."""
    opened = [place for place, event in enumerate(events) if isinstance(event, str) and event in MARKS]
    found = []
    for first, last in zip(opened, [*opened[1:], len(events)], strict=True):
        mark, closing = str(events[first]), str(events[last]) if last < len(events) else END
        name = TASK_STARTS if mark == TASK_STARTS else f"{mark} to {closing}"
        inside = events[first + 1 : last]
        calls = tuple(event for event in inside if isinstance(event, Call))
        modules = frozenset(event.module if isinstance(event, Call) else event for event in inside)
        found.append((mark, Phase(name, calls, modules)))
    return found


def flows_of_operation(events: Sequence[Call | str]) -> list[Flow]:
    """Return the flows in the recording of an operation."""
    phases = phases_of(events)
    marks = [mark for mark, _ in phases]
    tasks = [place for place, mark in enumerate(marks) if mark == TASK_STARTS]
    if len(tasks) != TASKS:
        raise SystemExit(f"flows: {len(tasks)} of {TASKS} tasks ran")
    # The index of the phase that follows the commit of each task.
    recorded = [marks.index(COMMIT, place) for place in tasks]
    return [
        Flow(name, tuple(phase for _, phase in phases[first:last]))
        for name, first, last in (
            ("stored operation, first message", 0, recorded[0]),
            ("stored operation, a middle task", recorded[MIDDLE - 1], recorded[MIDDLE]),
            ("stored operation, its end", recorded[-1], len(phases)),
        )
    ]


def record(recorder: Recorder, folder: Path) -> list[Flow]:
    """Run the flows with the kser that is first on the import path."""
    from cdumay_result import Result

    from kser import Controller, Entrypoint, Message, Operation, OperationRegistry, Task
    from kser.dummy.consumer import Consumer
    from kser.dummy.producer import Producer
    from kser.store import open_store

    class Plain(Entrypoint):
        def run(self) -> None:
            return None

    class Step(Task):
        def run(self) -> Result:
            return Result(uuid=self.uuid, retval={"done": 1})

    class Steps(Operation):
        def build_tasks(self, **_: object) -> list[Task]:
            return [Step() for _ in range(TASKS)]

    def usual(sent: type[Entrypoint], task: type[Entrypoint]) -> list[Call | str]:
        """Process messages for a class, one message per step, and return the most frequent recording."""
        recorder.watch(task)
        consumer, producer = Consumer({"enable_auto_commit": False}, ["flows"]), Producer({})
        counted: Counter[tuple[Call | str, ...]] = Counter()
        for number in range(WARM_UP + TIMES):
            producer.send("flows", Message(uuid=str(uuid.uuid4()), entrypoint=sent.path))
            events = recorder.record(lambda: consumer.step(timeout=0))
            counted[tuple(events)] += number >= WARM_UP
        consumer.close()
        return list(counted.most_common(1)[0][0])

    Controller.register(Plain.path, Plain)
    plain = tuple(phase for _, phase in phases_of(usual(Plain, Plain)))
    recorder.watch_database()
    registry = OperationRegistry(store=open_store(f"sqlite:///{folder}/flows.db"))
    for cls in (Step, Steps):
        registry.subscribe(cls)
    return [Flow("plain message, poll to commit", plain), *flows_of_operation(usual(Steps, Step))]


def report(source: Path, flows: Sequence[Flow], calls: bool) -> Iterable[str]:
    """Return the lines of the report."""
    yield f"kser of {source}"
    yield ""
    yield f"{'flow':36}{'files':>6}{'calls across files':>20}"
    for flow in flows:
        yield f"{flow.name:36}{len(flow.modules):6}{_across(flow.calls):20}"
    yield ""
    yield f"{'module, times entered':36}" + "".join(f"{letter:>6}" for letter in "ABCD")
    for module in sorted(frozenset().union(*(flow.modules for flow in flows))):
        yield f"{module:36}" + "".join(_entries(flow, module) for flow in flows)
    yield "(" + ", ".join(f"{letter}: {flow.name}" for letter, flow in zip("ABCD", flows, strict=True)) + ")"
    yield "0: the module ran, but only its own functions and generators called it. N up: N of the entries found the"
    yield "module on the stack already, below another file. In a list of calls, '-' is a caller outside kser."
    for flow in flows:
        yield ""
        yield f"phases: {flow.name}"
        for phase in flow.phases:
            yield f"  {phase.name}: {len(phase.modules)} files, {_across(phase.calls)} calls across files"
            if again := entered_again(phase):
                yield f"    entered again: {again}"
            if calls:
                yield from (
                    f"    {call.caller or '-'} -> {call.module}: {call.function}{' (up)' if call.up else ''}"
                    for call in phase.calls
                )


def entered_again(phase: Phase) -> str:
    """Return the modules that a phase enters more than once, with the highest number of entries first."""
    entries = Counter(call.module for call in phase.calls)
    up = Counter(call.module for call in phase.calls if call.up)
    return ", ".join(
        f"{module} {count}" + (f" ({up[module]} up)" if up[module] else "")
        for module, count in sorted(entries.items(), key=lambda item: (-item[1], item[0]))
        if count > 1 or up[module]
    )


def _across(calls: Iterable[Call]) -> int:
    return sum(call.caller is not None for call in calls)


def _entries(flow: Flow, module: str) -> str:
    count = sum(call.module == module for call in flow.calls)
    return f"{count if count or module in flow.modules else '':>6}"


def trace(source: Path, calls: bool) -> None:
    """Trace the kser of one checkout in this process."""
    package = source / "kser"
    for name in [name for name in os.environ if name.startswith("KSER_")]:
        del os.environ[name]
    for name in ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE"):
        os.environ.pop(name, None)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOCK_PATH"] = folder
        sys.path.insert(0, str(source))
        found = Path(str(importlib.import_module("kser").__file__)).parent
        if found != package:
            raise SystemExit(f"flows: {found} was imported in place of {package}")
        recorder = Recorder(package)
        threading.setprofile(recorder)
        sys.setprofile(recorder)
        try:
            flows = record(recorder, Path(folder))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    sys.stdout.write("".join(f"{line}\n" for line in report(source, flows, calls)))


def main() -> int:
    """Trace one checkout in this process, or each of several checkouts in a separate process."""
    parser = argparse.ArgumentParser(
        prog="scripts/flows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, action="append", help="a checkout (default: this one); repeatable")
    parser.add_argument("--calls", action="store_true", help="list the calls")
    options = parser.parse_args()
    sources = [path.resolve() for path in options.source or [ROOT]]
    for source in sources:
        if not (source / "kser").is_dir():
            parser.error(f"there is no folder kser in {source}")
    if len(sources) == 1:
        trace(sources[0], options.calls)
        return 0
    status = 0
    for number, source in enumerate(sources):
        sys.stdout.write("\n" if number else "")
        sys.stdout.flush()
        command = [sys.executable, __file__, "--source", str(source), *(["--calls"] if options.calls else [])]
        status = subprocess.run(command).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main())
