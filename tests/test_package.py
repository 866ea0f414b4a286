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

#: The module of each public name.
MODULE_OF = {
    "Controller": "kser.controller",
    "Entrypoint": "kser.entry",
    "Message": "kser.schemas",
    "Operation": "kser.sequencing.operation",
    "OperationRegistry": "kser.sequencing.registry",
    "Task": "kser.sequencing.task",
}

#: The environment without the settings of the control files.
UNSET = {"LOCK_PATH": None, "RUNNING_FILE": None, "LOCK_FILE": None, "TERMINATE_FILE": None}

#: Code that prints the settings of the control files.
PRINT_CONTROL_FILES = f"import os, kser; print(*(os.environ[name] for name in {tuple(UNSET)!r}), sep='|')"


def test_dunder_all_lists_every_public_name() -> None:
    assert set(kser.__all__) == {*MODULE_OF, "__version__"}


@pytest.mark.parametrize(("name", "module"), MODULE_OF.items())
def test_public_name_is_the_class_of_its_module(name: str, module: str) -> None:
    assert getattr(kser, name) is getattr(import_module(module), name)


def test_dir_lists_names_that_are_not_loaded_yet() -> None:
    process = run_python("import kser; print(set(kser.__all__) <= set(dir(kser)), 'Task' in vars(kser))")
    assert process.stdout.split() == ["True", "False"], process.stderr


def test_star_import_loads_every_name() -> None:
    process = run_python("from kser import *; print(Task.__module__, Controller.__module__)")
    assert process.stdout.split() == ["kser.sequencing.task", "kser.controller"], process.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kser' has no attribute 'Taks'"):
        _ = kser.Taks


def test_importing_the_package_loads_no_dependency() -> None:
    process = run_python("import sys, kser; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    dependencies = {"kafka", "confluent_kafka", "flask", "marshmallow", "blinker", "cdumay_result", "cdumay_error"}
    assert process.returncode == 0, process.stderr
    assert dependencies.isdisjoint(process.stdout.split())


def test_package_is_imported_without_being_installed(tmp_path: Path) -> None:
    """A2"""
    shutil.copytree(ROOT / "kser", tmp_path / "kser", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kser; print(kser.__version__, kser.__file__)"
    process = run_python(code)
    assert process.stdout.split() == [kser.__version__, str(tmp_path / "kser" / "__init__.py")], process.stderr


def test_version_is_the_one_that_setup_reads() -> None:
    text = (ROOT / "kser" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE) == [kser.__version__]


def test_host_name_is_that_of_the_machine() -> None:
    assert kser.__hostname__ == socket.gethostname()


def test_defaults_are_written_into_the_environment() -> None:
    process = run_python(PRINT_CONTROL_FILES, **UNSET)
    start = f"/var/run/kser-{socket.gethostname()}"
    files = [f"{start}-run.lock", f"{start}-pause.lock", f"{start}-terminate.lock"]
    assert process.stdout.strip().split("|") == ["/var/run", *files], process.stderr


@pytest.mark.parametrize(("folder", "start"), [("", "kser-"), ("/tmp/", "/tmp/kser-"), ("/tmp", "/tmp/kser-")])
def test_control_files_lie_in_lock_path(folder: str, start: str) -> None:
    process = run_python(PRINT_CONTROL_FILES, **{**UNSET, "LOCK_PATH": folder})
    path, *files = process.stdout.strip("\n").split("|")
    assert path == folder
    assert [file.startswith(start) for file in files] == [True] * 3, files


def test_environment_variables_are_not_overwritten() -> None:
    environment = {name: f"/tmp/{name}" for name in UNSET}
    process = run_python(PRINT_CONTROL_FILES, **environment)
    assert process.stdout.strip().split("|") == list(environment.values()), process.stderr


def test_metrics_are_off_by_default() -> None:
    process = run_python("import kser; print(kser.KSER_METRICS_ENABLED, kser.KSER_TASK_COUNT, kser.KSER_TASKS_STATUS)")
    assert process.stdout.split() == ["no", "None", "None"]
    assert process.stderr == ""


def test_enabled_metrics_are_reported_as_missing() -> None:
    process = run_python("import kser; print(kser.KSER_METRICS_ENABLED)", KSER_METRICS_ENABLED="yes")
    assert process.stdout.split() == ["yes"]
    assert "KSER_METRICS_ENABLED=yes has no effect" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_metrics_switch_is_stored_unchanged() -> None:
    process = run_python("import kser; print(kser.KSER_METRICS_ENABLED)", KSER_METRICS_ENABLED="YES")
    assert (process.stdout.split(), process.stderr) == (["YES"], "")


def test_tests_use_control_files_of_their_own(lock_path: Path) -> None:
    assert Path(os.environ["RUNNING_FILE"]).parent == lock_path
