"""Tests of the package: its names, its defaults in the environment, and its imports."""

from __future__ import annotations

import os
import re
import shutil
import socket
from importlib import import_module
from pathlib import Path

import pytest

import kser
from tests.support import ROOT, run_python

HOMES = {
    "Controller": "kser.controller",
    "Entrypoint": "kser.entry",
    "Message": "kser.schemas",
    "Operation": "kser.sequencing.operation",
    "OperationRegistry": "kser.sequencing.registry",
    "Task": "kser.sequencing.task",
}

NO_LOCKS = {"LOCK_PATH": None, "RUNNING_FILE": None, "LOCK_FILE": None, "TERMINATE_FILE": None}

SHOW_LOCKS = f"import os, kser; print(*(os.environ[name] for name in {tuple(NO_LOCKS)!r}), sep='|')"


def test_dunder_all_lists_every_public_name() -> None:
    assert set(kser.__all__) == {*HOMES, "__version__"}


@pytest.mark.parametrize(("name", "home"), HOMES.items())
def test_public_name_is_the_class_of_its_module(name: str, home: str) -> None:
    assert getattr(kser, name) is getattr(import_module(home), name)


def test_dir_lists_names_that_are_not_loaded_yet() -> None:
    done = run_python("import kser; print(set(kser.__all__) <= set(dir(kser)), 'Task' in vars(kser))")
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_star_import_loads_every_name() -> None:
    done = run_python("from kser import *; print(Task.__module__, Controller.__module__)")
    assert done.stdout.split() == ["kser.sequencing.task", "kser.controller"], done.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kser' has no attribute 'Taks'"):
        _ = kser.Taks


def test_importing_the_package_loads_no_dependency() -> None:
    done = run_python("import sys, kser; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    heavy = {"kafka", "confluent_kafka", "flask", "marshmallow", "blinker", "cdumay_result", "cdumay_error"}
    assert done.returncode == 0, done.stderr
    assert heavy.isdisjoint(done.stdout.split())


def test_package_is_imported_without_being_installed(tmp_path: Path) -> None:
    """A2"""
    shutil.copytree(ROOT / "kser", tmp_path / "kser", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kser; print(kser.__version__, kser.__file__)"
    done = run_python(code)
    assert done.stdout.split() == [kser.__version__, str(tmp_path / "kser" / "__init__.py")], done.stderr


def test_version_is_the_one_that_setup_reads() -> None:
    text = (ROOT / "kser" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE) == [kser.__version__]


def test_host_name_is_known() -> None:
    assert kser.__hostname__ == socket.gethostname()


def test_defaults_are_written_into_the_environment() -> None:
    done = run_python(SHOW_LOCKS, **NO_LOCKS)
    start = f"/var/run/kser-{socket.gethostname()}"
    files = [f"{start}-run.lock", f"{start}-pause.lock", f"{start}-terminate.lock"]
    assert done.stdout.strip().split("|") == ["/var/run", *files], done.stderr


@pytest.mark.parametrize(("folder", "start"), [("", "kser-"), ("/tmp/", "/tmp/kser-"), ("/tmp", "/tmp/kser-")])
def test_control_files_lie_in_lock_path(folder: str, start: str) -> None:
    done = run_python(SHOW_LOCKS, **{**NO_LOCKS, "LOCK_PATH": folder})
    path, *files = done.stdout.strip("\n").split("|")
    assert path == folder
    assert [file.startswith(start) for file in files] == [True] * 3, files


def test_environment_variables_are_not_overwritten() -> None:
    given = {name: f"/tmp/{name}" for name in NO_LOCKS}
    done = run_python(SHOW_LOCKS, **given)
    assert done.stdout.strip().split("|") == list(given.values())


def test_metrics_are_off_by_default() -> None:
    done = run_python("import kser; print(kser.KSER_METRICS_ENABLED, kser.KSER_TASK_COUNT, kser.KSER_TASKS_STATUS)")
    assert done.stdout.split() == ["no", "None", "None"]
    assert done.stderr == ""


def test_enabled_metrics_are_reported_as_missing() -> None:
    done = run_python("import kser; print(kser.KSER_METRICS_ENABLED)", KSER_METRICS_ENABLED="yes")
    assert done.stdout.split() == ["yes"]
    assert "KSER_METRICS_ENABLED=yes has no effect" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_metrics_switch_is_stored_unchanged() -> None:
    done = run_python("import kser; print(kser.KSER_METRICS_ENABLED)", KSER_METRICS_ENABLED="YES")
    assert (done.stdout.split(), done.stderr) == (["YES"], "")


def test_tests_use_control_files_of_their_own(lock_path: Path) -> None:
    assert Path(os.environ["RUNNING_FILE"]).parent == lock_path
