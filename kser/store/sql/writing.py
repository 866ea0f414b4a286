"""Batched writes of workers: new operations, claims and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.rows import Checkpoint
from kser.store.sql.adding import Adding
from kser.store.sql.checkpoints import Recording, Uneven
from kser.store.sql.claiming import Claiming, Take
from kser.store.sql.database import ATTEMPTS, Database, Repeat
from kser.store.sql.group import Entry, Group
from kser.store.sql.rows import Ids
from kser.store.sql.saving import Save, Saving

Work = Save | Take | Checkpoint
Result = TypeVar("Result")

#: Marks an entry that was not written with its batch; it is written in a transaction of its own.
ALONE: Final = object()


class Sorts:
    """A batch of entries, grouped by kind of write and keyed by index.

    :param entries: the entries to write.
    """

    def __init__(self, entries: Sequence[Entry[Work]]) -> None:
        self.count = len(entries)
        self.saves: dict[int, Save] = {}
        self.takes: dict[int, Take] = {}
        self.checkpoints: dict[int, Checkpoint] = {}
        roots: set[int] = set()
        for index, entry in enumerate(entries):
            work = entry.item
            if isinstance(work, Save):
                self.saves[index] = work
            elif isinstance(work, Take):
                self.takes[index] = work
            elif work.root_id not in roots:
                # Only the first of two checkpoints for one root joins the batch; the second is written in a transaction
                # of its own.
                roots.add(work.root_id)
                self.checkpoints[index] = work


class Writing:
    """The writer of all threads, with a group commit.

    :param database: the database to write to.
    """

    def __init__(self, database: Database) -> None:
        ids = Ids()
        self.adding = Adding(database)
        self.claiming = Claiming(database, self.adding)
        self.saving = Saving(database, self.adding, self.claiming, ids)
        self.recording = Recording(database, self.adding, ids)
        self._database = database
        kinds: tuple[type[Work], ...] = (Save, Take, Checkpoint)
        one: Group[Work] = Group(self._run, database.writers)
        # PostgreSQL writes a batch in one statement, which is its own transaction, and one statement can write only one
        # kind. So each kind has a group there; SQLite has one group, whose transactions are shared by all kinds.
        self._groups = {kind: Group(self._run, database.writers) if database.packed else one for kind in kinds}

    def write(self, work: Work) -> Any:
        """Write one item, batched with the concurrent writes of other threads."""
        return self._groups[type(work)].write(work)

    def _run(self, entries: Sequence[Entry[Work]]) -> None:
        results: list[Any] = [ALONE] * len(entries)
        trouble: StoreUnavailable | None = None
        try:
            self._fastest(entries, results)
        except StoreUnavailable as error:
            trouble = error
        for entry, result in zip(entries, results, strict=True):
            if result is not ALONE:
                # This entry was committed before the database became unavailable, so its result is valid.
                entry.result = result
            elif trouble is None:
                self._run_alone(entry)
            else:
                # Each thread raises its own object: raising one object in several threads would mix their tracebacks.
                entry.error = type(trouble)(trouble.message)
                entry.error.__cause__ = trouble.__cause__

    def _fastest(self, entries: Sequence[Entry[Work]], results: list[Any]) -> None:
        """Write entries in one statement, then the remaining ones in one transaction.

        The result of an entry that was not written in either way stays ``NOT_WRITTEN``.
        """
        left, sorts = list(range(len(entries))), Sorts(entries)
        for way in (self._at_once, self._together) if self._fits_at_once(sorts) else (self._together,):
            with suppress(StoreError, Uneven):
                for index, result in zip(left, repeated(partial(way, sorts)), strict=True):
                    results[index] = result
            left = [index for index in left if results[index] is ALONE]
            if not left:
                break
            sorts = Sorts([entries[index] for index in left])

    def _fits_at_once(self, sorts: Sorts) -> bool:
        """Return whether one statement can write the batch. On PostgreSQL all its entries are of one kind."""
        return (
            self._database.packed
            and self.recording.fits_at_once(list(sorts.checkpoints.values()))
            and self.saving.fits_at_once(list(sorts.saves.values()))
        )

    def _at_once(self, sorts: Sorts) -> list[Any]:
        """Write a batch in one statement.

        A claim that this statement cannot make is left out; any other entry that does not fit fails the statement.
        """
        found: list[tuple[int, Any]] = []
        with self._database.write(single=True) as transaction:
            if sorts.checkpoints:
                statuses = self.recording.record_at_once(transaction, list(sorts.checkpoints.values()))
                found += zip(sorts.checkpoints, statuses, strict=True)
            if sorts.takes:
                claims = self.claiming.take_at_once(transaction, list(sorts.takes.values()))
                found += zip(sorts.takes, claims, strict=True)
            if sorts.saves:
                saved = self.saving.store_at_once(transaction, list(sorts.saves.values()))
                found += zip(sorts.saves, saved, strict=True)
        results = {at: result for at, result in found if result is not None}
        return [results.get(index, ALONE) for index in range(sorts.count)]

    def _together(self, sorts: Sorts) -> list[Any]:
        """Write a batch in one transaction. An entry that does not fit fails the whole batch."""
        results: dict[int, Any] = {}
        with self._database.write() as transaction:
            if sorts.checkpoints:
                statuses = self.recording.record(transaction, list(sorts.checkpoints.values()))
                results.update(zip(sorts.checkpoints, statuses, strict=True))
            if sorts.takes:
                claims = self.claiming.take(transaction, list(sorts.takes.values()))
                results.update(zip(sorts.takes, claims, strict=True))
            if sorts.saves:
                saved = self.saving.store(transaction, list(sorts.saves.values()))
                results.update(zip(sorts.saves, saved, strict=True))
        return [results.get(index, ALONE) for index in range(sorts.count)]

    def _run_alone(self, entry: Entry[Work]) -> None:
        try:
            entry.result = repeated(lambda: self._alone(entry.item))
        except KserError as error:
            entry.error = error

    def _alone(self, work: Work) -> Any:
        if isinstance(work, Save):
            return self._save_alone(work)
        with self._database.write() as transaction:
            if isinstance(work, Take):
                return self.claiming.take(transaction, [work])[0]
            return self.recording.settle(transaction, work)

    def _save_alone(self, save: Save) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._database.write() as transaction:
                    known = self.saving.known(transaction, save)
                    return self.saving.store(transaction, [save])[0] if known is None else known
            except StoreError:
                # Another process may have stored the same operation, or an operation with the same id, between the
                # check and the insert. The next try reads it.
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("not reached")


def repeated(call: Callable[[], Result]) -> Result:
    """Return the result of ``call``, which is repeated after a conflict with another transaction.

    :raises kser.errors.StoreUnavailable: every try ended with a conflict.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return call()
        except Repeat:
            pass
    return call()
