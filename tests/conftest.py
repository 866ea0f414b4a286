"""Fixtures that isolate each test from the machine and from other tests, and detect leaks."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import blinker
import pytest

import kser.signals
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.limits import environment_limits
from tests.consumer.harness import ScriptedTask

if TYPE_CHECKING:
    from tests.durable.harness import DurableHarness
    from tests.postgres import Database, Postgresql

# pytest explains failed assertions only in test modules and in registered ones; the contracts are not test modules.
pytest.register_assert_rewrite(
    "tests.store.contract",
    *(f"tests.transports.{name}_contract" for name in ("client", "group", "producer")),
)

#: The folders whose tests are all slow.
SLOW_FOLDERS = {Path(__file__).parent / "crash", Path(__file__).parent / "differential"}

#: Seconds after which a test fails, and seconds after which a slow test fails.
TIME_LIMIT_SECONDS, SLOW_TIME_LIMIT_SECONDS = 300, 900
#: Seconds within which threads and processes must end after a test.
GRACE_SECONDS = 20

# Look up the path now, because tests change the PATH.
PS = shutil.which("ps") or "ps"

SHUTDOWN_SIGNALS = (signal.SIGINT, signal.SIGTERM)

PROC = Path("/proc/self")

FILES = {"RUNNING_FILE": "run", "LOCK_FILE": "pause", "TERMINATE_FILE": "terminate"}


def needs(service: str, problem: object = None) -> NoReturn:
    """Skip a test whose service is missing; with ``CI=true``, fail it."""
    text = f"needs {service}, which is missing: {problem}" if problem else f"needs {service}, which is missing"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{text}; with CI=true nothing is skipped", pytrace=False)
    pytest.skip(text)


def pytest_configure(config: pytest.Config) -> None:
    """Reject missing files, because pytest-xdist would run no test and would not say why."""
    for argument in config.args:
        if not (config.invocation_params.dir / argument.split("::")[0]).exists():
            raise pytest.UsageError(f"file or directory not found: {argument}")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Mark slow tests by their folder, and run chaos tests last: ``.ci/run`` runs nothing beside them by then."""
    for item in items:
        if item.path.parent in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
    yield
    items.sort(key=lambda item: item.get_closest_marker("chaos") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape surrogates in captured output, because pytest-xdist cannot send them to the main process."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def sigint_is_not_ignored() -> None:
    """Handle SIGINT as in a terminal, because a shell starts background jobs with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that takes too long, with the traceback of the place where it hangs."""
    is_slow = request.node.get_closest_marker("slow") is not None
    seconds = SLOW_TIME_LIMIT_SECONDS if is_slow else TIME_LIMIT_SECONDS

    def too_long(_number: int, _frame: FrameType | None) -> NoReturn:
        pytest.fail(f"the test takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def lock_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return this test's folder for kser's control files, and hide the caller's settings of kser from the test."""
    for name in [name for name in os.environ if name.startswith("KSER_") and not name.startswith("KSER_TEST_")]:
        monkeypatch.delenv(name)
    # kser reads the limits of the environment only once in a process.
    environment_limits.cache_clear()
    folder = tmp_path_factory.mktemp("locks")
    monkeypatch.setenv("LOCK_PATH", str(folder))
    for variable, suffix in FILES.items():
        monkeypatch.setenv(variable, str(folder / f"kser-test-{suffix}.lock"))
    return folder


@pytest.fixture(autouse=True)
def leak_detector(time_limit: None, lock_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves something behind, and restore the shared registry."""
    registry = Controller.ENTRYPOINTS
    before = {name: traces() for name, traces in TRACES.items()}
    handlers = {number: signal.getsignal(number) for number in SHUTDOWN_SIGNALS}
    registered = dict(registry)
    monkeypatch.setattr(Controller, "ENTRYPOINTS", dict(registry))
    yield
    leaks = [leak for name, traces in TRACES.items() if (leak := _leaked(name, traces, before[name]))]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if registry != registered:
        leaks.append(f"entries in the shared registry: {sorted(registry.keys() - registered.keys())}")
        registry.clear()
        registry.update(registered)
    leaks += _leaked_files(lock_path)
    if leaks:
        pytest.fail("the test left behind " + "; ".join(leaks), pytrace=False)


def own_postgresql() -> Postgresql:
    """Start a PostgreSQL server that the caller may stop and start."""
    # Tests without SQL must not import its requirements.
    from tests.postgres import Postgresql, ServiceMissing

    try:
        return Postgresql()
    except ServiceMissing as problem:
        needs("PostgreSQL", problem)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Return the URI of the shared PostgreSQL: ``KSER_TEST_POSTGRESQL_URI``, or a server that is started here."""
    if uri := os.environ.get("KSER_TEST_POSTGRESQL_URI"):
        yield uri
        return
    with own_postgresql() as server:
        yield server.uri


@pytest.fixture(scope="session")
def database(postgresql: str) -> Iterator[Database]:
    """Return the shared database with kser's tables; each test empties it first."""
    from tests.postgres import Database

    with contextlib.closing(Database(postgresql)) as database:
        yield database


@pytest.fixture
def bus(leak_detector: None, caplog: pytest.LogCaptureFixture) -> Iterator[InMemoryBroker]:
    """Return this test's in-memory broker; the scripted task is registered, and everything is logged."""
    Controller.register(ScriptedTask.path, ScriptedTask)
    caplog.set_level(logging.DEBUG, "kser")
    yield InMemoryBroker.at("")
    InMemoryBroker.reset()
    ScriptedTask.script.clear()
    ScriptedTask.ran.clear()


@pytest.fixture(params=["memory", "sqlite"])
def harness(
    request: pytest.FixtureRequest, bus: InMemoryBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DurableHarness]:
    """Return a store and a process that runs operations; see :mod:`tests.durable.harness`."""
    # Tests without stored operations must not import their requirements.
    from tests.durable.harness import DurableHarness
    from tests.store.harness import MemoryStoreHarness, SQLStoreHarness

    monkeypatch.setenv("KSER_TOPICS", "dice")
    in_memory = request.param == "memory"
    store = MemoryStoreHarness() if in_memory else SQLStoreHarness(f"sqlite:///{tmp_path}/kser.db")
    with contextlib.closing(DurableHarness(store)) as harness:
        yield harness


def _leaked(name: str, traces: Callable[[], dict[Any, str]], before: dict[Any, str]) -> str:
    """Return a text about the traces that a test left and that are still there after the grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    while leaked := {key: text for key, text in traces().items() if before.get(key) != text}:
        if time.monotonic() > deadline:
            return f"{name}: {sorted(leaked.values())}"
        # Garbage that is not collected yet may keep a thread or a child process alive.
        gc.collect()
        time.sleep(0.02)
    return ""


def _leaked_files(folder: Path) -> list[str]:
    """Return a text about each wrong file in the folder of the control files.

    kser leaves an empty running file. Tests create the pause file and the terminate file, as operators do.
    """
    texts = []
    for path in folder.iterdir():
        if path.name not in {f"kser-test-{suffix}.lock" for suffix in FILES.values()}:
            texts.append(f"a file in LOCK_PATH: {path.name}")
        elif path.name == "kser-test-run.lock" and path.read_bytes():
            texts.append(f"a running file that still contains {path.read_text(errors='replace')!r}")
    return texts


def _threads() -> dict[Any, str]:
    """Return the names of the live threads."""
    return {thread.ident: thread.name for thread in threading.enumerate()}


def _children() -> dict[Any, str]:
    """Return the command lines of the child processes."""
    if hasattr(os, "waitid"):
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return {}
    return dict(_children_of_proc() if PROC.is_dir() else _children_of_ps())


def _children_of_proc() -> Iterator[tuple[Any, str]]:
    """Return the child processes from /proc, because a minimal Linux has no ps."""
    for folder in PROC.parent.glob("[0-9]*"):
        # The process may end meanwhile.
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()):
                yield folder.name, (folder / "cmdline").read_text().replace("\0", " ").strip()


def _children_of_ps() -> Iterator[tuple[Any, str]]:
    # Use the absolute path, because tests change PATH.
    command = ["/bin/ps", "-A", "-o", "ppid=", "-o", "pid=", "-o", "command="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ps:
        assert ps.stdout is not None
        rows = [line.split(None, 2) for line in ps.stdout]
    yield from ((row[1], " ".join(row[2:])) for row in rows if row[0] == str(os.getpid()) and row[1] != str(ps.pid))


def _subscriptions() -> dict[Any, str]:
    signals = {name: value for name, value in vars(kser.signals).items() if isinstance(value, blinker.Signal)}
    return {
        (name, identity): f"{name} -> {receiver!r}"
        for name, value in signals.items()
        for identity, receiver in value.receivers.items()
    }


def _signal_handlers() -> dict[Any, str]:
    return {number: f"{number.name} -> {signal.getsignal(number)!r}" for number in SHUTDOWN_SIGNALS}


TRACES: dict[str, Callable[[], dict[Any, str]]] = {
    "threads": _threads,
    "child processes": _children,
    "subscriptions to signals": _subscriptions,
    "handlers of signals": _signal_handlers,
}
