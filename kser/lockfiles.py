"""The legacy control plane: three files that operators look at and touch.

========== ===================== ======================================================================================
file       variable              meaning
========== ===================== ======================================================================================
running    ``RUNNING_FILE``      holds the messages that are being handled, a line each, empty when there is none
pause      ``LOCK_FILE``         while it exists, consumers take no messages
terminate  ``TERMINATE_FILE``    when it appears, consumers end
========== ===================== ======================================================================================

The variables are read at each use. Paths are per host, so other processes may share the files.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from contextlib import suppress

logger = logging.getLogger(__name__)

#: A terminate file that is older than this was not meant for this process.
PROCESS_START = time.time()


class RunningFile:
    """The running file, kept open and rewritten in place: opening it each time would cost more than a small task.

    It is opened again when its variable has changed or when somebody deleted the file. A file that cannot be written
    is reported once, and messages are handled all the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[int, str] = {}
        #: Whether it has changed since it was written.
        self._stale = False
        self._consumers = 0
        self._path: str | None = None
        self._descriptor: int | None = None
        self._reported: str | None = None

    def show(self, text: str) -> None:
        """Make ``text`` this thread's line of the content; the line goes when it is empty."""
        thread = threading.get_ident()
        if text:
            self._lines[thread] = text
        else:
            self._lines.pop(thread, None)
        self._stale = True
        self._write_stale(2 if text else 10)

    def _write_stale(self, rounds: int) -> None:
        """Write what has changed.

        Whoever comes while another thread writes leaves it to that one: to wait here, message by message, would cost
        many workers more than small tasks do. That one goes on soon: its own message waits, and is shown once more.
        """
        for _ in range(rounds):
            if not self._stale or not self._lock.acquire(blocking=False):
                return
            self._stale = False
            try:
                self._write()
            except (OSError, KeyError) as error:
                self._report(error)
            finally:
                self._lock.release()

    def _write(self) -> None:
        # What has no UTF-8 form (a lone surrogate) is shown escaped: the file is for people.
        data = "\n".join(list(self._lines.values())).encode("utf-8", "backslashreplace")
        descriptor, size = self._open()
        if data:
            os.pwrite(descriptor, data, 0)
        # Another consumer of this host may have left a longer text.
        if size > len(data):
            os.ftruncate(descriptor, len(data))

    def clear(self) -> None:
        """Take this thread's line away; the file is made when missing and never deleted."""
        self.show("")

    def open(self) -> None:
        """A consumer of this process starts."""
        self.clear_stale()
        with self._lock:
            self._consumers += 1
        self._write_stale(2)

    def close(self) -> None:
        """A consumer of this process has ended; the last one lets go of the file."""
        with self._lock:
            self._consumers -= 1
        if self._consumers <= 0:
            self.clear_own()
        else:
            self._write_stale(2)

    def clear_own(self) -> None:
        """Empty the file if this process wrote it, and let go of it."""
        if self._descriptor is not None:
            self._lines.clear()
            self.clear()
        with self._lock:
            self._close()

    def clear_stale(self) -> None:
        """Empty a file that a process left behind which is dead: each one that is alive holds a lock on it."""
        try:
            descriptor = os.open(os.environ["RUNNING_FILE"], os.O_WRONLY)
        except (OSError, KeyError):
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
        except OSError:
            # Somebody is alive, or the file system knows no locks: then it is cleared by whoever writes next.
            return
        finally:
            os.close(descriptor)

    def _open(self) -> tuple[int, int]:
        """The descriptor and the size of the file in place now."""
        path = os.environ["RUNNING_FILE"]
        if self._descriptor is not None:
            status = os.fstat(self._descriptor)
            if path == self._path and status.st_nlink:
                return self._descriptor, status.st_size
            self._close()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._path = path
        self._reported = None
        return self._descriptor, os.fstat(self._descriptor).st_size

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _report(self, error: Exception) -> None:
        path = os.environ.get("RUNNING_FILE", "")
        if self._reported != path:
            self._reported = path
            logger.warning(
                "the running file %r cannot be written (%s): messages are handled without it; set LOCK_PATH to a folder"
                " that is writable, or RUNNING_FILE to a file in one",
                path,
                error,
            )


#: The running file of this process.
running_file = RunningFile()


def is_paused() -> bool:
    """Whether the pause file exists."""
    return os.path.exists(os.environ["LOCK_FILE"])


def remove_pause_file() -> str | None:
    """Remove the pause file; returns its path when there was one and it could be removed."""
    path = os.environ["LOCK_FILE"]
    if not is_paused():
        return None
    try:
        os.remove(path)
    except OSError as error:
        logger.warning("the pause file %r cannot be removed (%s): the consumer is paused until it is gone", path, error)
        return None
    return path


class TerminateFile:
    """The terminate file; one older than this process is reported once and ignored, and none is ever deleted."""

    def __init__(self) -> None:
        self._ignored: tuple[str, float] | None = None

    def is_present(self) -> bool:
        """Whether the file was written since this process started."""
        path = os.environ["TERMINATE_FILE"]
        try:
            written = os.stat(path).st_mtime
        except OSError:
            return False
        # File times come from a coarser clock that may lag by some milliseconds.
        if written >= PROCESS_START - 0.02:
            return True
        if self._ignored != (path, written):
            self._ignored = (path, written)
            logger.warning(
                "the terminate file %r is older than this process and is ignored; delete it, or touch it to end now",
                path,
            )
        return False


#: The terminate file as this process sees it.
terminate_file = TerminateFile()
