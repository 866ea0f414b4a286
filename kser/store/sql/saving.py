"""Batched inserts of new operations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select

from kser.errors import StoreError
from kser.store.rows import STALE, Claim, Claimant, NewOperation, OperationRow, Refusal, TaskRow
from kser.store.sql.adding import (
    Adding,
    adding_events,
    adding_labels,
    adding_operations,
    adding_tasks,
    event_row,
)
from kser.store.sql.claiming import Claiming, places
from kser.store.sql.database import Database, Transaction
from kser.store.sql.rows import OPERATION_COLUMNS, Ids, NewRows, count, operation_row, uuids_in


class Save:
    """A request to store an operation, and to claim it if ``claimant`` is given."""

    __slots__ = ("claimant", "first_id", "operation")

    def __init__(self, new: NewOperation, claimant: Claimant | None) -> None:
        self.operation = new
        self.claimant = claimant
        self.first_id = 0


class Saving:
    """The statements that store new operations.

    :param database: the database to write to.
    :param adding: the insert statements of this database.
    :param claiming: reads operations that are stored and claimed in the same transaction.
    :param ids: generates the ids of new operations.
    """

    def __init__(self, database: Database, adding: Adding, claiming: Claiming, ids: Ids) -> None:
        self._adding = adding
        self._claiming = claiming
        self._ids = ids
        if database.packed:
            self._at_once = database.statement(_at_once(database))

    def store(self, transaction: Transaction, saves: Sequence[Save]) -> list[Claim | int]:
        """Store operations that are not stored yet, and return the claim on each, or its id without a claim."""
        rows, events = self._rows(transaction, saves)
        self._adding.add(transaction, rows)
        transaction.change(self._adding.events, events)
        claimed = [save.first_id for save in saves if save.claimant is not None]
        return self._stored(transaction, saves, rows, self._claiming.rows_of(transaction, claimed))

    def fits_at_once(self, saves: Sequence[Save]) -> bool:
        """Return whether :meth:`store_at_once` can store the operations."""
        return all(count(save.operation) == 1 for save in saves)

    def store_at_once(self, transaction: Transaction, saves: Sequence[Save]) -> list[Claim | int]:
        """Store operations as :meth:`store` does, in one statement. None of them may have nested operations."""
        rows, events = self._rows(transaction, saves)
        parts = {"operations": rows.operations, "tasks": rows.tasks, "labels": rows.labels, "events": events}
        found = transaction.run(self._at_once, {name: json.dumps(part) for name, part in parts.items()}).fetchall()
        return self._stored(transaction, saves, rows, {row[0]: operation_row(row) for row in found})

    def known(self, transaction: Transaction, save: Save) -> Claim | Refusal | None:
        """Return the claim or refusal for an operation that is already stored; None when it is not stored.

        :raises kser.errors.StoreError: the uuid of a nested operation is already stored, or occurs twice.
        """
        for row in self._claiming.rows(transaction, [save.operation.uuid]):
            claimant = save.claimant
            if claimant is not None and row.token == claimant.token:
                return self._claiming.claims(transaction, [(row, claimant)], {})[0]
            return Refusal(STALE, row)
        inner = uuids_in(save.operation.tasks or ())
        taken = [row.uuid for row in self._claiming.rows(transaction, inner)]
        if taken or len(set(inner)) < len(inner):
            raise StoreError(f"these operation uuids are already stored or not unique: {', '.join(taken or inner)}")
        return None

    def _rows(self, transaction: Transaction, saves: Sequence[Save]) -> tuple[NewRows, list[dict[str, Any]]]:
        """Return the rows and the events to insert."""
        rows = NewRows()
        events = []
        for save in saves:
            new, claimant = save.operation, save.claimant
            save.first_id = self._ids.take(transaction.time, count(new))
            rows.add_root(new, save.first_id, claimant)
            events.append(event_row(save.first_id, "accepted", 0, None))
            if claimant is not None:
                events.append(event_row(save.first_id, "claimed", 1, claimant.owner))
        return rows, events

    def _stored(
        self, transaction: Transaction, saves: Sequence[Save], rows: NewRows, roots: dict[int, OperationRow]
    ) -> list[Claim | int]:
        claimed = [(roots[save.first_id], save.claimant) for save in saves if save.claimant is not None]
        turns = [place for root, _ in claimed for place in places([root])]
        by_place = {(row["operation_id"], row["position"]): row for row in rows.tasks} if turns else {}
        found = (by_place.get((turn["operation_id"], turn["position"])) for turn in turns)
        tasks = [TaskRow(*(row[name] for name in TaskRow._fields)) for row in found if row is not None]
        claims = {
            claim.id: claim for claim in self._claiming.claims(transaction, claimed, {row[:2]: row for row in tasks})
        }
        return [claims.get(save.first_id, save.first_id) for save in saves]


def _at_once(database: Database) -> Any:
    """Return a statement that inserts all rows of operations without nested ones and reads the operation rows."""
    made = adding_operations(database, "operations").returning(*OPERATION_COLUMNS).cte("made")
    tasked = adding_tasks(database, "tasks").cte("tasked")
    labelled = adding_labels(database, "labels").cte("labelled")
    noted = adding_events(database, "events").cte("noted")
    return select(*made.c).add_cte(tasked, labelled, noted)
