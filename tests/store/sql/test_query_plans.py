"""Tests of query plans: no query scans a whole table."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from kser import status as states
from kser.store.model import OperationQuery
from kser.store.sql import SQLStore
from kser.store.sql.database import Transaction
from kser.store.sql.tables import operation
from tests.postgres import Database
from tests.store.harness import (
    claim_root,
    ending_checkpoint,
    new_operation,
    new_task,
    reserve,
    resume_stored,
    save_and_claim,
    step_checkpoint,
    update_of,
)
from tests.store.sql.conftest import ClockOffset
from tests.support import wait_until

FILTERS = [
    OperationQuery(),
    OperationQuery(status=["FAILED"]),
    OperationQuery(status=["FAILED", "RUNNING"]),
    OperationQuery(entrypoint="shop.PlaceOrder"),
    OperationQuery(entrypoint="shop.PlaceOrder", status=["FAILED"]),
    OperationQuery(since=1.7e9),
    OperationQuery(since=1.7e9, until=1.9e9, status=["SUCCESS"]),
    OperationQuery(labels=[("customer", "7")]),
    OperationQuery(labels=[("customer", "7"), ("shop", "1")], status=["FAILED"]),
    OperationQuery(parent="parent-uuid"),
    OperationQuery(parent="parent-uuid", status=["FAILED"], entrypoint="x"),
]


def _plans(store: SQLStore, call: Callable[[], Any]) -> list[str]:
    """Return the query plans of the statements that ``call`` executes."""
    plans: list[str] = []
    database = store._database
    explain_sql = "EXPLAIN" if database.json_batches else "EXPLAIN QUERY PLAN"
    execute = Transaction.execute

    def explain(transaction: Transaction, statement: Any, values: Any) -> None:
        cursor = transaction._cursor
        cursor.execute(f"{explain_sql} {statement.sql}", {**statement.constants, "clock": transaction._clock, **values})
        # The text of the plan is the last column in SQLite, and the only one in PostgreSQL.
        plans.append("\n".join(str(text) for *_, text in cursor.fetchall()))

    def explain_and_execute(self: Transaction, statement: Any, values: Any = None, **options: Any) -> Any:
        explain(self, statement, values or {})
        return execute(self, statement, values, **options)

    def explained_batch(method: Callable[..., Any]) -> Callable[..., Any]:
        def explain_and_call(self: Transaction, statement: Any, rows: Any, **values: Any) -> Any:
            if rows:
                explain(self, statement, {**values, **({"rows": "[]"} if database.json_batches else rows[0])})
            return method(self, statement, rows, **values)

        return explain_and_call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "execute", explain_and_execute)
        patch.setattr(Transaction, "fetch", explained_batch(Transaction.fetch))
        patch.setattr(Transaction, "execute_many", explained_batch(Transaction.execute_many))
        call()
    assert plans
    return plans


#: A scan of a whole table, in a plan of SQLite or PostgreSQL.
WHOLE_TABLE_SCAN = re.compile(r"SCAN (kser_|label_)|Seq Scan on kser_")

#: A sort of rows. SQLite lists it below the search whose rows it sorts, or right after it.
SORT_OF_ROWS = re.compile(r"SEARCH .*\n *USE TEMP B-TREE|\bSort  \(")


def _assert_no_whole_table_scan(plans: list[str]) -> None:
    for plan in plans:
        assert not WHOLE_TABLE_SCAN.search(plan), plan


@pytest.mark.parametrize("query", FILTERS, ids=str)
def test_find_uses_an_index_in_page_order(any_store: SQLStore, query: OperationQuery) -> None:
    """Ids may be sorted, but not rows."""
    any_store.save(new_operation(1))
    plans = _plans(any_store, lambda: any_store.find(query, 50))
    _assert_no_whole_table_scan(plans)
    for plan in plans:
        assert not SORT_OF_ROWS.search(plan), plan


@pytest.mark.parametrize("query", FILTERS, ids=str)
def test_large_columns_are_read_only_for_returned_rows(
    store: SQLStore, query: OperationQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statements that select ids name no large column, and no index contains one."""
    large_columns = {"params", "metadata", "accumulated", "result"}
    statements: list[str] = []
    execute = Transaction.execute

    def record_and_execute(self: Transaction, statement: Any, *values: Any, **options: Any) -> Any:
        statements.append(statement.sql)
        return execute(self, statement, *values, **options)

    monkeypatch.setattr(Transaction, "execute", record_and_execute)
    store.find(query, 50)
    assert statements
    assert not large_columns & set(re.findall(r"\w+", " ".join(statements)))
    assert not large_columns & {column.name for index in operation.indexes for column in index.columns}


