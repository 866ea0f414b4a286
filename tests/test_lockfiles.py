"""Tests of the control files: running, pause and terminate file."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kser import lockfiles
from kser.lockfiles import RunningFile, TerminateFile
from tests.support import lines


@pytest.fixture
def running() -> Iterator[RunningFile]:
    """Return a running file, which is released after the test."""
    running = RunningFile()
    yield running
    running.release()


@pytest.fixture
def path() -> Path:
    """Return the path of the running file."""
    return Path(os.environ["RUNNING_FILE"])


def test_text_is_written_without_a_newline_and_then_cleared(running: RunningFile, path: Path) -> None:
    running.show("shop.Pay[1]")
    assert path.read_bytes() == b"shop.Pay[1]"
    running.clear()
    assert path.read_bytes() == b""


def test_shorter_text_replaces_a_longer_one(running: RunningFile, path: Path) -> None:
    running.show("a long text")
    running.show("short")
    assert path.read_bytes() == b"short"


def test_text_of_another_process_is_replaced(running: RunningFile, path: Path) -> None:
    path.write_text("a longer text of another process")
    running.show("mine")
    assert path.read_bytes() == b"mine"


def test_text_is_written_as_utf_8(running: RunningFile, path: Path) -> None:
    """C11"""
    running.show("café.Tâche[1]")
    assert path.read_bytes() == "café.Tâche[1]".encode()


def test_lone_surrogate_is_written_escaped(running: RunningFile, path: Path) -> None:
    """C14"""
    running.show("\udc80[1]")
    assert path.read_bytes() == rb"\udc80[1]"


def test_deleted_file_is_created_again(running: RunningFile, path: Path) -> None:
    running.show("one")
    path.unlink()
    running.show("two")
    assert path.read_bytes() == b"two"


def test_changed_variable_takes_effect(running: RunningFile, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running.show("one")
    other = path.with_name("kser-test-pause.lock")
    monkeypatch.setenv("RUNNING_FILE", str(other))
    running.show("two")
    assert (path.read_bytes(), other.read_bytes()) == (b"one", b"two")
    path.write_bytes(b"")


def test_clear_creates_the_file(running: RunningFile, path: Path) -> None:
    running.clear()
    assert path.read_bytes() == b""


def test_file_of_another_process_is_not_cleared_at_the_end(path: Path) -> None:
    """D9: a clean exit clears only the text of this process."""
    path.write_text("theirs")
    RunningFile().release()
    assert path.read_text() == "theirs"
    path.write_bytes(b"")


def test_own_file_is_cleared_at_the_end_and_may_be_written_again(running: RunningFile, path: Path) -> None:
    running.show("ours")
    running.release()
    assert path.read_bytes() == b""
    running.show("again")
    assert path.read_bytes() == b"again"


def test_each_thread_has_a_line_of_its_own(running: RunningFile, path: Path) -> None:
    turns = threading.Barrier(2, timeout=10)

    def run_in_other_thread() -> None:
        running.show("shop.Ship[2]")
        turns.wait()
        turns.wait()
        running.clear()

    thread = threading.Thread(target=run_in_other_thread)
    running.show("shop.Pay[1]")
    thread.start()
    turns.wait()
    assert path.read_bytes() == b"shop.Pay[1]\nshop.Ship[2]"
    running.show("shop.Pay[3]")
    assert path.read_bytes() == b"shop.Pay[3]\nshop.Ship[2]"
    turns.wait()
    thread.join()
    assert path.read_bytes() == b"shop.Pay[3]"
    running.clear()
    assert path.read_bytes() == b""


def test_concurrent_writer_leaves_its_line_to_the_writing_thread(running: RunningFile, path: Path) -> None:
    write, writing, may_write = running._write, threading.Event(), threading.Event()

    def blocked_write() -> None:
        writing.set()
        assert may_write.wait(10)
        write()

    running._write = blocked_write  # type: ignore[method-assign]
    thread = threading.Thread(target=running.show, args=["shop.Pay[1]"])
    thread.start()
    assert writing.wait(10)
    running.show("shop.Ship[2]")
    assert not path.exists()
    running._write = write  # type: ignore[method-assign]
    may_write.set()
    thread.join()
    assert path.read_bytes() == b"shop.Pay[1]\nshop.Ship[2]"


def test_change_during_open_or_close_is_written_afterwards(running: RunningFile, path: Path) -> None:
    running.open()
    with running._lock:
        running.show("shop.Pay[1]")
        assert not path.exists()
    running.open()
    assert path.read_bytes() == b"shop.Pay[1]"
    with running._lock:
        running.clear()
    running.close()
    assert path.read_bytes() == b""
    running.close()


def test_lines_of_ended_threads_are_cleared_at_the_end(running: RunningFile, path: Path) -> None:
    thread = threading.Thread(target=running.show, args=["shop.Pay[1]"])
    thread.start()
    thread.join()
    running.release()
    assert path.read_bytes() == b""
    running.show("new")
    assert path.read_bytes() == b"new"


def test_file_of_a_dead_process_is_cleared(running: RunningFile, path: Path) -> None:
    """D9"""
    path.write_text("text of a dead process")
    running.clear_stale()
    assert path.read_bytes() == b""


def test_file_of_a_live_process_is_not_cleared(running: RunningFile, path: Path) -> None:
    """D9: the consumers of a host share the file."""
    running.show("alive")
    RunningFile().clear_stale()
    assert path.read_bytes() == b"alive"
    running.release()
    path.write_text("text of another consumer")
    with path.open() as other_consumer:
        fcntl.flock(other_consumer, fcntl.LOCK_SH)
        RunningFile().clear_stale()
        assert path.read_bytes() == b"text of another consumer"
    RunningFile().clear_stale()
    assert path.read_bytes() == b""


def test_clear_stale_accepts_a_missing_file(running: RunningFile, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running.clear_stale()
    assert not path.exists()
    monkeypatch.delenv("RUNNING_FILE")
    running.clear_stale()


def test_unwritable_file_is_reported_once(
    running: RunningFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """C10"""
    missing = str(tmp_path / "missing" / "run.lock")
    monkeypatch.setenv("RUNNING_FILE", missing)
    for _ in range(3):
        running.show("text")
        running.clear()
    (line,) = lines(caplog)
    assert missing in line
    assert "LOCK_PATH" in line
    assert "RUNNING_FILE" in line


def test_unwritable_file_is_reported_again_after_a_successful_write(
    running: RunningFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    monkeypatch.setenv("RUNNING_FILE", str(folder / "run.lock"))
    running.show("text")
    folder.mkdir()
    running.show("text")
    (folder / "run.lock").unlink()
    folder.rmdir()
    running.show("text")
    assert len(lines(caplog)) == 2


def test_missing_variable_is_reported(
    running: RunningFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RUNNING_FILE")
    running.show("text")
    assert len(lines(caplog)) == 1


def test_pause_file_is_checked_on_each_call() -> None:
    assert not lockfiles.is_paused()
    Path(os.environ["LOCK_FILE"]).touch()
    assert lockfiles.is_paused()


def test_pause_file_is_removed() -> None:
    pause = Path(os.environ["LOCK_FILE"])
    assert lockfiles.remove_pause_file() is None
    pause.touch()
    assert lockfiles.remove_pause_file() == str(pause)
    assert not pause.exists()


def test_pause_file_that_cannot_be_removed_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """C10: the file is a folder here, because root may remove any file."""
    pause = Path(os.environ["LOCK_FILE"])
    pause.mkdir()
    assert lockfiles.remove_pause_file() is None
    assert lockfiles.is_paused()
    (line,) = lines(caplog)
    assert str(pause) in line


@pytest.mark.parametrize("variable", ["LOCK_FILE", "TERMINATE_FILE"])
def test_removed_variable_is_a_key_error(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(KeyError, match=variable):
        lockfiles.is_paused() if variable == "LOCK_FILE" else TerminateFile().is_present()


def test_new_terminate_file_is_present_and_is_kept() -> None:
    """D6: the terminate file is never deleted."""
    path = Path(os.environ["TERMINATE_FILE"])
    terminate = TerminateFile()
    assert not terminate.is_present()
    path.touch()
    assert terminate.is_present()
    assert path.exists()


def test_stale_terminate_file_is_reported_once_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """D6"""
    path = Path(os.environ["TERMINATE_FILE"])
    path.touch()
    os.utime(path, (lockfiles.PROCESS_START - 60,) * 2)
    terminate = TerminateFile()
    assert [terminate.is_present() for _ in range(3)] == [False] * 3
    (line,) = lines(caplog)
    assert str(path) in line
    assert path.exists()


def test_stale_terminate_file_counts_after_it_is_touched(caplog: pytest.LogCaptureFixture) -> None:
    path = Path(os.environ["TERMINATE_FILE"])
    path.touch()
    os.utime(path, (lockfiles.PROCESS_START - 60,) * 2)
    terminate = TerminateFile()
    assert not terminate.is_present()
    os.utime(path, (lockfiles.PROCESS_START + 60,) * 2)
    assert terminate.is_present()
