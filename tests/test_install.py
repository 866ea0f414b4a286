"""Tests of the installation: the wheel, and the package without extras, each in its own environment."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import needs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("kser", "setup.py", "pyproject.toml", "README.rst", "LICENSE")
WAIT_SECONDS = 30

RUN_A_TASK = """
import sys
from cdumay_result import Result
from kser import Controller, Entrypoint, Message, Operation, OperationRegistry, Task
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer

oregistry = OperationRegistry()

@oregistry.subscribe
class Hello(Task):
    def run(self):
        return Result(uuid=self.uuid, stdout="hello")

print(Controller.run(Message(uuid="1", entrypoint="__main__.Hello").dumps()))
print(sorted({"confluent_kafka", "flask"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that the package is built from, because a build leaves files next to them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    run_with_index([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(sources)])
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the wheel and the extras for development."""
    return environment_with(f"{wheel}[embedded,flask]", tmp_path_factory.mktemp("installed"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder: it is outside the checkout, and contains the examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    shutil.copytree(ROOT / "examples" / "dice", tmp_path / "dice")
    return tmp_path


def run_with_index(command: list[str]) -> None:
    """Run a command that fetches packages; skip the test if the package index does not respond."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        text = f"{shlex.join(command)} wrote:\n{process.stdout}{process.stderr}"
        if not index_responds():
            needs("a package index", text)
        pytest.fail(text, pytrace=False)


def index_responds() -> bool:
    """Return whether the package index can be reached."""
    probe = [sys.executable, "-m", "pip", "--quiet", "index", "versions", "cdumay-result"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def environment_with(requirement: str, folder: Path) -> Path:
    """Create an environment, install the requirement, and return the interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run_with_index([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement])
    return python


def run(python: Path, *arguments: str) -> str:
    """Run Python, which must succeed, and return its whole output."""
    process = subprocess.run([str(python), *arguments], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


class Program:
    """A Python program that runs until it is stopped; its output goes to a file."""

    def __init__(self, python: Path, *arguments: str) -> None:
        self.log = Path(f"{arguments[-1].rpartition(os.sep)[2]}.log").absolute()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen([str(python), *arguments], stdout=output, stderr=subprocess.STDOUT)

    def text(self) -> str:
        """Return the output so far."""
        return self.log.read_text()

    def wait_for(self, text: str) -> str:
        """Wait until the output contains ``text``, and return the output."""
        deadline = time.monotonic() + WAIT_SECONDS
        while text not in self.text():
            assert self.process.poll() is None, f"the program ended: {self.text()}"
            assert time.monotonic() < deadline, f"{text!r} is not in: {self.text()}"
            time.sleep(0.05)
        return self.text()

    def stop(self) -> int:
        """Terminate the program, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_SECONDS)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def broker(installed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Run the development broker of the installed package, and set the environment that it prints."""
    with Program(installed, "-m", "kser.embedded", "--topic", "dice") as program:
        text = program.wait_for("KSER_TOPICS=")
        for word in shlex.split(text, comments=True):
            name, equals, value = word.partition("=")
            if equals and name.startswith("KSER_"):
                monkeypatch.setenv(name, value)
        yield program


def test_installed_package_is_complete_and_typed(installed: Path, elsewhere: Path) -> None:
    package = Path(run(installed, "-c", "import kser; print(kser.__file__)").strip()).parent
    assert package.is_relative_to(installed.parent.parent)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "kser").rglob("*.py")} | {"kser/py.typed"}
    assert {name for name in files if not (package.parent / name).is_file()} == set()


def test_documented_programs_run_outside_the_checkout(installed: Path, broker: Program) -> None:
    with Program(installed, "dice/consumer.py") as consumer:
        producer_log = run(installed, "dice/producer.py") + run(installed, "dice/launch.py")
        assert "Producer.Success: __main__.DiceRoll[" in producer_log
        assert "Producer.Success: __main__.DiceLaunch[" in producer_log
        consumer.wait_for("Controller.Success: __main__.DiceRoll[")
        consumer_log = consumer.wait_for("Controller.Success: __main__.DiceLaunch[")
        assert consumer_log.count("DiceRoll.Success: __main__.DiceRoll[") == 4
        assert consumer.stop() == 0
    assert "Traceback" not in consumer.text()
    assert broker.stop() == 0


def test_plain_installation_in_an_empty_environment_runs_tasks(
    sources: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    python = environment_with(str(sources), tmp_path_factory.mktemp("plain"))
    run(python, "-m", "pip", "check")
    assert run(python, "-c", RUN_A_TASK).splitlines() == ["hello", "[]"]
    broker = subprocess.run([str(python), "-m", "kser.embedded"], capture_output=True, text=True)
    assert broker.returncode == 1
    assert 'pip install "kser[embedded]"' in broker.stderr
