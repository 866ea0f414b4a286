"""The statements that store new operations in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import literal_column, select

from kser.errors import StoreError
from kser.store.model import Claim, ClaimRefused, ClaimRequest, NewOperation, OperationRow, RefusalReason, TaskRow
from kser.store.sql.claims import Claims, positions
from kser.store.sql.database import Database, Transaction
from kser.store.sql.ids import IdGenerator
from kser.store.sql.inserts import (
    InsertRows,
    Inserts,
    count,
    event_row,
    insert_events,
    insert_labels,
    insert_operations,
    insert_tasks,
    uuids_in,
)
from kser.store.sql.tables import operation_row, short_columns


class SaveRequest:
    """A request to store an operation, and to claim it if ``request`` is given."""

    __slots__ = ("first_id", "operation", "request")

    def __init__(self, new: NewOperation, request: ClaimRequest | None) -> None:
        self.operation = new
        self.request = request
        self.first_id = 0


class OperationInserts:
    """The statements that store new operations.

    :param database: the database to write to.
    :param inserts: the insert statements of this database.
    :param claims: statements that read the operations that the same transaction has stored and claimed.
    :param ids: generator of the ids of new operations.
    """

    def __init__(self, database: Database, inserts: Inserts, claims: Claims, ids: IdGenerator) -> None:
        self._inserts = inserts
        self._claims = claims
        self._ids = ids
        if database.json_batches:
            self._single_statement = database.statement(_single_statement(database))

    def store(self, transaction: Transaction, saves: Sequence[SaveRequest]) -> list[Claim | int]:
        """Store operations that are not stored yet.

        :return: for each operation, the claim, or the id of the operation if no claim was requested.
        """
        rows, events = self._rows(transaction, saves)
        self._inserts.insert(transaction, rows)
        transaction.execute_many(self._inserts.events, events)
        claimed = [save.first_id for save in saves if save.request is not None]
        return self._stored(transaction, saves, rows, self._claims.rows_of(transaction, claimed))

    def fits_one_statement(self, saves: Sequence[SaveRequest]) -> bool:
        """Return whether :meth:`store_in_one_statement` can store the operations.

        This is the case if none of the operations has nested operations.
        """
        return all(count(save.operation) == 1 for save in saves)

    def store_in_one_statement(self, transaction: Transaction, saves: Sequence[SaveRequest]) -> list[Claim | int]:
        """Store operations in one statement, with the same effect as :meth:`store`.

        None of the operations may have nested operations.
        """
        rows, events = self._rows(transaction, saves)
        parts = {"operations": rows.operations, "tasks": rows.tasks, "labels": rows.labels, "events": events}
        cursor = transaction.execute(self._single_statement, {name: json.dumps(part) for name, part in parts.items()})
        roots = [operation_row(row) for row in cursor.fetchall()]
        return self._stored(transaction, saves, rows, {root.id: root for root in roots})

    def known(self, transaction: Transaction, save: SaveRequest) -> Claim | ClaimRefused | None:
        """Return the claim or the refusal for an operation that is already stored, or None for a new operation.

        The method returns the claim if an earlier call with the same request has stored the operation.

        :raises kser.errors.StoreError: the uuid of a nested operation is already stored, or occurs twice.
        """
        for row in self._claims.rows(transaction, [save.operation.uuid]):
            request = save.request
            if request is not None and row.token == request.token:
                return self._claims.claims(transaction, [(row, request)], {})[0]
            return ClaimRefused(RefusalReason.STALE, row)
        uuids = uuids_in(save.operation.tasks or ())
        taken = [row.uuid for row in self._claims.rows(transaction, uuids)]
        if taken or len(set(uuids)) < len(uuids):
            raise StoreError(f"these operation uuids are already stored or not unique: {', '.join(taken or uuids)}")
        return None

    def _rows(self, transaction: Transaction, saves: Sequence[SaveRequest]) -> tuple[InsertRows, list[dict[str, Any]]]:
        """Return the row values of new operations, and the row values of their events."""
        rows = InsertRows()
        events = []
        for save in saves:
            new, request = save.operation, save.request
            save.first_id = self._ids.next_ids(transaction.time, count(new))
            rows.add_root(new, save.first_id, request)
            events.append(event_row(save.first_id, "accepted", 0, None))
            if request is not None:
                events.append(event_row(save.first_id, "claimed", 1, request.owner))
        return rows, events

    def _stored(
        self, transaction: Transaction, saves: Sequence[SaveRequest], rows: InsertRows, roots: dict[int, OperationRow]
    ) -> list[Claim | int]:
        claimed = [(roots[save.first_id], save.request) for save in saves if save.request is not None]
        wanted = [position for root, _ in claimed for position in positions([root])]
        rows_by_position = {(row["operation_id"], row["position"]): row for row in rows.tasks} if wanted else {}
        new_rows = (rows_by_position.get((position["operation_id"], position["position"])) for position in wanted)
        tasks = [TaskRow(*(row[name] for name in TaskRow._fields)) for row in new_rows if row is not None]
        by_position = {(task.operation_id, task.position): task for task in tasks}
        claims = {claim.id: claim for claim in self._claims.claims(transaction, claimed, by_position)}
        return [claims.get(save.first_id, save.first_id) for save in saves]


def _single_statement(database: Database) -> Any:
    """Return one statement that inserts operations without nested operations, and that returns the operation rows."""
    operations = insert_operations(database, "operations").returning(*short_columns()).cte("inserted_operations")
    tasks = insert_tasks(database, "tasks").cte("inserted_tasks")
    labels = insert_labels(database, "labels").cte("inserted_labels")
    events = insert_events(database, "events").cte("inserted_events")
    return select(literal_column("*")).select_from(operations).add_cte(tasks, labels, events)
