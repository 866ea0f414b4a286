"""Tests of the scripts in a fresh checkout."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import GRACE_SECONDS, needs
from tests.test_install import index_responds

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SETUP_SECONDS = 240
DEMO_SECONDS = 30

#: Files and folders that the scripts may leave in a checkout; git ignores them.
CREATED_BY_SETUP = {".venv", "kser.egg-info", "__pycache__", ".pytest_cache"}

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ROLL = rf"__main__\.DiceRoll\[{UUID}\]: You made a [1-6]"


@pytest.fixture(scope="module")
def fresh_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files of this checkout that a commit would contain."""
    if not index_responds():
        needs("a package index", "the scripts install packages")
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as problem:
        needs("git, and the checkout to be a clone", problem)
    folder = tmp_path_factory.mktemp("scripts") / "checkout"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def checkout(fresh_checkout: Path) -> Path:
    """Return the fresh checkout after a run of a script has set it up."""
    if not (fresh_checkout / ".venv" / "kser-stamp").exists():
        subprocess.run([fresh_checkout / "scripts" / "demo"], capture_output=True, timeout=SETUP_SECONDS)
    return fresh_checkout


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of the scripts' temporary files, which must be empty at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    # The scripts inherit ignored signals, and a test run under "nohup" ignores SIGHUP.
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield folder
    signal.signal(signal.SIGHUP, previous)
    assert list(folder.iterdir()) == []


class Script:
    """A script in a process group of its own, as a shell starts it."""

    def __init__(self, checkout: Path, *command: str) -> None:
        self.stderr = ""
        self._checkout = checkout
        self.process = subprocess.Popen(
            command,
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, text: str) -> None:
        """Wait until the script writes ``text`` to its standard error."""
        assert self.process.stderr is not None
        while text not in self.stderr:
            line = self.process.stderr.readline()
            assert line, f"the script ended without writing {text!r}: {self.stderr}"
            self.stderr += line

    def wait(self) -> int:
        """Wait until the script ends, and return its exit status."""
        self.stderr += self.process.communicate(timeout=DEMO_SECONDS)[1]
        return self.process.returncode

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        assert processes_of(self._checkout) == []


def processes_of(checkout: Path) -> list[str]:
    """Return the command lines of the processes that still run from a checkout after the grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        ps = subprocess.run(["ps", "-A", "-ww", "-o", "command="], capture_output=True, text=True, check=True)
        commands = [line for line in ps.stdout.splitlines() if str(checkout) in line]
        if not commands or time.monotonic() > deadline:
            return commands
        time.sleep(0.05)


def run_script(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a script, which must leave no process behind."""
    process = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert processes_of(checkout) == []
    return process


def files_of(checkout: Path) -> set[str]:
    """Return the files of a checkout, except those that the set-up creates."""
    names = set()
    for folder, folders, files in os.walk(checkout):
        folders[:] = [name for name in folders if name not in CREATED_BY_SETUP]
        names |= {str(Path(folder, name).relative_to(checkout)) for name in files}
    return names


def test_setup_is_repeated_after_an_interruption(fresh_checkout: Path) -> None:
    stamp = fresh_checkout / ".venv" / "kser-stamp"
    with Script(fresh_checkout, "scripts/demo") as script:
        script.wait_for("kser: installing")
        time.sleep(1)
        os.killpg(script.process.pid, signal.SIGINT)
        assert script.wait() == 130
    assert "Traceback" not in script.stderr
    assert not stamp.exists()
    process = run_script(fresh_checkout, "scripts/demo")
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[0].startswith("kser: making .venv with python3")
    assert stamp.exists()


