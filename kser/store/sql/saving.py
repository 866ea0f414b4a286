"""Storing and claiming, for many at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Double, Integer, Text, and_, case, literal, or_

from kser import status as states
from kser.errors import StoreError
from kser.store.rows import (
    DISTRIBUTED,
    ENDED,
    HELD,
    STALE,
    TASK,
    WAITING,
    Claim,
    Claimant,
    NewOperation,
    OperationRow,
    Refusal,
    TaskRow,
)
from kser.store.sql.database import Database, Transaction
from kser.store.sql.rows import OPERATION_COLUMNS, TASK_COLUMNS, Ids, NewRows, count, operation_row, uuids_in
from kser.store.sql.statements import ROWS, types_of
from kser.store.sql.tables import event, label, operation, task

#: What a row of a new operation has beside values of columns.
_WAIT: Final = {"wait": Double(), "started": Integer()}

#: Columns that are the same in every new row.
_BLANK: Final[Mapping[str, Any]] = {"cancel_requested": False, "sends": 0}


class Adding:
    """Statements that add rows."""

    def __init__(self, database: Database) -> None:
        now = database.now
        types = types_of(operation)
        for name in (*_BLANK, "started_at", "ended_at", "wake_at", "due_at", "sent_at", "result", "cancel_reason"):
            del types[name]
        row = database.source({**types, **_WAIT})
        values = {name: row[name] for name in types}
        values |= {name: literal(value) for name, value in _BLANK.items()}
        values |= {
            "started_at": case((row["started"] == 1, now), else_=None),
            "wake_at": now + row["wait"],
            "due_at": now,
        }
        self.operations = database.statement(row.insert(operation, values))
        self.tasks = database.statement(_whole(database, task))
        self.labels = database.statement(_whole(database, label))
        self.events = database.statement(adding_events(database))

    def add(self, transaction: Transaction, rows: NewRows) -> None:
        """Add operations, their tasks and labels."""
        transaction.change(self.operations, rows.operations)
        transaction.change(self.tasks, rows.tasks)
        transaction.change(self.labels, rows.labels)


def adding_events(database: Database, rows: str = ROWS) -> Any:
    """A statement that adds events."""
    types = types_of(event, "root_id", "kind", "epoch", "consumer", "uuid", "text")
    row = database.source(types, rows)
    return row.insert(event, {**{name: row[name] for name in types}, "at": database.now})


def _whole(database: Database, table: Any) -> Any:
    types = types_of(table)
    row = database.source(types)
    return row.insert(table, {name: row[name] for name in types})


def event_row(
    root_id: int, kind: str, epoch: int, consumer: str | None, *, uuid: str | None = None, text: str | None = None
) -> dict[str, Any]:
    """An event to add."""
    return {
        "root_id": root_id,
        "kind": kind,
        "epoch": epoch,
        "consumer": consumer,
        "uuid": uuid,
        "text": storable(text),
    }


def storable(text: str | None) -> str | None:
    """A text that people wrote or that an exception has, without what a database does not take."""
    if text is None:
        return None
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


class Save:
    """An operation to store."""

    __slots__ = ("claimant", "first_id", "operation")

    def __init__(self, new: NewOperation, claimant: Claimant | None) -> None:
        self.operation = new
        self.claimant = claimant
        self.first_id = 0


class Take:
    """A root to claim."""

    __slots__ = ("claimant", "step", "uuid")

    def __init__(self, uuid: str, step: str, claimant: Claimant) -> None:
        self.uuid = uuid
        self.step = step
        self.claimant = claimant


class Saving:
    """Stores and claims.

    :param database: where.
    :param adding: its statements that add rows.
    :param ids: for new operations.
    """

    def __init__(self, database: Database, adding: Adding, ids: Ids) -> None:
        self._database = database
        self._adding = adding
        self._ids = ids
        now = database.now
        row = database.source({name: Text() for name in ("uuid", "step", "owner", "token")} | {"lease": Double()})
        claim = row.update(
            operation,
            {
                "status": states.RUNNING,
                "epoch": operation.c.epoch + 1,
                "owner": row["owner"],
                "token": row["token"],
                "claims": operation.c.claims + 1,
                "wake_at": now + row["lease"],
                "started_at": case((operation.c.started_at.is_(None), now), else_=operation.c.started_at),
            },
            operation.c.uuid == row["uuid"],
            operation.c.parent_id.is_(None),
            or_(operation.c.status == states.PENDING, operation.c.status == states.RUNNING),
            operation.c.target_uuid == row["step"],
            or_(operation.c.owner.is_(None), operation.c.wake_at <= now),
            operation.c.due_at <= now,
            # A claim that is repeated has been made already.
            or_(operation.c.token.is_(None), operation.c.token != row["token"]),
        )
        self._claim = database.statement(claim.returning(operation.c.id, operation.c.epoch, operation.c.owner))
        self._by_uuid = self._reading({"uuid": Text()}, operation.c.uuid)
        self._by_id = self._reading({"id": operation.c.id.type}, operation.c.id)
        row = database.source(types_of(task, "operation_id", "position"))
        place = and_(task.c.operation_id == row["operation_id"], task.c.position == row["position"])
        self._tasks = database.statement(row.select(TASK_COLUMNS, task, place))

    def _reading(self, types: Mapping[str, Any], key: Any) -> Any:
        row = self._database.source(types)
        return self._database.statement(
            row.select((*OPERATION_COLUMNS, self._database.now), operation, key == row[key.name])
        )

    # -- storing -------------------------------------------------------------------------------------------------------

    def store(self, transaction: Transaction, saves: Sequence[Save]) -> None:
        """Store operations, which must not be there yet."""
        rows = NewRows()
        events = []
        for save in saves:
            new, claimant = save.operation, save.claimant
            save.first_id = self._ids.take(transaction.time, count(new))
            rows.add_root(new, save.first_id, claimant)
            events.append(event_row(save.first_id, "accepted", 0, None))
            if claimant is not None:
                events.append(event_row(save.first_id, "claimed", 1, claimant.owner))
        self._adding.add(transaction, rows)
        transaction.change(self._adding.events, events)

    def known(self, transaction: Transaction, save: Save) -> Claim | Refusal | None:
        """What to answer if its uuid is there already; None when it is not.

        :raises kser.errors.StoreError: a uuid of an operation in it is there.
        """
        row = self.row(transaction, save.operation.uuid)
        if row is not None:
            claimant = save.claimant
            if claimant is not None and row.token == claimant.token:
                return self._claims(transaction, [(row, claimant)])[0]
            return Refusal(STALE, row)
        inner = uuids_in(save.operation.tasks or ())
        taken = [found[1] for found in transaction.fetch(self._by_uuid, [{"uuid": uuid} for uuid in inner])]
        if taken or len(set(inner)) < len(inner):
            raise StoreError(f"operations with these uuids are stored already, or twice: {', '.join(taken or inner)}")
        return None

    def row(self, transaction: Transaction, uuid: str) -> OperationRow | None:
        """The row of an operation."""
        found = transaction.fetch(self._by_uuid, [{"uuid": uuid}])
        return operation_row(found[0]) if found else None

    # -- claiming ------------------------------------------------------------------------------------------------------

    def take(self, transaction: Transaction, takes: Sequence[Take]) -> list[Claim | Refusal | None]:
        """Claim roots, each for itself."""
        # Always in one order: else two transactions could wait for each other.
        wanted = sorted(takes, key=lambda take: take.uuid)
        made = transaction.fetch(self._claim, [_claim_row(take) for take in wanted])
        events = [event_row(root_id, "claimed", epoch, owner) for root_id, epoch, owner in made]
        transaction.change(self._adding.events, events)
        found = {row[1]: row for row in transaction.fetch(self._by_uuid, [{"uuid": take.uuid} for take in wanted])}
        answers: dict[int, Claim | Refusal | None] = {}
        mine: list[tuple[int, OperationRow, Claimant]] = []
        for index, take in enumerate(takes):
            raw = found.get(take.uuid)
            if raw is None:
                answers[index] = None
                continue
            row = operation_row(raw)
            if row.parent_id is not None:
                answers[index] = None
            elif row.token == take.claimant.token:
                mine.append((index, row, take.claimant))
            else:
                answers[index] = Refusal(_reason(row, take.step, raw[-1]), row)
        claims = self._claims(transaction, [(row, claimant) for _, row, claimant in mine])
        answers.update(zip((index for index, _, _ in mine), claims, strict=True))
        return [answers[index] for index in range(len(takes))]

    def claimed(self, transaction: Transaction, saves: Sequence[Save]) -> list[Claim]:
        """The claims on operations that were stored in this transaction."""
        rows = transaction.fetch(self._by_id, [{"id": save.first_id} for save in saves])
        found = {row[0]: operation_row(row) for row in rows}
        return self._claims(transaction, [(found[save.first_id], save.claimant) for save in saves])

    def _claims(self, transaction: Transaction, roots: Sequence[tuple[OperationRow, Claimant | None]]) -> list[Claim]:
        """What is claimed, down to the task whose turn it is."""
        paths = [[root] for root, _ in roots]
        tasks: dict[tuple[int, int], TaskRow] = {}
        deeper = paths
        while deeper := [path for path in deeper if path[-1].phase == TASK]:
            wanted = [place for path in deeper for place in _places(path)]
            tasks.update(((row[0], row[1]), TaskRow(*row)) for row in transaction.fetch(self._tasks, wanted))
            children = {path[-1].id: tasks[path[-1].id, path[-1].step].child_id for path in deeper}
            deeper = [path for path in deeper if children[path[-1].id] is not None]
            found = transaction.fetch(self._by_id, [{"id": children[path[-1].id]} for path in deeper])
            rows = {row[0]: operation_row(row) for row in found}
            for path in deeper:
                path.append(rows[children[path[-1].id] or 0])
        return [_claim(path, tasks, claimant) for path, (_, claimant) in zip(paths, roots, strict=True)]


def _places(path: Sequence[OperationRow]) -> list[dict[str, int]]:
    """Which tasks to read for the operation whose turn it is."""
    last = path[-1]
    steps = (last.step, last.step + 1) if path[0].mode == DISTRIBUTED else (last.step,)
    return [{"operation_id": last.id, "position": step} for step in steps]


def _claim(path: Sequence[OperationRow], tasks: Mapping[tuple[int, int], TaskRow], claimant: Claimant | None) -> Claim:
    root, last = path[0], path[-1]
    is_task = last.phase == TASK
    return Claim(
        root.id,
        root.epoch,
        tuple(path),
        tasks[last.id, last.step] if is_task else None,
        tasks.get((last.id, last.step + 1)) if is_task else None,
        exhausted=claimant is not None and root.claims > claimant.max_claims,
    )


def _claim_row(take: Take) -> dict[str, Any]:
    claimant = take.claimant
    return {
        "uuid": take.uuid,
        "step": take.step,
        "owner": claimant.owner,
        "token": claimant.token,
        "lease": claimant.lease,
    }


def _reason(row: OperationRow, step: str, now: float) -> str:
    """Why a root could not be claimed."""
    if states.is_final(row.status):
        return ENDED
    if row.target.uuid != step:
        return STALE
    held = row.owner is not None and row.wake_at is not None and row.wake_at > now
    # Nothing else is left; or it was free only now, and the next one gets it.
    return WAITING if not held and row.due_at > now else HELD
