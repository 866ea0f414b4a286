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

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("install")]

ROOT = Path(__file__).parent.parent
SOURCES = ("kser", "setup.py", "pyproject.toml", "README.rst", "LICENSE")
PATIENCE_SECONDS = 30

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
    """A copy of what the package is built from: a build leaves files beside it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run_with_index([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(sources)])
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and what its users choose for development."""
    return environment_with(f"{wheel}[embedded,flask]", tmp_path_factory.mktemp("installed"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the checkout to work in, with the examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    shutil.copytree(ROOT / "examples" / "dice", tmp_path / "dice")
    return tmp_path


def run_with_index(command: list[str]) -> None:
    """Run what fetches packages: without a network it is not the package that failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = f"{shlex.join(command)} said:\n{done.stdout}{done.stderr}"
        if not index_answers():
            needs("a package index", said)
        pytest.fail(said, pytrace=False)


def index_answers() -> bool:
    probe = [sys.executable, "-m", "pip", "--quiet", "index", "versions", "cdumay-result"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def environment_with(requirement: str, folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run_with_index([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement])
    return python


def run(python: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Program:
    """A program that runs until it is stopped, and what it has written so far."""

    def __init__(self, python: Path, *arguments: str) -> None:
        self.log = Path(f"{arguments[-1].rpartition(os.sep)[2]}.log").absolute()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen([str(python), *arguments], stdout=output, stderr=subprocess.STDOUT)

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.text():
            assert self.process.poll() is None, f"it ended: {self.text()}"
            assert time.monotonic() < deadline, f"{text!r} is not in: {self.text()}"
            time.sleep(0.05)
        return self.text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def broker(installed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """The development broker of the installed package; what starts later finds it in its environment."""
    with Program(installed, "-m", "kser.embedded", "--topic", "dice") as program:
        text = program.wait_for("KSER_TOPICS=")
        for word in shlex.split(text, comments=True):
            name, equals, value = word.partition("=")
            if equals and name.startswith("KSER_"):
                monkeypatch.setenv(name, value)
        yield program


def test_installed_package_is_complete_and_typed(installed: Path, elsewhere: Path) -> None:
    found = run(installed, "-c", "import kser; print(kser.__file__)").strip()
    assert Path(found).is_relative_to(installed.parent.parent)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "kser").rglob("*.py")} | {"kser/py.typed"}
    assert {name for name in files if not (Path(found).parent.parent / name).is_file()} == set()


def test_documented_programs_run_outside_the_checkout(installed: Path, broker: Program) -> None:
    with Program(installed, "dice/consumer.py") as consumer:
        sent = run(installed, "dice/producer.py") + run(installed, "dice/launch.py")
        assert "Producer.Success: __main__.DiceRoll[" in sent
        assert "Producer.Success: __main__.DiceLaunch[" in sent
        consumer.wait_for("Controller.Success: __main__.DiceRoll[")
        text = consumer.wait_for("Controller.Success: __main__.DiceLaunch[")
        assert text.count("DiceRoll.Success: __main__.DiceRoll[") == 4
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
