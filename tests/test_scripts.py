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
from tests.test_install import index_answers

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("scripts")]

ROOT = Path(__file__).parent.parent
SETUP_SECONDS = 240
DEMO_SECONDS = 30

#: What the scripts may leave in a checkout; git ignores it.
MADE_BY_SETUP = {".venv", "kser.egg-info", "__pycache__", ".pytest_cache"}

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ROLL = rf"__main__\.DiceRoll\[{UUID}\]: You made a [1-6]"


@pytest.fixture(scope="module")
def fresh_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this checkout that a commit would have, and nothing else."""
    if not index_answers():
        needs("a package index", "the scripts install what they need")
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
    """The same, set up by an earlier run."""
    if not (fresh_checkout / ".venv" / "kser-stamp").exists():
        subprocess.run([fresh_checkout / "scripts" / "demo"], capture_output=True, timeout=SETUP_SECONDS)
    return fresh_checkout


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the scripts keep temporary files; it has to be empty again at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    # The scripts would inherit ignored signals: "nohup" ignores SIGHUP.
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield folder
    signal.signal(signal.SIGHUP, previous)
    assert list(folder.iterdir()) == []


class Script:
    """A script that runs in a process group of its own, as a shell would start it."""

    def __init__(self, checkout: Path, *command: str) -> None:
        self.said = ""
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
        assert self.process.stderr is not None
        while text not in self.said:
            line = self.process.stderr.readline()
            assert line, f"it ended, and said no {text!r}: {self.said}"
            self.said += line

    def end(self) -> int:
        self.said += self.process.communicate(timeout=DEMO_SECONDS)[1]
        return self.process.returncode

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        assert processes_of(self._checkout) == []


def processes_of(checkout: Path) -> list[str]:
    """What still runs from there; what was interrupted just now gets some time to end."""
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        shown = subprocess.run(["ps", "-A", "-ww", "-o", "command="], capture_output=True, text=True, check=True).stdout
        found = [line for line in shown.splitlines() if str(checkout) in line]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def run_script(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert processes_of(checkout) == []
    return done


def files_of(checkout: Path) -> set[str]:
    names = set()
    for folder, folders, files in os.walk(checkout):
        folders[:] = [name for name in folders if name not in MADE_BY_SETUP]
        names |= {str(Path(folder, name).relative_to(checkout)) for name in files}
    return names


def test_interrupted_setup_is_not_trusted(fresh_checkout: Path) -> None:
    stamp = fresh_checkout / ".venv" / "kser-stamp"
    with Script(fresh_checkout, "scripts/demo") as script:
        script.wait_for("kser: installing")
        time.sleep(1)
        os.killpg(script.process.pid, signal.SIGINT)
        assert script.end() == 130
    assert "Traceback" not in script.said
    assert not stamp.exists()
    done = run_script(fresh_checkout, "scripts/demo")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("kser: making .venv with python3")
    assert stamp.exists()


def test_demo_prints_both_logs_as_documented_and_leaves_no_files(checkout: Path) -> None:
    before = files_of(checkout)
    start = time.monotonic()
    done = run_script(checkout, "scripts/demo")
    assert time.monotonic() - start < DEMO_SECONDS
    assert done.returncode == 0, done.stderr
    assert "installing" not in done.stderr
    _, producer, consumer = re.split(r"^(?:Producer|Consumer) console output::\n\n", done.stdout, flags=re.MULTILINE)
    shown = [re.sub(rf"^    {STAMP} ", "", line) for line in producer.splitlines() if line]
    for name, line in zip(("DiceRoll", "DiceLaunch"), shown, strict=True):
        message = rf"__main__\.{name}\[{UUID}\]"
        assert re.fullmatch(rf"INFO     Producer\.Success: {message}: Message {message} sent in dice", line)
    shown = [re.sub(rf"^    {STAMP} INFO     ", "", line) for line in consumer.splitlines()]
    assert shown[:3] == [
        "Operation registry: loaded __main__.DiceRoll",
        "Operation registry: loaded __main__.DiceLaunch",
        "Consumer.Starting...",
    ]
    assert shown[-1] == "Closing consumer and exiting"
    rolls = [line for line in shown if re.fullmatch(rf"DiceRoll\.Success: {ROLL}", line)]
    assert len(rolls) == 4
    assert len([line for line in shown if re.fullmatch(rf"Controller\.Success: {ROLL}", line)]) == 1
    assert [line.partition(":")[0] for line in shown if "__main__.DiceLaunch[" in line] == [
        "DiceLaunch.SetStatus",
        "DiceLaunch.SetStatus",
        "DiceLaunch.Success",
        "Controller.Success",
    ]
    assert files_of(checkout) == before


def test_shop_demo_prints_each_attempt_and_leaves_no_files(checkout: Path) -> None:
    before = files_of(checkout)
    start = time.monotonic()
    done = run_script(checkout, "scripts/demo", "shop")
    assert time.monotonic() - start < DEMO_SECONDS
    assert done.returncode == 0, done.stderr
    everywhere, bank = re.findall(r"^Output of worker\.py for (\S+) \(process (\d+)\)::$", done.stdout, re.MULTILINE)
    assert (everywhere[0], bank[0]) == ("orders,warehouse", "bank")
    order = [
        ("Reserve", "1", "SUCCESS"),
        ("Charge", "1", "FAILED"),
        ("Charge", "2", "FAILED"),
        ("Charge", "3", "SUCCESS"),
        ("Ship", "1", "FAILED"),
        ("Ship", "2", "SUCCESS"),
    ]
    kettle = [(*attempt, everywhere[1]) for attempt in order]
    teapot = [(*attempt, bank[1] if attempt[0] == "Charge" else everywhere[1]) for attempt in order]
    assert (
        re.findall(r"^    (\w+) +(\d) +(SUCCESS|FAILED) +(\d+) +\d+\.\d\d", done.stdout, re.MULTILINE)
        == kettle + teapot
    )
    assert files_of(checkout) == before


def test_demo_rejects_an_unknown_example(checkout: Path) -> None:
    done = run_script(checkout, "scripts/demo", "opera")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kser: usage: scripts/demo [dice|shop]\n"


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
        assert script.end() == status
        assert processes_of(checkout) == []
    assert "Traceback" not in script.said
    assert files_of(checkout) == before


@pytest.fixture
def broken_consumer(checkout: Path) -> Iterator[Path]:
    path = checkout / "examples" / "dice" / "consumer.py"
    text = path.read_text()
    yield path
    path.write_text(text)


def test_demo_whose_consumer_dies_fails_at_once_and_prints_everything(checkout: Path, broken_consumer: Path) -> None:
    broken_consumer.write_text("raise SystemExit('no dice today')\n")
    done = run_script(checkout, "scripts/demo")
    assert done.returncode == 1
    assert "no dice today" in done.stdout
    assert "the demo failed: consumer.py ended with exit status 1 while" in done.stderr


def test_demo_without_a_result_fails_at_its_deadline_and_prints_everything(
    checkout: Path, broken_consumer: Path
) -> None:
    broken_consumer.write_text("import time\nprint('asleep', flush=True)\ntime.sleep(60)\n")
    program = checkout / "scripts" / "_demo.py"
    text = program.read_text()
    program.write_text(re.sub(r"^DEADLINE_SECONDS = \d+$", "DEADLINE_SECONDS = 3", text, flags=re.MULTILINE))
    try:
        done = run_script(checkout, "scripts/demo")
    finally:
        program.write_text(text)
    assert done.returncode == 1
    assert "asleep" in done.stdout
    assert "Producer.Success: __main__.DiceLaunch[" in done.stdout
    assert "timed out after 3 s while it waited for 'Controller.Success: __main__.DiceRoll['" in done.stderr


def test_test_script_passes_arguments_and_shares_its_installation_with_the_demo(checkout: Path) -> None:
    wanted = "tests/test_embedded.py::test_broker_listens_on_127_0_0_1_alone"
    assert "1 passed" in run_script(checkout, "scripts/test", wanted).stdout
    again = run_script(checkout, "scripts/test", "tests/missing.py")
    assert again.returncode == 4
    assert "missing.py" in again.stderr
    demo = run_script(checkout, "scripts/demo")
    assert demo.returncode == 0
    assert "installing" not in again.stderr + demo.stderr


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The PATH, with these few commands alone; tests add theirs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "rm", "sed", "cat", "mktemp", "mkdir", "env", "grep", "mv"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def command(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("system", "advice"), [("Linux", "apt-get install python3 python3-venv"), ("Darwin", "comes with macOS is older")]
)
def test_script_without_a_usable_python_names_the_package_to_install(only: Path, system: str, advice: str) -> None:
    command(only / "uname", f"echo {system}")
    command(only / "python3", 'case $1 in --version) echo "Python 3.9.6" ;; *) exit 1 ;; esac')
    done = subprocess.run(["/bin/sh", ROOT / "scripts" / "demo"], capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert "kser needs 3.11 or newer, with its modules venv and ensurepip" in done.stderr
    assert "python3 is Python 3.9.6" in done.stderr
    assert advice in done.stderr


def test_python_that_does_not_run_is_skipped(only: Path) -> None:
    command(only / "python3.13", "exit 127")
    command(only / "python3.12", "exit 0")
    command(only / "python3.11", "exit 0")
    shell = f'. "{ROOT}/scripts/_env"; kser_find_python'
    done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=SETUP_SECONDS)
    assert done.stdout == "python3.12\n"
