"""Helpers of the SQL store tests: processes that share a store, writes that share a group, schema versions."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from kser.errors import KserError
from kser.store.sql import SQLStore
from kser.store.sql.group_commit import GroupCommit
from tests.support import ROOT, wait_until


def run_in_processes(count: int, work: str, uri: str) -> list[int]:
    """Run a command of ``tests.store.worker_process`` in several processes at the same time; return their numbers."""
    command = [sys.executable, "-m", "tests.store.worker_process", work, uri]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            )
            for _ in range(count)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        return [int(process.communicate("go\n", timeout=60)[0]) for process in _start_all(processes)]


def _start_all(processes: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


class HeldGroups:
    """Holds up the group commit of a store until all calls of a test are queued."""

    def __init__(self, store: SQLStore) -> None:
        self._groups: set[GroupCommit[Any]] = set(store._writer._groups.values())
        self.sizes: list[int] = []
        for group in self._groups:
            group._run = self._counted(group._run)

    def _counted(self, run: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(entries: Any) -> None:
            self.sizes.append(len(entries))
            run(entries)

        return counted

    def together(self, *calls: Callable[[], Any]) -> list[Any]:
        """Return the results or errors of calls that are written as one group, or as one group of each kind."""
        leaders = {group: group._leaders for group in self._groups}
        for group in self._groups:
            group._leaders = 0
        results: list[Any] = [None] * len(calls)

        def run(index: int) -> None:
            try:
                results[index] = calls[index]()
            except KserError as error:
                results[index] = error

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(len(group._waiting) for group in self._groups) == len(calls))
        for group in self._groups:
            group._leaders, group._leading = leaders[group], 1
            group._hand_over()
        for thread in threads:
            thread.join()
        return results


def set_schema_version(store: SQLStore, version: int, oldest: int) -> None:
    with store._database.write() as transaction:
        transaction._cursor.execute(f"UPDATE kser_schema SET version = {version}, oldest = {oldest}")
