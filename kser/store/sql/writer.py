"""The writer that writes new operations, claims and checkpoints in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar, overload

from kser.errors import KserError, StoreError, StoreUnavailable
from kser.store.model import Checkpoint, Claim, ClaimRefused
from kser.store.sql.checkpoints import CheckpointWriter, RowCountMismatch
from kser.store.sql.claims import ClaimCommand, Claims
from kser.store.sql.database import CONFLICT_ATTEMPTS, Database, SerializationConflict
from kser.store.sql.group_commit import GroupCommit, PendingWrite
from kser.store.sql.ids import IdGenerator
from kser.store.sql.inserts import Inserts
from kser.store.sql.saves import OperationInserts, SaveRequest

Item = SaveRequest | ClaimCommand | Checkpoint
R = TypeVar("R")

#: Placeholder for the result of an entry that was not written with its batch. The writer then writes this entry in a
#: separate transaction.
NOT_WRITTEN: Final = object()


class Batch:
    """A batch of entries, with one dict of items for each kind of write.

    In a dict, the key of an item is the index of its entry in ``entries``.

    :param entries: the entries to write.
    """

    def __init__(self, entries: Sequence[PendingWrite[Item]]) -> None:
        self.count = len(entries)
        self.saves: dict[int, SaveRequest] = {}
        self.claims: dict[int, ClaimCommand] = {}
        self.checkpoints: dict[int, Checkpoint] = {}
        roots: set[int] = set()
        for index, entry in enumerate(entries):
            item = entry.item
            if isinstance(item, SaveRequest):
                self.saves[index] = item
            elif isinstance(item, ClaimCommand):
                self.claims[index] = item
            elif item.root_id not in roots:
                # A batch contains at most one checkpoint per root. The writer writes a second checkpoint of the same
                # root in a separate transaction.
                roots.add(item.root_id)
                self.checkpoints[index] = item


class BatchWriter:
    """The writer that all threads of a process share. The writer uses a group commit.

    :param database: the database to write to.
    """

    def __init__(self, database: Database) -> None:
        ids = IdGenerator()
        self.inserts = Inserts(database)
        self.claims = Claims(database, self.inserts)
        self.saves = OperationInserts(database, self.inserts, self.claims, ids)
        self.checkpoints = CheckpointWriter(database, self.inserts, ids)
        self._database = database
        kinds: tuple[type[Item], ...] = (SaveRequest, ClaimCommand, Checkpoint)
        shared: GroupCommit[Item] = GroupCommit(self._run, database.max_concurrent_writers)
        # In PostgreSQL, a batch is written by one statement, which is a transaction by itself. One statement can write
        # only one kind of item, so each kind has its own group commit. In SQLite, all kinds share one group commit.
        self._groups = {
            kind: GroupCommit(self._run, database.max_concurrent_writers) if database.json_batches else shared
            for kind in kinds
        }

    @overload
    def write(self, item: SaveRequest) -> Claim | ClaimRefused | int: ...

    @overload
    def write(self, item: ClaimCommand) -> Claim | ClaimRefused | None: ...

    @overload
    def write(self, item: Checkpoint) -> str: ...

    def write(self, item: Item) -> Any:
        """Write one item in a batch with the concurrent writes of other threads."""
        return self._groups[type(item)].write(item)

    def _run(self, entries: Sequence[PendingWrite[Item]]) -> None:
        results: list[Any] = [NOT_WRITTEN] * len(entries)
        outage: StoreUnavailable | None = None
        try:
            self._write_batch(entries, results)
        except StoreUnavailable as error:
            outage = error
        for entry, result in zip(entries, results, strict=True):
            if result is not NOT_WRITTEN:
                # This entry was committed before the database became unavailable, so its result is valid.
                entry.result = result
            elif outage is None:
                self._run_single(entry)
            else:
                # Each thread raises its own exception object, because one object in several threads would mix their
                # tracebacks.
                entry.error = type(outage)(outage.message)
                entry.error.__cause__ = outage.__cause__

    def _write_batch(self, entries: Sequence[PendingWrite[Item]], results: list[Any]) -> None:
        """Write entries in one statement, if this is possible, and then write the entries that are left in one
        transaction.

        If an entry can be written in neither way, its result stays ``NOT_WRITTEN``.
        """
        remaining, batch = list(range(len(entries))), Batch(entries)
        for write in (
            (self._in_one_statement, self._in_one_transaction)
            if self._fits_one_statement(batch)
            else (self._in_one_transaction,)
        ):
            with suppress(StoreError, RowCountMismatch):
                for index, result in zip(remaining, retry_on_conflict(partial(write, batch)), strict=True):
                    results[index] = result
            remaining = [index for index in remaining if results[index] is NOT_WRITTEN]
            if not remaining:
                break
            batch = Batch([entries[index] for index in remaining])

    def _fits_one_statement(self, batch: Batch) -> bool:
        """Return whether one statement can write the batch. In PostgreSQL, all entries of a batch are of one kind."""
        return (
            self._database.json_batches
            and self.claims.fits_one_statement(list(batch.claims.values()))
            and self.checkpoints.fits_one_statement(list(batch.checkpoints.values()))
            and self.saves.fits_one_statement(list(batch.saves.values()))
        )

    def _in_one_statement(self, batch: Batch) -> list[Any]:
        """Write a batch in one statement.

        If the statement does not grant a claim, the result of the claim is ``NOT_WRITTEN``. If the statement cannot
        write a checkpoint or a new operation, the whole statement fails and writes nothing.
        """
        pairs: list[tuple[int, Any]] = []
        with self._database.write(single=True) as transaction:
            if batch.checkpoints:
                statuses = self.checkpoints.record_in_one_statement(transaction, list(batch.checkpoints.values()))
                pairs += zip(batch.checkpoints, statuses, strict=True)
            if batch.claims:
                claims = self.claims.claim_in_one_statement(transaction, list(batch.claims.values()))
                pairs += zip(batch.claims, claims, strict=True)
            if batch.saves:
                saved = self.saves.store_in_one_statement(transaction, list(batch.saves.values()))
                pairs += zip(batch.saves, saved, strict=True)
        results = {index: result for index, result in pairs if result is not None}
        return [results.get(index, NOT_WRITTEN) for index in range(batch.count)]

    def _in_one_transaction(self, batch: Batch) -> list[Any]:
        """Write a batch in one transaction. If an entry does not match the stored rows, no entry is written."""
        results: dict[int, Any] = {}
        with self._database.write() as transaction:
            if batch.checkpoints:
                statuses = self.checkpoints.record(transaction, list(batch.checkpoints.values()))
                results.update(zip(batch.checkpoints, statuses, strict=True))
            if batch.claims:
                claims = self.claims.claim(transaction, list(batch.claims.values()))
                results.update(zip(batch.claims, claims, strict=True))
            if batch.saves:
                saved = self.saves.store(transaction, list(batch.saves.values()))
                results.update(zip(batch.saves, saved, strict=True))
        return [results.get(index, NOT_WRITTEN) for index in range(batch.count)]

    def _run_single(self, entry: PendingWrite[Item]) -> None:
        try:
            entry.result = retry_on_conflict(lambda: self._single(entry.item))
        except KserError as error:
            entry.error = error

    def _single(self, item: Item) -> Any:
        if isinstance(item, SaveRequest):
            return self._save_single(item)
        with self._database.write() as transaction:
            if isinstance(item, ClaimCommand):
                return self.claims.claim(transaction, [item])[0]
            return self.checkpoints.resolve_mismatch(transaction, item)

    def _save_single(self, save: SaveRequest) -> Any:
        for attempt in range(1, CONFLICT_ATTEMPTS + 1):
            try:
                with self._database.write() as transaction:
                    known = self.saves.known(transaction, save)
                    return self.saves.store(transaction, [save])[0] if known is None else known
            except StoreError:
                # Another process may have stored the same operation, or an operation with the same id, between the
                # check and the insert. The next try finds the stored operation, or uses another id.
                if attempt == CONFLICT_ATTEMPTS:
                    raise
        raise AssertionError("not reached")


def retry_on_conflict(call: Callable[[], R]) -> R:
    """Call ``call`` and return its result. After a conflict with another transaction, repeat the call.

    :raises kser.errors.StoreUnavailable: every try ended with a conflict.
    """
    for _ in range(CONFLICT_ATTEMPTS - 1):
        try:
            return call()
        except SerializationConflict:
            pass
    return call()