def test_demo_prints_both_logs_as_documented_and_leaves_no_files(checkout: Path) -> None:
    before = files_of(checkout)
    start = time.monotonic()
    process = run_script(checkout, "scripts/demo")
    assert time.monotonic() - start < DEMO_SECONDS
    assert process.returncode == 0, process.stderr
    assert "installing" not in process.stderr
    _, producer, consumer = re.split(r"^(?:Producer|Consumer) console output::\n\n", process.stdout, flags=re.MULTILINE)
    producer_lines = [re.sub(rf"^    {STAMP} ", "", line) for line in producer.splitlines() if line]
    for name, line in zip(("DiceRoll", "DiceLaunch"), producer_lines, strict=True):
        message = rf"__main__\.{name}\[{UUID}\]"
        assert re.fullmatch(rf"INFO     Producer\.Success: {message}: Message {message} sent in dice", line)
    log_lines = [re.sub(rf"^    {STAMP} INFO     ", "", line) for line in consumer.splitlines()]
    assert log_lines[:3] == [
        "Operation registry: loaded __main__.DiceRoll",
        "Operation registry: loaded __main__.DiceLaunch",
        "Consumer.Starting...",
    ]
    assert log_lines[-1] == "Closing consumer and exiting"
    rolls = [line for line in log_lines if re.fullmatch(rf"DiceRoll\.Success: {ROLL}", line)]
    assert len(rolls) == 4
    assert len([line for line in log_lines if re.fullmatch(rf"Controller\.Success: {ROLL}", line)]) == 1
    assert [line.partition(":")[0] for line in log_lines if "__main__.DiceLaunch[" in line] == [
        "DiceLaunch.SetStatus",
        "DiceLaunch.SetStatus",
        "DiceLaunch.Success",
        "Controller.Success",
    ]
    assert files_of(checkout) == before


def test_shop_demo_prints_each_attempt_and_leaves_no_files(checkout: Path) -> None:
    before = files_of(checkout)
    start = time.monotonic()
    process = run_script(checkout, "scripts/demo", "shop")
    assert time.monotonic() - start < DEMO_SECONDS
    assert process.returncode == 0, process.stderr
    heading = r"^Output of worker\.py for (\S+) \(process (\d+)\)::$"
    (shop_topics, shop_pid), (bank_topics, bank_pid) = re.findall(heading, process.stdout, re.MULTILINE)
    assert (shop_topics, bank_topics) == ("orders,warehouse", "bank")
    attempts = [
        ("Reserve", "1", "SUCCESS"),
        ("Charge", "1", "FAILED"),
        ("Charge", "2", "FAILED"),
        ("Charge", "3", "SUCCESS"),
        ("Ship", "1", "FAILED"),
        ("Ship", "2", "SUCCESS"),
    ]
    local_order = [(task, number, status, shop_pid) for task, number, status in attempts]
    distributed_order = [
        (task, number, status, bank_pid if task == "Charge" else shop_pid) for task, number, status in attempts
    ]
    row = r"^    (\w+) +(\d) +(SUCCESS|FAILED) +(\d+) +\d+\.\d\d"
    assert re.findall(row, process.stdout, re.MULTILINE) == local_order + distributed_order
    assert files_of(checkout) == before


def test_demo_rejects_an_unknown_example(checkout: Path) -> None:
    process = run_script(checkout, "scripts/demo", "opera")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "kser: usage: scripts/demo [dice|shop]\n"


@pytest.mark.parametrize(
    ("example", "moment"),
    [
        ("dice", "starting examples/dice/consumer.py"),
        ("dice", "starting examples/dice/launch.py"),
        ("shop", "starting examples/shop/worker.py for bank"),
        ("shop", "starting examples/shop/buy.py"),
    ],
)
@pytest.mark.parametrize(
    ("number", "whole_group", "status"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, False, 129),
    ],
    ids=["Ctrl-C", "SIGINT to the script", "SIGTERM", "SIGHUP"],
)
def test_interrupted_demo_leaves_no_files_and_processes(
    checkout: Path, example: str, moment: str, number: signal.Signals, whole_group: bool, status: int
) -> None:
    before = files_of(checkout)
    with Script(checkout, "scripts/demo", example) as script:
        script.wait_for(moment)
        (os.killpg if whole_group else os.kill)(script.process.pid, number)
        assert script.wait() == status
        assert processes_of(checkout) == []
    assert "Traceback" not in script.stderr
    assert files_of(checkout) == before


