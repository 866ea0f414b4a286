"""Helpers of the SQL store tests: several processes, writes in one group, foreign transactions, schema versions."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import psycopg

from kser.errors import KserError
from kser.store.sql import SQLStore
from kser.store.sql.group_commit import GroupCommit
from tests.postgres import Database
from tests.support import ROOT, wait_until


def run_in_processes(count: int, command: str, uri: str) -> list[int]:
    """Run a command of ``tests.store.worker_process`` in several processes at the same time; return what they print."""
    arguments = [sys.executable, "-m", "tests.store.worker_process", command, uri]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            )
            for _ in range(count)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=60) for process in processes]
    return [int(stdout) for stdout, _stderr in outputs]


class GroupCommitGate:
    """A gate before the group commit of a store, which opens when every call of a test is queued.

    A group commit has no public seam: threads alone decide which writes share a transaction.
    """

    def __init__(self, store: SQLStore) -> None:
        self._groups: set[GroupCommit[Any]] = set(store._writer._groups.values())
        #: The number of writes in each group.
        self.sizes: list[int] = []
        for group in self._groups:
            group._run = self._counted(group._run)

    def _counted(self, run: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(entries: Any) -> None:
            self.sizes.append(len(entries))
            run(entries)

        return counted

    def run(self, *calls: Callable[[], Any]) -> list[Any]:
        """Return the results or errors of calls that share one group, or one for each kind of write."""
        leaders = {group: group._leaders for group in self._groups}
        for group in self._groups:
            group._leaders = 0
        results: list[Any] = [None] * len(calls)

        def call(index: int) -> None:
            try:
                results[index] = calls[index]()
            except KserError as error:
                results[index] = error

        threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(len(group._waiting) for group in self._groups) == len(calls))
        for group in self._groups:
            group._leaders, group._leading = leaders[group], 1
            group._hand_over()
        for thread in threads:
            thread.join()
        return results


def foreign_connection(database: Database) -> psycopg.Connection[Any]:
    """Return a connection on which a test runs a transaction beside those of the store."""
    return psycopg.connect(database.uri.replace("+psycopg", ""))


def wait_for_blocked_statement(database: Database) -> None:
    """Wait until a statement of kser waits for a lock in PostgreSQL."""
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'kser' AND wait_event_type = 'Lock'"
    wait_until(lambda: database.run(query))


def set_schema_version(store: SQLStore, version: int, oldest: int) -> None:
    """Record that the tables have a version, and the oldest version of kser that may use them."""
    with store._database.write() as transaction:
        transaction._cursor.execute(f"UPDATE kser_schema SET version = {version}, oldest = {oldest}")