#: The look of a consumer, and the part of its plan that shows the range of the index: the topic, the urgency, and the
#: time up to now. In PostgreSQL, the conditions on the index follow on the next line.
LOOKS: dict[str, Callable[[SQLStore], Any]] = {
    "reserve_due_steps": lambda store: reserve(store),
    "reserve_due_steps, only urgent": lambda store: reserve(store, only_urgent=True, expired=False),
    "take_due_steps": lambda store: store.take_due_steps(10, "reaper", expired=True),
}
INDEX_RANGE = re.compile(
    r"USING INDEX kser_operation_due \(target_topic=\? AND urgent=\? AND take_at<\?\)"
    r"|Index Scan using kser_operation_due on kser_operation.*\n"
    r" *Index Cond: \(\(target_topic = ro_.topic\) AND \(urgent = ro_.urgent\) AND \(take_at <= .*"
)


@pytest.mark.parametrize("look", LOOKS)
def test_look_for_due_steps_reads_one_range_of_the_index(
    any_store: SQLStore, look: str, clock_offset: ClockOffset
) -> None:
    """durability rule 20f: a look reads the due steps of its topics in order, and no rows of other topics."""
    for _ in range(5):
        any_store.save(new_operation(1))
    clock_offset.seconds = 10
    plans = _plans(any_store, lambda: LOOKS[look](any_store))
    _assert_no_whole_table_scan(plans)
    (range_plan,) = (plan for plan in plans if INDEX_RANGE.search(plan))
    assert "TEMP B-TREE" not in range_plan
    assert "Sort" not in range_plan


