"""Contract tests of save and claim."""

from __future__ import annotations

import json

import pytest

from kser import status as states
from kser.errors import StoreError
from kser.store.model import (
    MAX_TAKEOVER_DELAY,
    RESEND_UNSENT_AFTER,
    SEND_DELAY,
    ClaimRefused,
    DueReason,
    Mode,
    OperationRow,
    Phase,
    RefusalReason,
    TaskRow,
)
from tests.store.harness import (
    LEASE,
    TIME_TOLERANCE,
    StoreHarness,
    claim_request,
    claim_root,
    ending_checkpoint,
    event_kinds,
    new_operation,
    new_task,
    reserved_steps,
    row_of,
    save_and_claim,
    step_checkpoint,
    unique_name,
)
from tests.support import run_concurrently


class SaveAndClaimContract:
    """The contract of save and claim."""

    def test_saved_operation_is_read_back_unchanged(self, harness: StoreHarness) -> None:
        """Rules 1 and 16: the store changes no text, also with NaN or a lone surrogate in it."""
        operation = new_operation(2, metadata='{"text": "\\u0000 \\ud800"}')
        operation_id = harness.store.save(operation)
        row = row_of(harness.other, operation.uuid)
        assert operation_id == row.id
        assert row == OperationRow(
            id=row.id,
            uuid=operation.uuid,
            entrypoint="shop.PlaceOrder",
            parent_id=None,
            root_id=row.id,
            mode="local",
            topic="orders",
            overrides=3,
            params='{"order": 42, "nan": NaN}',
            metadata='{"text": "\\u0000 \\ud800"}',
            status=states.PENDING,
            phase=Phase.RUN_TASK,
            step=0,
            task_count=2,
            accumulated='{"retval": {}}',
            result=None,
            created_at=row.created_at,
            started_at=None,
            ended_at=None,
            cancel_requested=False,
            cancel_reason=None,
            epoch=0,
            owner=None,
            token=None,
            lease_until=None,
            take_at=row.take_at,
            send_at=row.send_at,
            due_reason=DueReason.UNSENT,
            due_at=row.due_at,
            claim_count=0,
            send_count=0,
            sent_at=None,
            refusal_count=0,
            refused_since=None,
            current_entrypoints='["shop.Charge"]',
            target=operation.target,
        )
        assert row.created_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert row.take_at == row.send_at == pytest.approx(row.created_at + RESEND_UNSENT_AFTER, abs=0.5)
        assert row.due_at <= harness.now
        assert operation.tasks is not None
        assert harness.store.get_tasks(row.id) == [
            TaskRow(
                operation_id=row.id,
                position=position,
                uuid=task.uuid,
                entrypoint="shop.Charge",
                topic="gpu",
                params=task.params,
                metadata=task.metadata,
                status=states.PENDING,
                result=None,
                attempts=0,
                child_id=None,
                attempts_before_resume=0,
            )
            for position, task in enumerate(operation.tasks)
        ]

    def test_operation_with_unbuilt_tasks_has_no_task_rows(self, harness: StoreHarness) -> None:
        operation = new_operation(None)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        assert (row.task_count, row.phase, harness.store.get_tasks(row.id)) == (None, Phase.BUILD, [])

    def test_operation_built_without_tasks_has_no_task_rows(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(0))
        assert (claim.root.task_count, claim.root.phase, claim.task) == (0, Phase.END_SUCCESS, None)

    def test_task_may_be_saved_with_a_result(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation([new_task(result='{"retval": 1}')]))
        assert claim.task is not None
        assert claim.task.result == '{"retval": 1}'

    def test_saved_local_operation_names_the_classes_of_its_current_step(self, harness: StoreHarness) -> None:
        """Rule 6: the classes of the nested operations, and of the innermost task."""
        unbuilt, empty = (new_operation(tasks, entrypoint="shop.Inner") for tasks in (None, 0))
        nested = new_operation([new_task(new_operation([new_task(entrypoint="shop.Deep")]))])
        cases = [
            (new_operation(2), ["shop.Charge"]),
            (new_operation([new_task(), new_task(entrypoint="shop.Ship")], step=1), ["shop.Ship"]),
            (new_operation([new_task(nested)]), ["shop.PlaceOrder", "shop.PlaceOrder", "shop.Deep"]),
            (new_operation([new_task(unbuilt)]), ["shop.Inner"]),
            (new_operation([new_task(empty)]), ["shop.Inner"]),
            (new_operation(None), None),
            (new_operation(0), None),
            (new_operation(2, mode=Mode.DISTRIBUTED), None),
        ]
        for operation, expected in cases:
            harness.store.save(operation)
            row = row_of(harness.other, operation.uuid)
            assert row.current_entrypoints == (expected and json.dumps(expected))
            claim = claim_root(harness.store, row)
            assert claim.root.current_entrypoints == row.current_entrypoints
        claimed = save_and_claim(harness.store, new_operation(2))
        assert claimed.root.current_entrypoints == '["shop.Charge"]'

    def test_save_with_a_claim_request_claims_the_operation(self, harness: StoreHarness) -> None:
        """Rule 2: one transaction saves and claims."""
        operation, request = new_operation(2), claim_request()
        claim = save_and_claim(harness.store, operation, request)
        root = claim.root
        assert (claim.epoch, root.epoch, root.status, root.claim_count) == (1, 1, states.RUNNING, 1)
        assert (root.owner, root.token) == (request.owner, request.token)
        assert root.lease_until == pytest.approx(harness.now + LEASE, abs=TIME_TOLERANCE)
        assert (root.take_at, root.due_reason) == (root.lease_until, DueReason.EXPIRED)
        assert root.send_at == root.take_at + SEND_DELAY
        assert root.started_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert root == row_of(harness.other, operation.uuid)
        assert claim.path == (root,)
        assert claim.task == harness.store.get_task(root.id, 0)
        assert event_kinds(harness.store, operation.uuid) == ["accepted", "claimed"]

    def test_duplicate_save_of_a_uuid_is_rejected_and_changes_nothing(self, harness: StoreHarness) -> None:
        """Rule 3: the stored operation does not change, whether the second one is equal to it or not."""
        operation = new_operation(2)
        harness.store.save(operation)
        before = harness.store.snapshot(operation.uuid)
        for duplicate in (operation, new_operation(5, uuid=operation.uuid, params="{}")):
            for request in (None, claim_request()):
                refusal = harness.other.save(duplicate, request)
                assert isinstance(refusal, ClaimRefused)
                assert before is not None
                assert refusal == ClaimRefused(reason=RefusalReason.STALE, root=before.operation)
        assert harness.store.snapshot(operation.uuid) == before

    def test_repeated_save_with_the_same_token_returns_the_same_claim(self, harness: StoreHarness) -> None:
        """Rule 10: the caller repeats a save whose outcome it does not know."""
        operation, request = new_operation(2), claim_request()
        first = save_and_claim(harness.store, operation, request)
        assert harness.other.save(operation, request) == first
        assert event_kinds(harness.store, operation.uuid) == ["accepted", "claimed"]

    def test_concurrent_saves_of_one_operation_give_one_claim(self, harness: StoreHarness) -> None:
        """Rule 3."""
        operation = new_operation(2)
        stores = [harness.store, harness.other] * 3
        results = run_concurrently(*(lambda store=store: store.save(operation, claim_request()) for store in stores))
        assert sorted(type(result).__name__ for result in results) == ["Claim"] + ["ClaimRefused"] * 5
        assert event_kinds(harness.store, operation.uuid) == ["accepted", "claimed"]

    def test_operation_with_an_already_stored_nested_operation_is_rejected(self, harness: StoreHarness) -> None:
        inner = new_operation(1)
        harness.store.save(new_operation([new_task(inner)]))
        outer = new_operation([new_task(inner)])
        with pytest.raises(StoreError):
            harness.store.save(outer)
        assert harness.store.get_operation(outer.uuid) is None

    def test_operation_with_a_duplicate_nested_operation_is_rejected(self, harness: StoreHarness) -> None:
        inner = new_operation(1)
        with pytest.raises(StoreError):
            harness.store.save(new_operation([new_task(inner), new_task(inner)]))

    def test_ids_increase_over_time(self, harness: StoreHarness) -> None:
        ids = [save_and_claim(harness.store, new_operation(1)).id for _ in range(20)]
        for store in (harness.other, harness.store) * 5:
            # The clocks of two processes may differ by a millisecond, and ids contain milliseconds.
            harness.advance(1)
            ids.append(save_and_claim(store, new_operation(1)).id)
        assert ids == sorted(set(ids))

    # -- claims --------------------------------------------------------------------------------------------------------

    def test_claim_returns_the_updated_row_and_its_task(self, harness: StoreHarness) -> None:
        """Rule 7: a claim writes owner, token, the next epoch and the lease."""
        operation, request = new_operation(2), claim_request("consumer-b")
        harness.store.save(operation)
        before = row_of(harness.store, operation.uuid)
        claim = claim_root(harness.other, before, request)
        assert claim.root == before._replace(
            status=states.RUNNING,
            epoch=1,
            owner="consumer-b",
            token=request.token,
            claim_count=1,
            lease_until=claim.root.lease_until,
            take_at=claim.root.take_at,
            send_at=claim.root.send_at,
            due_reason=DueReason.EXPIRED,
            started_at=claim.root.started_at,
        )
        assert claim.root.lease_until == pytest.approx(harness.now + LEASE, abs=TIME_TOLERANCE)
        assert claim.root.take_at == claim.root.lease_until
        assert claim.root.send_at == claim.root.lease_until + SEND_DELAY
        assert claim.root.started_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert claim.task == harness.store.get_task(claim.id, 0)
        assert (claim.exhausted, claim.next_task) == (False, None)
        assert event_kinds(harness.store, operation.uuid) == ["accepted", "claimed"]

    def test_claim_of_an_unknown_operation_returns_none(self, harness: StoreHarness) -> None:
        assert harness.store.claim(unique_name(), unique_name(), claim_request()) is None

    def test_nested_operation_cannot_be_claimed(self, harness: StoreHarness) -> None:
        """Rule 31: only the root operation has a claim."""
        inner = new_operation(1)
        harness.store.save(new_operation([new_task(inner)]))
        assert harness.store.claim(inner.uuid, inner.uuid, claim_request()) is None

    def test_claim_is_exclusive_until_lease_expiry(self, harness: StoreHarness) -> None:
        """Rule 7."""
        claim = save_and_claim(harness.store, new_operation(2))
        refusal = harness.other.claim(claim.root.uuid, claim.root.target.uuid, claim_request())
        assert refusal == ClaimRefused(RefusalReason.HELD, claim.root)
        harness.advance(LEASE + 1)
        next_claim = claim_root(harness.other, claim.root, claim_request("consumer-b"))
        assert (next_claim.epoch, next_claim.root.owner, next_claim.root.claim_count) == (2, "consumer-b", 2)
        assert next_claim.root.started_at == claim.root.started_at

    def test_concurrent_claims_have_one_winner(self, harness: StoreHarness) -> None:
        """Rule 7: a claim is one compare-and-set."""
        operation = new_operation(2)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        stores = [harness.store, harness.other] * 4
        results = run_concurrently(
            *(lambda store=store: store.claim(row.uuid, row.target.uuid, claim_request()) for store in stores)
        )
        assert [result.reason for result in results if isinstance(result, ClaimRefused)] == [RefusalReason.HELD] * 7
        assert row_of(harness.store, row.uuid).epoch == 1

    def test_claim_of_another_step_is_stale(self, harness: StoreHarness) -> None:
        operation = new_operation(2)
        harness.store.save(operation)
        refusal = harness.store.claim(operation.uuid, unique_name(), claim_request())
        assert refusal == ClaimRefused(RefusalReason.STALE, row_of(harness.store, operation.uuid))

    def test_ended_operation_cannot_be_claimed(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(1))
        harness.store.checkpoint(ending_checkpoint(claim, 0))
        refusal = harness.store.claim(claim.root.uuid, claim.root.target.uuid, claim_request())
        assert refusal == ClaimRefused(RefusalReason.ENDED, row_of(harness.store, claim.root.uuid))

    def test_repeated_claim_with_the_same_token_returns_the_same_claim(self, harness: StoreHarness) -> None:
        """Rule 10."""
        operation, request = new_operation(2), claim_request()
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        first = claim_root(harness.store, row, request)
        assert claim_root(harness.other, row, request) == first
        harness.advance(LEASE + 1)
        assert claim_root(harness.other, row, request) == first
        assert event_kinds(harness.store, operation.uuid) == ["accepted", "claimed"]

    def test_too_many_claims_without_a_checkpoint_exhaust_a_step(self, harness: StoreHarness) -> None:
        """Rule 22."""
        operation = new_operation(2)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        claims = []
        for _ in range(4):
            claims.append(claim_root(harness.store, row, claim_request(max_claims=3)))
            harness.advance(LEASE + 5)
        assert [claim.exhausted for claim in claims] == [False, False, False, True]
        # A repeated claim with the token of the fourth one returns the same claim.
        token = claims[-1].root.token or ""
        assert claim_root(harness.store, row, claim_request(max_claims=3, token=token)).exhausted
        harness.store.checkpoint(step_checkpoint(claims[-1], 0))
        assert row_of(harness.store, row.uuid).claim_count == 0

    def test_further_takeovers_of_a_step_wait_longer_and_longer(self, harness: StoreHarness) -> None:
        """Rule 22: the first two takeovers after an expired lease are immediate, and the n-th waits 2^(n-2) seconds."""
        operation = new_operation(2)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        for claim_count, delay in enumerate([0, 0, 2, 4, 8, 16, 32, 64, 128, 256, MAX_TAKEOVER_DELAY, 300], start=1):
            claim = claim_root(harness.store, row)
            assert claim.root.claim_count == claim_count
            assert (claim.root.take_at or 0) - (claim.root.lease_until or 0) == pytest.approx(delay, abs=0.001)
            if delay > 2 * TIME_TOLERANCE:
                harness.advance(LEASE + delay - 2 * TIME_TOLERANCE)
                refusal = harness.other.claim(row.uuid, row.target.uuid, claim_request())
                assert isinstance(refusal, ClaimRefused)
                assert refusal.reason == RefusalReason.WAITING
                assert reserved_steps(harness.other) == []
                harness.advance(2 * TIME_TOLERANCE + 0.1)
            else:
                harness.advance(LEASE + delay + 0.1)
            assert reserved_steps(harness.other) == [(row.uuid, DueReason.EXPIRED)]

    def test_waiting_takeover_does_not_delay_a_cancellation(self, harness: StoreHarness) -> None:
        """Rule 24: an operation without a valid lease ends at once."""
        claim = save_and_claim(harness.store, new_operation(2))
        for _ in range(5):
            harness.advance(LEASE + MAX_TAKEOVER_DELAY)
            claim = claim_root(harness.store, claim.root)
        harness.advance(LEASE + 1)
        row = harness.store.cancel(claim.root.uuid, None)
        assert row is not None
        assert row.status == states.CANCELLED

    def test_claim_names_the_epoch_that_was_reserved(self, harness: StoreHarness) -> None:
        """Rule 20c: the epoch is part of the compare-and-set."""
        claim = save_and_claim(harness.store, new_operation(3))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False, due_reason=DueReason.RELEASED))
        row = row_of(harness.store, claim.root.uuid)
        for epoch in (row.epoch - 1, row.epoch + 1):
            refusal = harness.other.claim(row.uuid, row.target.uuid, claim_request(epoch=epoch))
            assert refusal == ClaimRefused(RefusalReason.STALE, row)
        assert claim_root(harness.other, row, claim_request(epoch=row.epoch)).epoch == row.epoch + 1

    def test_claim_at_an_old_epoch_is_refused_as_held_while_an_owner_works(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(3))
        refusal = harness.other.claim(claim.root.uuid, claim.root.target.uuid, claim_request(epoch=0))
        assert refusal == ClaimRefused(RefusalReason.HELD, claim.root)

    def test_step_is_claimed_only_through_its_own_topic(self, harness: StoreHarness) -> None:
        """Rule 6: who may write to another topic cannot run the step."""
        operation = new_operation(2)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        for topic in ("other", "ORDERS", ""):
            refusal = harness.store.claim(row.uuid, row.target.uuid, claim_request(topic=topic))
            assert refusal == ClaimRefused(RefusalReason.TOPIC, row)
        request = claim_request(topic="orders")
        claim = claim_root(harness.store, row, request)
        assert claim_root(harness.other, row, request) == claim

    def test_claim_of_a_distributed_operation_includes_the_next_task(self, harness: StoreHarness) -> None:
        operation = new_operation(3, mode=Mode.DISTRIBUTED)
        claim = save_and_claim(harness.store, operation)
        assert claim.next_task == harness.store.get_task(claim.id, 1)
        harness.store.checkpoint(step_checkpoint(claim, 0))
        harness.store.checkpoint(step_checkpoint(claim, 1, keep=False))
        last = claim_root(harness.store, row_of(harness.store, operation.uuid))
        assert (last.task, last.next_task) == (harness.store.get_task(claim.id, 2), None)

    def test_claim_path_leads_to_the_innermost_operation(self, harness: StoreHarness) -> None:
        """Rule 31."""
        leaf = new_operation(2)
        middle = new_operation([new_task(leaf)])
        claim = save_and_claim(harness.store, new_operation([new_task(middle), new_task()]))
        assert [row.uuid for row in claim.path] == [claim.root.uuid, middle.uuid, leaf.uuid]
        assert claim.task == harness.store.get_task(claim.path[-1].id, 0)
        assert [row.parent_id for row in claim.path] == [None, claim.path[0].id, claim.path[1].id]
        assert {row.root_id for row in claim.path} == {claim.id}
        assert [row.status for row in claim.path] == [states.RUNNING, states.PENDING, states.PENDING]
        task = harness.store.get_task(claim.id, 0)
        assert task is not None
        assert (task.child_id, task.uuid) == (claim.path[1].id, middle.uuid)

    def test_claim_path_stops_at_an_operation_with_unbuilt_tasks(self, harness: StoreHarness) -> None:
        unbuilt = new_operation(None)
        claim = save_and_claim(harness.store, new_operation([new_task(unbuilt)]))
        assert [row.uuid for row in claim.path] == [claim.root.uuid, unbuilt.uuid]
        assert claim.task is None

    def test_rows_of_nested_operations_are_read_by_uuid(self, harness: StoreHarness) -> None:
        inner = new_operation(1)
        claim = save_and_claim(harness.store, new_operation([new_task(inner)]))
        assert row_of(harness.store, inner.uuid).parent_id == claim.id
        assert harness.store.get_operation(unique_name()) is None
        assert harness.store.get_task(claim.id, 1) is None
        assert harness.store.get_task(claim.id, -1) is None

    def test_children_include_all_nested_operations(self, harness: StoreHarness) -> None:
        leaf, sibling = new_operation(1), new_operation(1)
        middle = new_operation([new_task(leaf)])
        claim = save_and_claim(harness.store, new_operation([new_task(middle), new_task(sibling)]))
        save_and_claim(harness.store, new_operation([new_task(new_operation(1))]))
        assert {row.uuid for row in harness.store.get_children(claim.id)} == {leaf.uuid, middle.uuid, sibling.uuid}
