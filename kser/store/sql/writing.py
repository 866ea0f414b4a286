"""What workers write, in groups: operations to store, claims, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.base import Checkpoint, Claim
from kser.store.sql.checkpoints import Recording, Uneven
from kser.store.sql.database import ATTEMPTS, Database, Repeat, Transaction
from kser.store.sql.group import Entry, Group
from kser.store.sql.rows import Ids
from kser.store.sql.saving import Adding, Save, Saving, Take

Work = Save | Take | Checkpoint
Result = TypeVar("Result")

#: Stands for a result that a group could not give: its entry is written alone.
ALONE: Final = object()


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
            results = repeated(lambda: self._together(entries))
        except StoreUnavailable as error:
            for entry in entries:
                # Each thread raises its own.
                entry.error = type(error)(error.message)
                entry.error.__cause__ = error.__cause__
            return
        except (StoreError, Uneven):
            results = [ALONE] * len(entries)
        for entry, result in zip(entries, results, strict=True):
            if result is ALONE:
                self._run_alone(entry)
            else:
                entry.result = result

    def _together(self, entries: Sequence[Entry[Work]]) -> list[Any]:
        """Write entries in one transaction; what does not fit is left out."""
        results: list[Any] = [ALONE] * len(entries)
        saves: list[tuple[int, Save]] = []
        takes: list[tuple[int, Take]] = []
        # Of two for one root the second is written alone.
        checkpoints: dict[int, tuple[int, Checkpoint]] = {}
        for index, entry in enumerate(entries):
            work = entry.item
            if isinstance(work, Checkpoint):
                checkpoints.setdefault(work.root_id, (index, work))
            elif isinstance(work, Take):
                takes.append((index, work))
            else:
                saves.append((index, work))
        with self._database.write() as transaction:
            if checkpoints:
                statuses = self.recording.record(transaction, [found for _, found in checkpoints.values()])
                for (index, _), status in zip(checkpoints.values(), statuses, strict=True):
                    results[index] = ALONE if status is None else status
            if takes:
                claims = self.saving.take(transaction, [found for _, found in takes])
                for (index, _), claim in zip(takes, claims, strict=True):
                    results[index] = claim
            if saves:
                for (index, _), saved in zip(saves, self._store(transaction, saves), strict=True):
                    results[index] = saved
        return results

    def _store(self, transaction: Transaction, saves: Sequence[tuple[int, Save]]) -> list[Claim | None]:
        self.saving.store(transaction, [save for _, save in saves])
        claimed = [save for _, save in saves if save.claimant is not None]
        claims = dict(zip(map(id, claimed), self.saving.claimed(transaction, claimed), strict=True))
        return [claims.get(id(save)) for _, save in saves]

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
                    return self._store(transaction, [(0, save)])[0] if known is None else known
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