@pytest.mark.parametrize("look", LOOKS)
def test_look_that_finds_nothing_writes_nothing(any_store: SQLStore, look: str) -> None:
    """durability rule 20f: only a look that finds a due step starts a transaction that writes."""
    any_store.save(new_operation(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(any_store._database, "write", lambda **_: pytest.fail("the look writes"))
        assert LOOKS[look](any_store) == []


def test_topics_are_read_with_one_index_entry_each(any_store: SQLStore) -> None:
    for topic in ("orders", "gpu"):
        for _ in range(20):
            any_store.save(new_operation(1, topic=topic))
    plans = _plans(any_store, lambda: any_store.get_topics())
    _assert_no_whole_table_scan(plans)
    assert re.search("Index Only Scan using kser_operation_due|COVERING INDEX kser_operation_due", plans[0])


def test_look_reads_few_of_the_steps_that_it_cannot_reserve(store: SQLStore, clock_offset: ClockOffset) -> None:
    """A backlog of steps that are not urgent, or whose classes are unknown, does not slow a look down."""
    first = new_operation(1)
    store.save(first)
    columns = [column for column in operation.columns if column.computed is None]
    names = ", ".join(column.name for column in columns)
    values = {"id": "id + number", "root_id": "id + number", "uuid": "uuid || number"}
    copied = ", ".join(values.get(column.name, column.name) for column in columns)
    more = "SELECT number + 1 FROM numbers WHERE number < 20000"
    with store._database.write() as transaction:
        transaction._cursor.execute(
            f"INSERT INTO kser_operation ({names}) WITH RECURSIVE numbers(number) AS (SELECT 1 UNION ALL {more})"
            f" SELECT {copied} FROM kser_operation, numbers"
        )
    clock_offset.seconds = 10
    few, some = (
        _instructions(lambda: reserve(store, only_urgent=True)),
        _instructions(lambda: reserve(store, known=["other.Class"])),
    )
    assert few < 1_000
    assert some < 100_000
    assert len(reserve(store)) == 10


def _instructions(call: Callable[[], Any]) -> int:
    """Return the number of instructions that SQLite executes for the searches in a call, in steps of 100."""
    count = 0
    fetch = Transaction.fetch

    def on_instructions() -> int:
        nonlocal count
        count += 100
        return 0

    def count_and_fetch(self: Transaction, statement: Any, rows: Any, **values: Any) -> Any:
        self._cursor.connection.set_progress_handler(on_instructions, 100)
        try:
            return fetch(self, statement, rows, **values)
        finally:
            self._cursor.connection.set_progress_handler(None, 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "fetch", count_and_fetch)
        assert call() == []
    return count


def test_worker_and_user_queries_never_scan_a_whole_table(any_store: SQLStore, clock_offset: ClockOffset) -> None:
    inner = new_operation(1)

    def call_every_method() -> None:
        claim = save_and_claim(any_store, new_operation([new_task(), new_task(inner)], labels=[("a", "1")]))
        any_store.save(new_operation(1, uuid=claim.root.uuid))
        any_store.renew([(claim.id, 1)], "consumer-a", 30)
        any_store.checkpoint(step_checkpoint(claim, 0))
        any_store.checkpoint(step_checkpoint(claim, 0))
        any_store.cancel(claim.root.uuid, None)
        any_store.checkpoint(
            step_checkpoint(claim, 1, updates=[update_of(claim.root._replace(step=1), 1)], outcomes=())
        )
        row = resume_stored(any_store, claim.root.uuid)
        assert row is not None
        any_store.refuse_class(row.uuid, row.target.uuid)
        steps = reserve(any_store)
        any_store.return_reservations(steps)
        any_store.postpone_takeover(steps, 60)
        any_store.mark_sent([(row.id, row.epoch)], 60, 30)
        any_store.postpone_send([(row.id, row.epoch)], 60)
        claim = claim_root(any_store, row)
        any_store.snapshot(inner.uuid)
        any_store.get_task(claim.id, 0)
        any_store.get_children(claim.id)
        any_store.checkpoint(ending_checkpoint(claim, 1, outcomes=()))
        clock_offset.seconds = 100
        assert any_store.purge(10, [states.SUCCESS], 10) == 1

    _assert_no_whole_table_scan(_plans(any_store, call_every_method))


@pytest.mark.postgresql
def test_checkpoint_of_a_step_is_a_heap_only_update_in_postgresql(
    postgresql_store: SQLStore, database: Database
) -> None:
    """A heap-only update writes no index entry."""
    database.run("SELECT pg_stat_reset()")
    claim = save_and_claim(postgresql_store, new_operation(12))
    for step in range(10):
        postgresql_store.checkpoint(step_checkpoint(claim, step))
    postgresql_store.close()
    sql = "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'kser_operation'"

    def heap_only_updates() -> int:
        ((count,),) = database.run(sql)
        return int(count)

    # The server publishes its statistics with a delay.
    wait_until(lambda: heap_only_updates() >= 10)


@pytest.mark.postgresql
def test_frequent_statements_are_parsed_once_by_psycopg(postgresql_store: SQLStore) -> None:
    """psycopg parses a longer statement again in each execution, which costs a quarter of the time of a checkpoint."""
    writer = postgresql_store._writer
    for part in (writer.saves, writer.claims, writer.checkpoints):
        assert len(part._single_statement.sql) < 4096  # type: ignore[union-attr]


def test_checkpoint_of_a_step_changes_no_indexed_column(store: SQLStore) -> None:
    """SQLite writes an index entry whenever an UPDATE names a column of the index, even with an equal value."""
    assignments = re.search(r"SET (.*) WHERE", store._writer.checkpoints._keep_claim.sql)
    assert assignments
    indexed = {column.name for index in operation.indexes for column in index.columns}
    assert not indexed & set(re.findall(r"(\w+)=", assignments[1]))
