"""Control files of kser 0.8: three files that operators read, create and delete.

========== ===================== ======================================================================================
file       variable              meaning
========== ===================== ======================================================================================
running    ``RUNNING_FILE``      has one line for each message that is being handled; empty without messages
pause      ``LOCK_FILE``         while it exists, consumers start no new message
terminate  ``TERMINATE_FILE``    when it appears, consumers stop
========== ===================== ======================================================================================

kser reads these environment variables each time it uses a file, so a change of a variable takes effect at once. The
default paths contain the host name, so processes of one host share the files.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from contextlib import suppress

from kser.escaping import escape, escape_lines

logger = escape_lines(logging.getLogger(__name__))

#: Maximum number of characters of a line of the running file. A longer line is shortened in its middle.
MAX_LINE_LENGTH = 1000

#: Start time of this process. A terminate file that is older than this process was meant for another process.
PROCESS_START = time.time()


class RunningFile:
    """The running file, which lists the messages that are being handled.

    This class keeps the file open and rewrites it in place, because opening it for each message would take longer than
    a small task.

    This class reopens the file if the variable ``RUNNING_FILE`` has changed, or if the file was deleted. If the file
    cannot be written, kser logs one warning, and handles the messages anyway.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[int, str] = {}
        #: True if the lines have changed since the last write.
        self._is_stale = False
        self._consumers = 0
        self._path: str | None = None
        self._descriptor: int | None = None
        self._reported: str | None = None

    def show(self, text: str) -> None:
        """Set this thread's line to ``text``; an empty text removes the line. Control characters are escaped."""
        thread = threading.get_ident()
        if text:
            self._lines[thread] = escape(text, MAX_LINE_LENGTH)
        else:
            self._lines.pop(thread, None)
        self._is_stale = True
        self._flush(2 if text else 10)

    def _flush(self, rounds: int) -> None:
        """Write the changed lines.

        If another thread is writing the file, return at once, because that thread then also writes the changes of this
        thread. A wait for that thread would take longer than a small task takes to run.

        :param rounds: maximum number of writes. Without a limit, a thread could write the changes of other threads
            endlessly, while its own message waits. The next call writes the changes that remain.
        """
        for _ in range(rounds):
            if not self._is_stale or not self._lock.acquire(blocking=False):
                return
            self._is_stale = False
            try:
                self._write()
            except (OSError, KeyError) as error:
                self._report(error)
            finally:
                self._lock.release()

    def _write(self) -> None:
        data = "\n".join(list(self._lines.values())).encode()
        descriptor, size = self._open()
        if data:
            os.pwrite(descriptor, data, 0)
        # Truncate the file, because another consumer of this host may have written a longer text before.
        if size > len(data):
            os.ftruncate(descriptor, len(data))

    def clear(self) -> None:
        """Remove this thread's line and write the file, which creates a missing file. kser never deletes the file."""
        self.show("")

    def open(self) -> None:
        """Count a consumer that starts in this process, after emptying the file if no live process writes it."""
        self.clear_stale()
        with self._lock:
            self._consumers += 1
        self._flush(2)

    def close(self) -> None:
        """Remove a consumer that has ended from the count. If no consumer of this process is left, release the file."""
        with self._lock:
            self._consumers -= 1
        if self._consumers <= 0:
            self.release()
        else:
            self._flush(2)

    def release(self) -> None:
        """Empty the file if this process wrote it, and close it."""
        if self._descriptor is not None:
            self._lines.clear()
            self.clear()
        with self._lock:
            self._close()

    def clear_stale(self) -> None:
        """Empty the file if no live process writes it. Each live process that writes the file holds a lock on it."""
        try:
            descriptor = os.open(os.environ["RUNNING_FILE"], os.O_WRONLY)
        except (OSError, KeyError):
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
        except OSError:
            # A live process holds the lock, or the file system has no locks. In both cases, leave the content as it is:
            # the next write of any process replaces it.
            return
        finally:
            os.close(descriptor)

    def _open(self) -> tuple[int, int]:
        """Return the descriptor and the size of the current file. Reopen the file if necessary."""
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
                "the running file %r cannot be written (%s): messages are handled without it; set LOCK_PATH to a"
                " writable folder, or RUNNING_FILE to a file in a writable folder",
                path,
                error,
            )


#: The running file of this process.
running_file = RunningFile()


def is_paused() -> bool:
    """Return whether the pause file exists."""
    return os.path.exists(os.environ["LOCK_FILE"])


def remove_pause_file() -> str | None:
    """Remove the pause file. Return its path; return None if the file did not exist or could not be removed."""
    path = os.environ["LOCK_FILE"]
    if not is_paused():
        return None
    try:
        os.remove(path)
    except OSError as error:
        logger.warning(
            "the pause file %r cannot be removed (%s): the consumer stays paused until you remove it", path, error
        )
        return None
    return path


class TerminateFile:
    """Reader of the terminate file. kser never deletes the file.

    If the file is older than this process, kser logs one warning and ignores the file.
    """

    def __init__(self) -> None:
        self._ignored: tuple[str, float] | None = None

    def is_present(self) -> bool:
        """Return whether the file was written since this process started."""
        path = os.environ["TERMINATE_FILE"]
        try:
            written = os.stat(path).st_mtime
        except OSError:
            return False
        # Compare with a time 20 ms before PROCESS_START: file times come from a coarser clock, which may lag by some
        # milliseconds, so a file that was written just after the start may seem older than this process.
        if written >= PROCESS_START - 0.02:
            return True
        if self._ignored != (path, written):
            self._ignored = (path, written)
            logger.warning(
                "the terminate file %r is older than this process and is ignored; delete it, or touch it to stop the"
                " consumer now",
                path,
            )
        return False


#: The reader of the terminate file in this process.
terminate_file = TerminateFile()
