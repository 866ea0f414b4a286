"""Contract tests of find and snapshot."""

from __future__ import annotations

from typing import Any

import pytest

from kser import status as states
from kser.errors import UsageError
from kser.store.model import EVENTS, OperationQuery, OperationRow
from tests.store.harness import (
    StoreHarness,
    ending_checkpoint,
    new_operation,
    new_task,
    row_of,
    save_and_claim,
    step_checkpoint,
    unique_name,
)


class FindContract:
    """The contract of find and snapshot."""

    def test_snapshot_contains_operation_tasks_attempts_and_events(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.store.checkpoint(step_checkpoint(claim, 0))
        stored = harness.other.snapshot(claim.root.uuid)
        assert stored is not None
        assert stored.operation == row_of(harness.store, claim.root.uuid)
        assert list(stored.tasks) == list(harness.store.get_tasks(claim.id))
        assert {event.kind for event in stored.events} <= EVENTS.keys()
        assert {event.root_id for event in stored.events} == {claim.id}
        assert harness.store.snapshot(unique_name()) is None

    def test_find_returns_the_newest_first_page_by_page(self, harness: StoreHarness) -> None:
        operations = [new_operation(1) for _ in range(7)]
        for operation in operations:
            harness.store.save(operation)
        uuids: list[str] = []
        sizes = []
        cursor = None
        while True:
            page = harness.other.find(OperationQuery(), 3, cursor)
            uuids += (row.uuid for row in page.rows)
            sizes.append(len(page.rows))
            cursor = page.cursor
            # An operation that is saved between two pages changes none of them.
            harness.store.save(new_operation(1, entrypoint="shop.Late"))
            if cursor is None:
                break
        assert uuids == [operation.uuid for operation in reversed(operations)]
        assert sizes == [3, 3, 1]

    def test_full_last_page_has_no_cursor(self, harness: StoreHarness) -> None:
        for _ in range(3):
            harness.store.save(new_operation(1))
        assert harness.store.find(OperationQuery(), 3).cursor is None

    @pytest.mark.parametrize("after", ["", "x", "-1", "1.5", str(1 << 63), "²"])
    def test_find_rejects_an_invalid_cursor(self, harness: StoreHarness, after: str) -> None:
        with pytest.raises(UsageError, match="cursor"):
            harness.store.find(OperationQuery(), 3, after)

    def _save_examples(self, harness: StoreHarness) -> dict[str, OperationRow]:
        """Save five operations with different statuses, one minute apart; return their rows by name."""
        store = harness.store
        rows: dict[str, OperationRow] = {}
        for name, entrypoint, status in (
            ("pending", "shop.PlaceOrder", None),
            ("running", "shop.PlaceOrder", ""),
            ("failed", "shop.PlaceOrder", states.FAILED),
            ("success", "shop.PlaceOrder", states.SUCCESS),
            ("refund", "shop.Refund", states.FAILED),
        ):
            labels = [("name", name), ("customer", "7" if name in ("failed", "refund") else "8")]
            operation = new_operation(1, entrypoint=entrypoint, labels=labels)
            claim = None if status is None else save_and_claim(store, operation)
            if claim is None:
                store.save(operation)
            elif status:
                store.checkpoint(ending_checkpoint(claim, 0, status))
            rows[name] = row_of(store, operation.uuid)
            harness.advance(60)
        return rows

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            (OperationQuery(), "refund success failed running pending"),
            (OperationQuery(status=["FAILED"]), "refund failed"),
            (OperationQuery(status={"PENDING", "SUCCESS"}), "success pending"),
            (OperationQuery(status=[]), ""),
            (OperationQuery(status=["UNKNOWN"]), ""),
            (OperationQuery(entrypoint="shop.Refund"), "refund"),
            (OperationQuery(entrypoint="shop.PlaceOrder"), "success failed running pending"),
            (OperationQuery(entrypoint="shop.PlaceOrder", status=["FAILED"]), "failed"),
            (OperationQuery(entrypoint="shop.Other"), ""),
            (OperationQuery(labels=[("customer", "7")]), "refund failed"),
            (OperationQuery(labels=[("customer", "7"), ("name", "failed")]), "failed"),
            (OperationQuery(labels=[("customer", "7"), ("name", "running")]), ""),
            (OperationQuery(labels=[("customer", "7")], entrypoint="shop.Refund"), "refund"),
            (OperationQuery(labels=[("customer", "8")], status=["RUNNING", "PENDING"]), "running pending"),
            (OperationQuery(labels=[("customer", "8")], status=[]), ""),
            (OperationQuery(labels=[("customer", "%")]), ""),
            (OperationQuery(parent="unknown-uuid"), ""),
        ],
    )
    def test_find_applies_every_filter(self, harness: StoreHarness, query: OperationQuery, expected: str) -> None:
        """An operation must match every filter of the query."""
        rows = self._save_examples(harness)
        assert harness.store.find(query, 10).rows == [rows[name] for name in expected.split()]

    def test_find_filters_by_creation_time(self, harness: StoreHarness) -> None:
        """``since`` is inclusive, and ``until`` is exclusive."""
        rows = self._save_examples(harness)
        since, until = rows["running"].created_at, rows["success"].created_at

        def find(**values: Any) -> list[OperationRow]:
            return list(harness.store.find(OperationQuery(**values), 10).rows)

        assert find(since=since) == [rows[name] for name in ("refund", "success", "failed", "running")]
        assert find(until=until) == [rows[name] for name in ("failed", "running", "pending")]
        assert find(since=since, until=until) == [rows["failed"], rows["running"]]
        assert find(since=since, until=until, status=["FAILED"]) == [rows["failed"]]
        assert find(since=since, until=until, labels=[("customer", "8")]) == [rows["running"]]
        assert find(since=until, until=since) == []
        assert find(since=harness.now + 60) == []
        assert find(until=0) == []

    def test_find_returns_roots_unless_a_parent_is_given(self, harness: StoreHarness) -> None:
        """Rule 31."""
        leaf = new_operation(1)
        first, second = new_operation([new_task(leaf)], entrypoint="shop.One"), new_operation(1, labels=[("a", "1")])
        outer = new_operation([new_task(first), new_task(second)], labels=[("a", "1")])
        harness.store.save(outer)
        saved_row = row_of(harness.store, outer.uuid)

        def find(**values: Any) -> list[str]:
            return [row.uuid for row in harness.store.find(OperationQuery(**values), 10).rows]

        assert find() == [outer.uuid]
        assert find(labels=[("a", "1")]) == [outer.uuid]
        assert find(parent=outer.uuid) == [second.uuid, first.uuid]
        assert find(parent=first.uuid) == [leaf.uuid]
        assert find(parent=leaf.uuid) == []
        assert find(parent=outer.uuid, entrypoint="shop.One") == [first.uuid]
        assert find(parent=outer.uuid, status=["FAILED"]) == []
        assert find(parent=outer.uuid, labels=[("a", "1")]) == [second.uuid]
        assert find(parent=outer.uuid, since=saved_row.created_at - 5) == [second.uuid, first.uuid]
        page = harness.store.find(OperationQuery(parent=outer.uuid), 1)
        assert harness.store.find(OperationQuery(parent=outer.uuid), 1, page.cursor).rows == [
            row_of(harness.store, first.uuid)
        ]

    def test_label_may_have_any_length(self, harness: StoreHarness) -> None:
        operation = new_operation(1, labels=[("k" * 1000, "\N{SNOWMAN}" * 20_000), ("k", "")])
        harness.store.save(operation)
        for pair in operation.labels:
            assert [row.uuid for row in harness.store.find(OperationQuery(labels=[pair]), 5).rows] == [operation.uuid]

    def test_special_characters_are_stored_as_plain_text(self, harness: StoreHarness) -> None:
        """Characters that SQL or a driver gives a meaning to are stored as any other text."""
        text = "'; DROP TABLE kser_operation; -- %s %(x)s :x ? $1 \\ \""
        operation = new_operation(1, uuid=text, entrypoint=text, labels=[(text, text)])
        harness.store.save(operation)
        assert row_of(harness.store, text).entrypoint == text
        query = OperationQuery(entrypoint=text, labels=[(text, text)], status=["PENDING"])
        assert [row.uuid for row in harness.store.find(query, 5).rows] == [text]