@pytest.fixture
def replaced_consumer(checkout: Path) -> Iterator[Path]:
    """Return the path of the dice game's consumer, which is restored after the test."""
    path = checkout / "examples" / "dice" / "consumer.py"
    text = path.read_text()
    yield path
    path.write_text(text)


def test_demo_whose_consumer_dies_fails_at_once_and_prints_everything(checkout: Path, replaced_consumer: Path) -> None:
    replaced_consumer.write_text("raise SystemExit('no dice today')\n")
    process = run_script(checkout, "scripts/demo")
    assert process.returncode == 1
    assert "no dice today" in process.stdout
    assert "the demo failed: consumer.py ended with exit status 1 while" in process.stderr


def test_demo_without_a_result_fails_at_its_deadline_and_prints_everything(
    checkout: Path, replaced_consumer: Path
) -> None:
    replaced_consumer.write_text("import time\nprint('asleep', flush=True)\ntime.sleep(60)\n")
    program = checkout / "scripts" / "_demo.py"
    text = program.read_text()
    program.write_text(re.sub(r"^DEADLINE_SECONDS = \d+$", "DEADLINE_SECONDS = 15", text, flags=re.MULTILINE))
    try:
        process = run_script(checkout, "scripts/demo")
    finally:
        program.write_text(text)
    assert process.returncode == 1
    assert "asleep" in process.stdout
    assert "Producer.Success: __main__.DiceLaunch[" in process.stdout
    assert "timed out after 15 s while it waited for 'Controller.Success: __main__.DiceRoll['" in process.stderr


def test_test_script_passes_arguments_and_shares_its_installation_with_the_demo(checkout: Path) -> None:
    test_id = "tests/test_embedded.py::test_broker_listens_on_127_0_0_1_alone"
    assert "1 passed" in run_script(checkout, "scripts/test", test_id).stdout
    missing = run_script(checkout, "scripts/test", "tests/missing.py")
    assert missing.returncode == 4
    assert "missing.py" in missing.stderr
    demo = run_script(checkout, "scripts/demo")
    assert demo.returncode == 0
    assert "installing" not in missing.stderr + demo.stderr


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder of the PATH; it contains the tools of the scripts, and tests add further commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "rm", "sed", "cat", "mktemp", "mkdir", "env", "grep", "mv"):
        path = shutil.which(name)
        assert path is not None
        (folder / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def add_command(path: Path, text: str) -> None:
    """Create an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("system", "advice"), [("Linux", "apt-get install python3 python3-venv"), ("Darwin", "comes with macOS is older")]
)
def test_script_without_a_usable_python_names_the_package_to_install(commands: Path, system: str, advice: str) -> None:
    add_command(commands / "uname", f"echo {system}")
    add_command(commands / "python3", 'case $1 in --version) echo "Python 3.9.6" ;; *) exit 1 ;; esac')
    process = subprocess.run(
        ["/bin/sh", ROOT / "scripts" / "demo"], capture_output=True, text=True, timeout=SETUP_SECONDS
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert "kser needs 3.11 or newer, with its modules venv and ensurepip" in process.stderr
    assert "python3 is Python 3.9.6" in process.stderr
    assert advice in process.stderr


def test_python_that_does_not_run_is_skipped(commands: Path) -> None:
    add_command(commands / "python3.13", "exit 127")
    add_command(commands / "python3.12", "exit 0")
    add_command(commands / "python3.11", "exit 0")
    shell = f'. "{ROOT}/scripts/_env"; kser_find_python'
    process = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert process.stdout == "python3.12\n"
