"""Tests of query plans: no query reads a whole table."""

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
    OperationQuery(parent="somebody"),
    OperationQuery(parent="somebody", status=["FAILED"], entrypoint="x"),
]


def _plans(store: SQLStore, call: Callable[[], Any]) -> list[str]:
    """Return the query plans of the statements that ``call`` executes."""
    explained: list[str] = []
    database = store._database
    word = "EXPLAIN" if database.json_batches else "EXPLAIN QUERY PLAN"
    original = Transaction.execute, Transaction.fetch, Transaction.execute_many

    def explain(transaction: Transaction, statement: Any, values: Any) -> None:
        cursor = transaction._cursor
        cursor.execute(f"{word} {statement.sql}", {**statement.constants, "clock": transaction._clock, **values})
        explained.append("\n".join(str(row[-1]) for row in cursor.fetchall()))

    def run(self: Transaction, statement: Any, values: Any = None, **options: Any) -> Any:
        explain(self, statement, values or {})
        return original[0](self, statement, values, **options)

    def many(which: int) -> Any:
        def explained_first(self: Transaction, statement: Any, rows: Any, **values: Any) -> Any:
            if rows:
                explain(self, statement, {**values, **({"rows": "[]"} if database.json_batches else rows[0])})
            return original[which](self, statement, rows, **values)

        return explained_first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "execute", run)
        patch.setattr(Transaction, "fetch", many(1))
        patch.setattr(Transaction, "execute_many", many(2))
        call()
    assert explained
    return explained


#: A scan of a whole table, in a plan of SQLite or PostgreSQL.
WHOLE = re.compile(r"SCAN (kser_|label_)|Seq Scan on kser_")


def _no_whole_table(plans: list[str]) -> None:
    for plan in plans:
        assert not WHOLE.search(plan), plan


@pytest.mark.parametrize("query", FILTERS, ids=str)
def test_find_uses_an_index_in_page_order(any_store: SQLStore, query: OperationQuery) -> None:
    """No whole table is read, and nothing but a few identifiers is sorted."""
    any_store.save(new_operation(1))
    plans = _plans(any_store, lambda: any_store.find(query, 50))
    _no_whole_table(plans)
    for plan in plans:
        # SQLite sorts what is below in the tree, or was said right before.
        assert not re.search(r"SEARCH .*\n *USE TEMP B-TREE|\bSort  \(", plan), plan


@pytest.mark.parametrize("query", FILTERS, ids=str)
def test_large_columns_are_read_only_for_returned_rows(
    store: SQLStore, query: OperationQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statements that look for rows name no text, and no index holds one."""
    large = {"params", "metadata", "accumulated", "result"}
    statements: list[str] = []
    run = Transaction.execute
    monkeypatch.setattr(
        Transaction,
        "execute",
        lambda self, statement, *values, **options: (
            statements.append(statement.sql) or run(self, statement, *values, **options)
        ),
    )
    store.find(query, 50)
    assert statements
    assert not large & set(re.findall(r"\w+", " ".join(statements)))
    assert not large & {column.name for index in operation.indexes for column in index.columns}


def test_take_due_uses_an_index_range(any_store: SQLStore, clock_offset: ClockOffset) -> None:
    any_store.save(new_operation(1))
    clock_offset.seconds = 10
    plans = _plans(any_store, lambda: any_store.take_due_steps(10, "reaper", expired=True))
    _no_whole_table(plans)
    assert "kser_operation_next_check" in plans[0]
    assert "TEMP B-TREE" not in plans[0]
    assert "Sort" not in plans[0]


def test_worker_and_user_queries_never_scan_a_whole_table(any_store: SQLStore, clock_offset: ClockOffset) -> None:
    inner = new_operation(1)

    def everything() -> None:
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
        any_store.mark_sent([(row.id, row.epoch)], 60)
        any_store.postpone_send([(row.id, row.epoch)], 60)
        claim = claim_root(any_store, row)
        any_store.snapshot(inner.uuid)
        any_store.get_task(claim.id, 0)
        any_store.get_children(claim.id)
        any_store.checkpoint(ending_checkpoint(claim, 1, outcomes=()))
        clock_offset.seconds = 100
        assert any_store.purge(10, [states.SUCCESS], 10) == 1

    _no_whole_table(_plans(any_store, everything))


@pytest.mark.postgresql
def test_checkpoint_of_a_step_is_a_heap_only_update_in_postgresql(in_postgresql: SQLStore, database: Database) -> None:
    """PostgreSQL calls it a heap-only tuple."""
    database.run("SELECT pg_stat_reset()")
    claim = save_and_claim(in_postgresql, new_operation(12))
    for step in range(10):
        in_postgresql.checkpoint(step_checkpoint(claim, step))
    in_postgresql.close()
    sql = "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'kser_operation'"
    # The server counts now and then.
    wait_until(lambda: database.run(sql)[0][0] >= 10)


def test_checkpoint_of_a_step_changes_no_indexed_column(store: SQLStore) -> None:
    """SQLite writes the entries of every index with a column that a statement names."""
    changed = re.search(r"SET (.*) WHERE", store._writer.checkpoints._keep_claim.sql)
    assert changed
    indexed = {column.name for index in operation.indexes for column in index.columns}
    assert not indexed & set(re.findall(r"(\w+)=", changed[1]))
