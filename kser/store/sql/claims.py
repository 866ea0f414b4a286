"""The statements that claim roots in batches, and that read the claimed operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import BigInteger, Double, Integer, Text, and_, case, insert, literal, literal_column, or_, select

from kser import status as states
from kser.store.model import Claim, ClaimRefused, ClaimRequest, Mode, OperationRow, Phase, RefusalReason, TaskRow
from kser.store.sql.database import Database, Transaction
from kser.store.sql.inserts import Inserts, event_row
from kser.store.sql.schedule import is_claimable, lease_values
from kser.store.sql.statements import ONE, ZERO, types_of
from kser.store.sql.tables import (
    OPERATION_COLUMNS,
    TASK_COLUMNS,
    event,
    operation,
    operation_row,
    short_columns,
    task,
)
from kser.store.transitions import claim_refusal

#: Tasks, keyed by operation id and position.
Tasks = dict[tuple[int, int], TaskRow]
_OPERATION = slice(len(OPERATION_COLUMNS))
_CURRENT = slice(len(OPERATION_COLUMNS), len(OPERATION_COLUMNS) + len(TASK_COLUMNS))
_NEXT = slice(len(OPERATION_COLUMNS) + len(TASK_COLUMNS), None)


class ClaimCommand:
    """The arguments of one call of :meth:`kser.store.base.Store.claim`."""

    __slots__ = ("request", "step", "uuid")

    def __init__(self, uuid: str, step: str, request: ClaimRequest) -> None:
        self.uuid = uuid
        self.step = step
        self.request = request


class Claims:
    """The statements that claim roots.

    :param database: the database to write to.
    :param inserts: the insert statements of this database.
    """

    def __init__(self, database: Database, inserts: Inserts) -> None:
        self._database = database
        self._inserts = inserts
        claim = _claim_statement(database)
        own = operation.c
        self._claim = database.statement(claim.returning(own.id, own.epoch, own.owner, own.token))
        if database.json_batches:
            self._single_statement = database.statement(_single_statement(database))
        self._by_uuid = self._prepare_read({"uuid": Text()}, operation.c.uuid)
        self._by_id = self._prepare_read({"id": operation.c.id.type}, operation.c.id)
        row = database.source(types_of(task, "operation_id", "position"))
        at_position = and_(task.c.operation_id == row["operation_id"], task.c.position == row["position"])
        self._tasks = database.statement(row.select(TASK_COLUMNS, task, at_position))

    def _prepare_read(self, types: Mapping[str, Any], key: Any) -> Any:
        row = self._database.source(types)
        return self._database.statement(
            row.select((*OPERATION_COLUMNS, self._database.now), operation, key == row[key.name])
        )

    def claim(self, transaction: Transaction, commands: Sequence[ClaimCommand]) -> list[Claim | ClaimRefused | None]:
        """Claim roots, each independently of the others, and return the result for each command."""
        granted = transaction.fetch(self._claim, _claim_rows(commands))
        events = list(_events(granted, commands))
        transaction.execute_many(self._inserts.events, events)
        rows = {
            row[1]: row for row in transaction.fetch(self._by_uuid, [{"uuid": command.uuid} for command in commands])
        }
        results: dict[int, Claim | ClaimRefused | None] = {}
        own: list[tuple[int, OperationRow, ClaimRequest]] = []
        for index, command in enumerate(commands):
            raw = rows.get(command.uuid)
            if raw is None:
                results[index] = None
                continue
            row = operation_row(raw)
            if row.parent_id is not None:
                results[index] = None
            elif row.token == command.request.token:
                own.append((index, row, command.request))
            else:
                # The claim statement did not grant this claim. If no rule refuses the claim any more, the root has
                # changed since that statement: another owner has released it. So return HELD; a later claim can
                # succeed.
                reason = claim_refusal(row, command.step, command.request, raw[-1]) or RefusalReason.HELD
                results[index] = ClaimRefused(reason, row)
        claims = self.claims(transaction, [(row, request) for _, row, request in own], {})
        results.update(zip((index for index, _, _ in own), claims, strict=True))
        return [results[index] for index in range(len(commands))]

    @staticmethod
    def fits_one_statement(commands: Sequence[ClaimCommand]) -> bool:
        """Return whether :meth:`claim_in_one_statement` writes all events of the claims: not those of takeovers."""
        return all(command.request.taken_over is None for command in commands)

    def claim_in_one_statement(self, transaction: Transaction, commands: Sequence[ClaimCommand]) -> list[Claim | None]:
        """Claim roots like :meth:`claim`, but in one statement that also reads the current tasks of the roots.

        :return: for each command, the claim, or None if this statement did not claim the root.
        """
        roots: dict[str, OperationRow] = {}
        tasks: Tasks = {}
        for raw in transaction.fetch(self._single_statement, _claim_rows(commands)):
            row = operation_row(raw[_OPERATION])
            roots[row.token or ""] = row
            for part in (raw[_CURRENT], raw[_NEXT]):
                if part[0] is not None:
                    tasks[part[0], part[1]] = TaskRow(*part)
        granted = [command for command in commands if command.request.token in roots]
        claims = {
            claim.root.token: claim
            for claim in self.claims(
                transaction, [(roots[command.request.token], command.request) for command in granted], tasks
            )
        }
        return [claims.get(command.request.token) for command in commands]

    def rows(self, transaction: Transaction, uuids: Sequence[str]) -> list[OperationRow]:
        """Return the rows of the stored operations with these uuids."""
        return [operation_row(row) for row in transaction.fetch(self._by_uuid, [{"uuid": uuid} for uuid in uuids])]

    def rows_of(self, transaction: Transaction, ids: Sequence[int]) -> dict[int, OperationRow]:
        """Return the rows of operations, keyed by id."""
        return {
            row[0]: operation_row(row)
            for row in transaction.fetch(self._by_id, [{"id": operation_id} for operation_id in ids])
        }

    def claims(
        self, transaction: Transaction, roots: Sequence[tuple[OperationRow, ClaimRequest | None]], tasks: Tasks
    ) -> list[Claim]:
        """Return a claim for each claimed root, with the path from the root down to its current operation.

        :param tasks: tasks that have already been read. The method reads the missing tasks and adds these to this dict.
        """
        paths = [[root] for root, _ in roots]
        deeper = paths
        while deeper := [path for path in deeper if path[-1].phase == Phase.RUN_TASK]:
            missing = [path for path in deeper if (path[-1].id, path[-1].step) not in tasks]
            wanted = [position for path in missing for position in positions(path)]
            tasks.update(((row[0], row[1]), TaskRow(*row)) for row in transaction.fetch(self._tasks, wanted))
            children = {path[-1].id: tasks[path[-1].id, path[-1].step].child_id for path in deeper}
            deeper = [path for path in deeper if children[path[-1].id] is not None]
            rows = self.rows_of(transaction, [children[path[-1].id] or 0 for path in deeper])
            for path in deeper:
                path.append(rows[children[path[-1].id] or 0])
        return [_claim(path, tasks, request) for path, (_, request) in zip(paths, roots, strict=True)]


#: The values of a claim, with their types.
_CLAIM_VALUES: Final[Mapping[str, Any]] = {
    **{name: Text() for name in ("uuid", "step", "topic", "owner", "token")},
    "epoch": BigInteger(),
    "expired": Integer(),
    "lease": Double(),
}


def _claim_statement(database: Database) -> Any:
    """Return the statement that claims roots."""
    now = database.now
    row = database.source(_CLAIM_VALUES)
    claim_count = operation.c.claim_count + ONE
    return row.update(
        operation,
        {
            "status": states.RUNNING,
            "epoch": operation.c.epoch + 1,
            "token": row["token"],
            "claim_count": claim_count,
            **lease_values(now, row["owner"], row["lease"], claim_count),
            "send_count": ZERO,
            "sent_at": None,
            "refusal_count": ZERO,
            "refused_since": None,
            "started_at": case((operation.c.started_at.is_(None), now), else_=operation.c.started_at),
        },
        operation.c.uuid == row["uuid"],
        operation.c.parent_id.is_(None),
        or_(operation.c.status == states.PENDING, operation.c.status == states.RUNNING),
        operation.c.target_uuid == row["step"],
        or_(row["topic"].is_(None), operation.c.target_topic == row["topic"]),
        or_(row["epoch"].is_(None), operation.c.epoch == row["epoch"]),
        is_claimable(now, row["expired"]),
        operation.c.due_at <= now,
        # If the root has the token of the request, an earlier call with the same request has already claimed the root.
        or_(operation.c.token.is_(None), operation.c.token != row["token"]),
    )


def _single_statement(database: Database) -> Any:
    """Return one statement that claims roots, inserts the events of the claims, and reads each root with its tasks.

    For each root, the statement reads the current task; for a distributed root, also the task after the current task.
    """
    claimed = _claim_statement(database).returning(*short_columns(*_CLAIM_VALUES)).cte("claimed")
    names = ("root_id", "at", "kind", "epoch", "consumer")
    values = select(claimed.c.id, database.now, literal("claimed", Text), claimed.c.epoch, claimed.c.owner)
    events = insert(event).from_select(list(names), values).cte("inserted_events")
    # If this statement waits for a row lock, PostgreSQL then reads only the locked rows again. PostgreSQL reads all
    # other rows from its snapshot at the start of the statement. If the operation advanced during the wait, the tasks
    # of the snapshot are outdated. So the join returns a task only if the snapshot contains the row of the operation as
    # it was directly before the claim: with the same step and phase, and with the epoch before the claim. Otherwise, a
    # later statement reads the tasks.
    stored, current, following = operation.alias("stored"), task.alias("current"), task.alias("following")
    unchanged = and_(
        stored.c.id == claimed.c.id,
        stored.c.epoch == claimed.c.epoch - 1,
        stored.c.step == claimed.c.step,
        stored.c.phase == claimed.c.phase,
        stored.c.phase == Phase.RUN_TASK,
    )
    has_task = and_(current.c.operation_id == stored.c.id, current.c.position == stored.c.step)
    follows = and_(
        current.c.operation_id.is_not(None),
        claimed.c.mode == Mode.DISTRIBUTED,
        following.c.operation_id == claimed.c.id,
        following.c.position == claimed.c.step + 1,
    )
    columns = [rows.c[name] for rows in (current, following) for name in TaskRow._fields]
    joined = claimed.outerjoin(stored, unchanged).outerjoin(current, has_task).outerjoin(following, follows)
    return select(literal_column("claimed.*"), *columns).select_from(joined).add_cte(events)


def positions(path: Sequence[OperationRow]) -> list[dict[str, int]]:
    """Return the positions of the tasks to read for the current operation, which is the last operation in ``path``."""
    last = path[-1]
    steps = (last.step, last.step + 1) if path[0].mode == Mode.DISTRIBUTED else (last.step,)
    return [{"operation_id": last.id, "position": step} for step in steps]


def _claim(
    path: Sequence[OperationRow], tasks: Mapping[tuple[int, int], TaskRow], request: ClaimRequest | None
) -> Claim:
    root, last = path[0], path[-1]
    is_task = last.phase == Phase.RUN_TASK
    return Claim(
        root.id,
        root.epoch,
        tuple(path),
        tasks[last.id, last.step] if is_task else None,
        tasks.get((last.id, last.step + 1)) if is_task else None,
        exhausted=request is not None and root.claim_count > request.max_claims,
    )


def _events(granted: Sequence[Any], commands: Sequence[ClaimCommand]) -> Iterator[dict[str, Any]]:
    """Return the rows of the events of granted claims."""
    reasons = {command.request.token: command.request.taken_over for command in commands}
    for root_id, epoch, owner, token in granted:
        if reasons[token] is not None:
            yield event_row(root_id, "taken-over", epoch - 1, owner, text=reasons[token])
        yield event_row(root_id, "claimed", epoch, owner)


def _claim_rows(commands: Sequence[ClaimCommand]) -> list[dict[str, Any]]:
    # Sort the rows, because all transactions must lock rows in the same order; otherwise two transactions could
    # deadlock.
    return [_claim_row(command) for command in sorted(commands, key=lambda command: command.uuid)]


def _claim_row(command: ClaimCommand) -> dict[str, Any]:
    request = command.request
    return {
        "uuid": command.uuid,
        "step": command.step,
        "topic": request.topic,
        "epoch": request.epoch,
        "expired": int(request.expired),
        "owner": request.owner,
        "token": request.token,
        "lease": request.lease,
    }
