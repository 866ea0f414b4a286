"""What workers write, in groups: operations to store, claims, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.rows import Checkpoint, Claim
from kser.store.sql.checkpoints import Recording, Uneven
from kser.store.sql.database import ATTEMPTS, Database, Repeat, Transaction
from kser.store.sql.group import Entry, Group
from kser.store.sql.rows import Ids
from kser.store.sql.saving import Adding, Save, Saving, Take

Work = Save | Take | Checkpoint
Result = TypeVar("Result")

#: Stands for a result that a group could not give: its entry is written alone.
ALONE: Final = object()


class Sorts:
    """Entries by what is done with them, each under its index.

    :param entries: what is to be written.
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
                # Of two for one root the second is left out, and written alone.
                roots.add(work.root_id)
                self.checkpoints[index] = work


class Writing:
    """Writes for all threads.

    :param database: where.
    """

    def __init__(self, database: Database) -> None:
        ids = Ids()
        self.adding = Adding(database)
        self.saving = Saving(database, self.adding, ids)
        self.recording = Recording(database, self.adding, ids)
        self._database = database
        self._group: Group[Work] = Group(self._run, database.writers)

    def write(self, work: Work) -> Any:
        """Write something, with what others write at the same time."""
        return self._group.write(work)

    def _run(self, entries: Sequence[Entry[Work]]) -> None:
        try:
            results = self._fastest(entries)
        except StoreUnavailable as error:
            for entry in entries:
                # Each thread raises its own.
                entry.error = type(error)(error.message)
                entry.error.__cause__ = error.__cause__
            return
        for entry, result in zip(entries, results, strict=True):
            if result is ALONE:
                self._run_alone(entry)
            else:
                entry.result = result

    def _fastest(self, entries: Sequence[Entry[Work]]) -> list[Any]:
        """What comes of entries, written as they can be: all in a few statements, in a transaction, or alone."""
        sorts = Sorts(entries)
        fits = self.recording.fits_at_once(list(sorts.checkpoints.values()))
        for at_once in (True, False) if fits else (False,):
            with suppress(StoreError, Uneven):
                return repeated(partial(self._together, sorts, at_once))
        return [ALONE] * len(entries)

    def _together(self, sorts: Sorts, at_once: bool) -> list[Any]:
        """Write entries in one transaction; what does not fit is left out.

        :param at_once: all checkpoints fit, most likely.
        """
        results: dict[int, Any] = {}
        record = self.recording.record_at_once if at_once else self.recording.record
        with self._database.write(single=at_once and not sorts.saves and not sorts.takes) as transaction:
            if sorts.checkpoints:
                statuses = record(transaction, list(sorts.checkpoints.values()))
                results.update((at, found) for at, found in zip(sorts.checkpoints, statuses, strict=True) if found)
            if sorts.takes:
                claims = self.saving.take(transaction, list(sorts.takes.values()))
                results.update(zip(sorts.takes, claims, strict=True))
            if sorts.saves:
                results.update(zip(sorts.saves, self._store(transaction, list(sorts.saves.values())), strict=True))
        return [results.get(index, ALONE) for index in range(sorts.count)]

    def _store(self, transaction: Transaction, saves: Sequence[Save]) -> list[Claim | int]:
        self.saving.store(transaction, saves)
        claimed = [save for save in saves if save.claimant is not None]
        claims = dict(zip(map(id, claimed), self.saving.claimed(transaction, claimed), strict=True))
        return [claims.get(id(save), save.first_id) for save in saves]

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
                return self.saving.take(transaction, [work])[0]
            return self.recording.settle(transaction, work)

    def _save_alone(self, save: Save) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._database.write() as transaction:
                    known = self.saving.known(transaction, save)
                    return self._store(transaction, [save])[0] if known is None else known
            except StoreError:
                # Another process may have stored the same, or taken the same number, in that moment.
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("not reached")


def repeated(call: Callable[[], Result]) -> Result:
    """What ``call`` gives, called again when another transaction was in its way.

    :raises kser.errors.StoreUnavailable: it always is.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return call()
        except Repeat:
            pass
    return call()
