"""Contract tests of a store, run against each store.

The rules are those of the protocol; the numbers in the docstrings are theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from kser import status as states
from kser.errors import FencedError, StateConflict, StoreError, UsageError
from kser.store.base import Store
from kser.store.model import (
    EVENTS,
    MAX_ERROR_LENGTH,
    MAX_RESEND_DELAY,
    RESEND_UNSENT_AFTER,
    SEND_GRACE,
    AttemptRow,
    BuiltTasks,
    Claim,
    ClaimRefused,
    DueReason,
    DueStep,
    EventRow,
    Mode,
    NewEvent,
    OperationQuery,
    OperationRow,
    Phase,
    RefusalReason,
    StepMessage,
    TaskRow,
)
from tests.store.harness import (
    CLOSE,
    LEASE,
    RESEND,
    World,
    claimed,
    last_step,
    me,
    name,
    new,
    new_task,
    outcome_of,
    resumed,
    row_of,
    saved,
    step_on,
    update_of,
)


def kinds(store: Store, uuid: str) -> list[str]:
    """Return the kinds of the events of an operation."""
    stored = store.snapshot(uuid)
    assert stored is not None
    return [event.kind for event in stored.events]


def due(store: Store, limit: int = 10, *, expired: bool = True) -> list[tuple[str, str]]:
    """Let a reaper take due steps, and return their uuids and reasons."""
    return [(step.uuid, step.reason) for step in store.take_due_steps(limit, "reaper", expired=expired)]


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls in threads at the same time, and return the result or exception of each."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class SaveAndClaimContract:
    """Tests of save and claim."""

    def test_saved_operation_is_read_back_unchanged(self, world: World) -> None:
        """Rules 1 and 16: texts stay what they were, NaN included."""
        operation = new(2, metadata='{"text": "\\u0000 \\ud800"}')
        operation_id = world.store.save(operation)
        row = row_of(world.other, operation.uuid)
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
            next_check_at=row.next_check_at,
            due_at=row.due_at,
            claim_count=0,
            send_count=0,
            sent_at=None,
            target=operation.target,
        )
        assert row.created_at == pytest.approx(world.now, abs=CLOSE)
        assert row.next_check_at == pytest.approx(row.created_at + RESEND_UNSENT_AFTER, abs=0.5)
        assert row.due_at <= world.now
        assert operation.tasks is not None
        assert world.store.get_tasks(row.id) == [
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

    def test_operation_with_unbuilt_tasks_has_no_task_rows(self, world: World) -> None:
        operation = new(None)
        world.store.save(operation)
        row = row_of(world.store, operation.uuid)
        assert (row.task_count, row.phase, world.store.get_tasks(row.id)) == (None, Phase.BUILD, [])

    def test_operation_built_without_tasks_has_no_task_rows(self, world: World) -> None:
        claim = saved(world.store, new(0))
        assert (claim.root.task_count, claim.root.phase, claim.task) == (0, Phase.END_SUCCESS, None)

    def test_task_may_be_saved_with_a_result(self, world: World) -> None:
        claim = saved(world.store, new([new_task(result='{"retval": 1}')]))
        assert claim.task is not None
        assert claim.task.result == '{"retval": 1}'

    def test_save_with_a_claim_request_claims_the_operation(self, world: World) -> None:
        """Rule 2: saved and claimed in one transaction."""
        operation, request = new(2), me()
        claim = saved(world.store, operation, request)
        root = claim.root
        assert (claim.epoch, root.epoch, root.status, root.claim_count) == (1, 1, states.RUNNING, 1)
        assert (root.owner, root.token) == (request.owner, request.token)
        assert root.next_check_at == pytest.approx(world.now + LEASE, abs=CLOSE)
        assert root.started_at == pytest.approx(world.now, abs=CLOSE)
        assert root == row_of(world.other, operation.uuid)
        assert claim.path == (root,)
        assert claim.task == world.store.get_task(root.id, 0)
        assert kinds(world.store, operation.uuid) == ["accepted", "claimed"]

    def test_duplicate_save_of_a_uuid_is_rejected_and_changes_nothing(self, world: World) -> None:
        """Rule 3: the stored state stays untouched, also when it is the very same operation."""
        operation = new(2)
        world.store.save(operation)
        before = world.store.snapshot(operation.uuid)
        for again in (operation, new(5, uuid=operation.uuid, params="{}")):
            for request in (None, me()):
                refusal = world.other.save(again, request)
                assert isinstance(refusal, ClaimRefused)
                assert before is not None
                assert refusal == ClaimRefused(reason=RefusalReason.STALE, root=before.operation)
        assert world.store.snapshot(operation.uuid) == before

    def test_repeated_save_with_the_same_token_returns_the_same_claim(self, world: World) -> None:
        """Rule 10: the outcome of the first save is unknown to its caller."""
        operation, request = new(2), me()
        first = saved(world.store, operation, request)
        assert world.other.save(operation, request) == first
        assert kinds(world.store, operation.uuid) == ["accepted", "claimed"]

    def test_concurrent_saves_of_one_operation_give_one_claim(self, world: World) -> None:
        """Rule 3."""
        operation = new(2)
        stores = [world.store, world.other] * 3
        results = at_once(*(lambda store=store: store.save(operation, me()) for store in stores))
        assert sorted(type(result).__name__ for result in results) == ["Claim"] + ["ClaimRefused"] * 5
        assert kinds(world.store, operation.uuid) == ["accepted", "claimed"]

    def test_operation_with_an_already_stored_nested_operation_is_rejected(self, world: World) -> None:
        inner = new(1)
        world.store.save(new([new_task(inner)]))
        outer = new([new_task(inner)])
        with pytest.raises(StoreError):
            world.store.save(outer)
        assert world.store.get_operation(outer.uuid) is None

    def test_operation_with_a_duplicate_nested_operation_is_rejected(self, world: World) -> None:
        inner = new(1)
        with pytest.raises(StoreError):
            world.store.save(new([new_task(inner), new_task(inner)]))

    def test_ids_increase_over_time(self, world: World) -> None:
        ids = [saved(world.store, new(1)).id for _ in range(20)]
        for store in (world.other, world.store) * 5:
            # Two processes do not agree to the millisecond.
            world.pass_by(1)
            ids.append(saved(store, new(1)).id)
        assert ids == sorted(set(ids))

    # -- claims --------------------------------------------------------------------------------------------------------

    def test_claim_returns_the_updated_row_and_its_task(self, world: World) -> None:
        """Rule 7: owner, token, epoch + 1 and lease; everything else stays."""
        operation, request = new(2), me("consumer-b")
        world.store.save(operation)
        before = row_of(world.store, operation.uuid)
        claim = claimed(world.other, before, request)
        assert claim.root == before._replace(
            status=states.RUNNING,
            epoch=1,
            owner="consumer-b",
            token=request.token,
            claim_count=1,
            next_check_at=claim.root.next_check_at,
            started_at=claim.root.started_at,
        )
        assert claim.root.next_check_at == pytest.approx(world.now + LEASE, abs=CLOSE)
        assert claim.root.started_at == pytest.approx(world.now, abs=CLOSE)
        assert claim.task == world.store.get_task(claim.id, 0)
        assert (claim.exhausted, claim.next_task) == (False, None)
        assert kinds(world.store, operation.uuid) == ["accepted", "claimed"]

    def test_claim_of_an_unknown_operation_returns_none(self, world: World) -> None:
        assert world.store.claim(name(), name(), me()) is None

    def test_nested_operation_cannot_be_claimed(self, world: World) -> None:
        """Rule 31: one claim, the root's."""
        inner = new(1)
        world.store.save(new([new_task(inner)]))
        assert world.store.claim(inner.uuid, inner.uuid, me()) is None

    def test_claim_is_exclusive_until_lease_expiry(self, world: World) -> None:
        """Rule 7."""
        claim = saved(world.store, new(2))
        refusal = world.other.claim(claim.root.uuid, claim.root.target.uuid, me())
        assert refusal == ClaimRefused(RefusalReason.HELD, claim.root)
        world.pass_by(LEASE + 1)
        other = claimed(world.other, claim.root, me("consumer-b"))
        assert (other.epoch, other.root.owner, other.root.claim_count) == (2, "consumer-b", 2)
        assert other.root.started_at == claim.root.started_at

    def test_concurrent_claims_have_one_winner(self, world: World) -> None:
        """Rule 7: one compare-and-set."""
        operation = new(2)
        world.store.save(operation)
        row = row_of(world.store, operation.uuid)
        stores = [world.store, world.other] * 4
        results = at_once(*(lambda store=store: store.claim(row.uuid, row.target.uuid, me()) for store in stores))
        assert [result.reason for result in results if isinstance(result, ClaimRefused)] == [RefusalReason.HELD] * 7
        assert row_of(world.store, row.uuid).epoch == 1

    def test_claim_of_another_step_is_stale(self, world: World) -> None:
        operation = new(2)
        world.store.save(operation)
        refusal = world.store.claim(operation.uuid, name(), me())
        assert refusal == ClaimRefused(RefusalReason.STALE, row_of(world.store, operation.uuid))

    def test_ended_operation_cannot_be_claimed(self, world: World) -> None:
        claim = saved(world.store, new(1))
        world.store.checkpoint(last_step(claim, 0))
        refusal = world.store.claim(claim.root.uuid, claim.root.target.uuid, me())
        assert refusal == ClaimRefused(RefusalReason.ENDED, row_of(world.store, claim.root.uuid))

    def test_repeated_claim_with_the_same_token_returns_the_same_claim(self, world: World) -> None:
        """Rule 10."""
        operation, request = new(2), me()
        world.store.save(operation)
        row = row_of(world.store, operation.uuid)
        first = claimed(world.store, row, request)
        assert claimed(world.other, row, request) == first
        world.pass_by(LEASE + 1)
        assert claimed(world.other, row, request) == first
        assert kinds(world.store, operation.uuid) == ["accepted", "claimed"]

    def test_too_many_claims_without_a_checkpoint_exhaust_a_step(self, world: World) -> None:
        """Rule 22."""
        operation = new(2)
        world.store.save(operation)
        row = row_of(world.store, operation.uuid)
        claims = []
        for _ in range(4):
            claims.append(claimed(world.store, row, me(max_claims=3)))
            world.pass_by(LEASE + 1)
        assert [claim.exhausted for claim in claims] == [False, False, False, True]
        # The fourth one's own, asked for again.
        token = claims[-1].root.token or ""
        assert claimed(world.store, row, me(max_claims=3, token=token)).exhausted
        world.store.checkpoint(step_on(claims[-1], 0))
        assert row_of(world.store, row.uuid).claim_count == 0

    def test_claim_of_a_distributed_operation_includes_the_next_task(self, world: World) -> None:
        operation = new(3, mode=Mode.DISTRIBUTED)
        claim = saved(world.store, operation)
        assert claim.next_task == world.store.get_task(claim.id, 1)
        world.store.checkpoint(step_on(claim, 0))
        world.store.checkpoint(step_on(claim, 1, keep=False))
        last = claimed(world.store, row_of(world.store, operation.uuid))
        assert (last.task, last.next_task) == (world.store.get_task(claim.id, 2), None)

    def test_claim_path_leads_to_the_innermost_operation(self, world: World) -> None:
        """Rule 31."""
        leaf = new(2)
        middle = new([new_task(leaf)])
        claim = saved(world.store, new([new_task(middle), new_task()]))
        assert [row.uuid for row in claim.path] == [claim.root.uuid, middle.uuid, leaf.uuid]
        assert claim.task == world.store.get_task(claim.path[-1].id, 0)
        assert [row.parent_id for row in claim.path] == [None, claim.path[0].id, claim.path[1].id]
        assert {row.root_id for row in claim.path} == {claim.id}
        assert [row.status for row in claim.path] == [states.RUNNING, states.PENDING, states.PENDING]
        task = world.store.get_task(claim.id, 0)
        assert task is not None
        assert (task.child_id, task.uuid) == (claim.path[1].id, middle.uuid)

    def test_claim_path_stops_at_an_operation_with_unbuilt_tasks(self, world: World) -> None:
        unbuilt = new(None)
        claim = saved(world.store, new([new_task(unbuilt)]))
        assert [row.uuid for row in claim.path] == [claim.root.uuid, unbuilt.uuid]
        assert claim.task is None

    def test_rows_of_nested_operations_are_read_by_uuid(self, world: World) -> None:
        inner = new(1)
        claim = saved(world.store, new([new_task(inner)]))
        assert row_of(world.store, inner.uuid).parent_id == claim.id
        assert world.store.get_operation(name()) is None
        assert world.store.get_task(claim.id, 1) is None
        assert world.store.get_task(claim.id, -1) is None

    def test_children_include_all_nested_operations(self, world: World) -> None:
        leaf, sibling = new(1), new(1)
        middle = new([new_task(leaf)])
        claim = saved(world.store, new([new_task(middle), new_task(sibling)]))
        saved(world.store, new([new_task(new(1))]))
        assert {row.uuid for row in world.store.get_children(claim.id)} == {leaf.uuid, middle.uuid, sibling.uuid}


class CheckpointContract:
    """Tests of checkpoints."""

    def test_checkpoint_records_result_attempt_event_and_step_together(self, world: World) -> None:
        """Rule 13: the task's result, the operation's, attempt, events, and which step is current."""
        claim = saved(world.store, new(3))
        assert world.store.checkpoint(step_on(claim, 0)) == states.RUNNING
        stored = world.other.snapshot(claim.root.uuid)
        assert stored is not None
        assert stored.operation == claim.root._replace(step=1, accumulated='{"up to": 1}', claim_count=0)
        task = stored.tasks[0]
        assert (task.status, task.result, task.attempts) == (states.SUCCESS, '{"of": 0}', 1)
        (attempt,) = stored.attempts
        assert attempt == AttemptRow(
            operation_id=claim.id,
            position=0,
            number=1,
            epoch=1,
            status=states.SUCCESS,
            consumer="consumer-a",
            started_at=attempt.started_at,
            ended_at=attempt.ended_at,
            error=None,
        )
        assert attempt.ended_at == pytest.approx(world.now, abs=CLOSE)
        assert attempt.ended_at - attempt.started_at == pytest.approx(0.25)
        event = stored.events[-1]
        assert event == EventRow(
            root_id=claim.id,
            at=event.at,
            kind="task-succeeded",
            epoch=1,
            consumer="consumer-a",
            uuid="task 0",
            text=None,
        )
        assert event.at == pytest.approx(world.now, abs=CLOSE)
        assert stored.root_uuid == claim.root.uuid

    def test_ending_checkpoint_releases_the_claim(self, world: World) -> None:
        claim = saved(world.store, new(1))
        assert world.store.checkpoint(last_step(claim, 0)) == states.SUCCESS
        row = row_of(world.store, claim.root.uuid)
        assert (row.status, row.result, row.phase) == (states.SUCCESS, '{"all": "over"}', Phase.END_SUCCESS)
        assert (row.epoch, row.owner, row.next_check_at) == (2, None, None)
        assert row.ended_at == pytest.approx(world.now, abs=CLOSE)
        assert kinds(world.store, row.uuid) == ["accepted", "claimed", "ended"]

    def test_checkpoint_may_record_the_result_before_the_end(self, world: World) -> None:
        claim = saved(world.store, new(1))
        update = update_of(claim.root, 0, phase=Phase.END_SUCCESS, result='{"nearly": 1}')
        world.store.checkpoint(step_on(claim, 0, updates=[update], keep=False))
        row = row_of(world.store, claim.root.uuid)
        assert (row.result, row.status, row.ended_at) == ('{"nearly": 1}', states.RUNNING, None)

    def test_released_claim_can_be_claimed_by_any_consumer(self, world: World) -> None:
        """Rule 30."""
        claim = saved(world.store, new(3))
        target = StepMessage("task-1", "shop.Ship", "gpu")
        assert world.store.checkpoint(step_on(claim, 0, keep=False, target=target)) == states.RUNNING
        row = row_of(world.store, claim.root.uuid)
        assert (row.epoch, row.owner, row.target, row.claim_count, row.send_count, row.sent_at) == (
            2,
            None,
            target,
            0,
            0,
            None,
        )
        assert row.next_check_at == pytest.approx(world.now + RESEND_UNSENT_AFTER, abs=CLOSE)
        assert row.due_at <= world.now
        assert claimed(world.other, row).epoch == 3

    def test_checkpoint_without_a_target_keeps_the_target(self, world: World) -> None:
        claim = saved(world.store, new(3))
        world.store.checkpoint(step_on(claim, 0, keep=False))
        assert row_of(world.store, claim.root.uuid).target == claim.root.target

    def test_retry_backoff_blocks_the_claim_until_due_at(self, world: World) -> None:
        """Rule 27: a retry releases the claim with ``due_at``, and counts as an attempt."""
        claim = saved(world.store, new(2))
        failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="ConnectionError: later")
        retry = step_on(claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=False, delay=50)
        world.store.checkpoint(retry)
        row = row_of(world.store, claim.root.uuid)
        assert row.due_at == row.next_check_at == pytest.approx(world.now + 50, abs=CLOSE)
        refusal = world.store.claim(row.uuid, row.target.uuid, me())
        assert refusal == ClaimRefused(RefusalReason.WAITING, row)
        stored = world.store.snapshot(row.uuid)
        assert stored is not None
        assert (stored.tasks[0].status, stored.tasks[0].attempts) == (states.PENDING, 1)
        assert (stored.attempts[0].status, stored.attempts[0].error) == (states.FAILED, "ConnectionError: later")
        assert due(world.store) == []
        world.pass_by(51)
        assert due(world.store) == [(row.uuid, DueReason.RETRY)]
        assert claimed(world.store, row).epoch == 3

    def test_retry_keeps_the_result_saved_with_the_task(self, world: World) -> None:
        claim = saved(world.store, new([new_task(result='{"came": "with"}')]))
        failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="no")
        world.store.checkpoint(step_on(claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=False))
        assert world.store.get_tasks(claim.id)[0].result == '{"came": "with"}'

    def test_attempts_are_appended_and_never_replaced(self, world: World) -> None:
        claim = saved(world.store, new(2))
        for number in (1, 2, 3):
            failed = outcome_of(claim.root, 0, number, status=states.PENDING, result=None, error="x" * 3000)
            world.store.checkpoint(step_on(claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=False))
            claim = claimed(world.store, claim.root)
        stored = world.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert [(attempt.number, attempt.epoch) for attempt in stored.attempts] == [(1, 1), (2, 3), (3, 5)]
        assert stored.tasks[0].attempts == 3
        assert {len(attempt.error or "") for attempt in stored.attempts} == {MAX_ERROR_LENGTH}

    def test_task_end_without_an_attempt_adds_no_attempt(self, world: World) -> None:
        claim = saved(world.store, new(2))
        world.store.checkpoint(step_on(claim, 0, outcomes=[outcome_of(claim.root, 0, 0)]))
        stored = world.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert (stored.attempts, stored.tasks[0].attempts, stored.tasks[0].status) == ([], 0, states.SUCCESS)

    def test_error_may_contain_any_character(self, world: World) -> None:
        claim = saved(world.store, new(2))
        error = "nul \0, a lone \ud800, and \N{SNOWMAN}"
        failed = last_step(
            claim, 0, states.FAILED, outcomes=[outcome_of(claim.root, 0, status=states.FAILED, error=error)]
        )
        world.store.checkpoint(failed._replace(events=[NewEvent("ended", text=error)]))
        stored = world.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert "\N{SNOWMAN}" in (stored.attempts[0].error or "")
        assert "\N{SNOWMAN}" in (stored.events[-1].text or "")

    def test_built_tasks_are_stored_with_their_nested_operations(self, world: World) -> None:
        claim = saved(world.store, new(None))
        inner = new(2, labels=[("inner", "1")])
        built = BuiltTasks(claim.id, [new_task(), new_task(inner)])
        checkpoint = step_on(
            claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), built=built, events=[NewEvent("built")]
        )
        assert world.store.checkpoint(checkpoint) == states.RUNNING
        row = row_of(world.store, claim.root.uuid)
        assert (row.task_count, row.phase, row.step) == (2, Phase.RUN_TASK, 0)
        first, second = world.store.get_tasks(claim.id)
        child = row_of(world.store, inner.uuid)
        assert (first.child_id, second.child_id) == (None, child.id)
        assert (child.parent_id, child.root_id, child.status) == (claim.id, claim.id, states.PENDING)
        assert child.id > claim.id
        assert len(world.store.get_tasks(child.id)) == 2
        assert world.store.find(OperationQuery(labels=[("inner", "1")], parent=row.uuid), 5).rows == [child]

    def test_ten_thousand_built_tasks_are_stored(self, world: World) -> None:
        claim = saved(world.store, new(None))
        built = BuiltTasks(claim.id, [new_task() for _ in range(10_000)])
        world.store.checkpoint(step_on(claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), built=built))
        assert [task.position for task in world.store.get_tasks(claim.id)] == list(range(10_000))

    # -- fences --------------------------------------------------------------------------------------------------------

    def test_stale_owner_is_fenced_and_records_nothing(self, world: World) -> None:
        """Rules 8 and 11, and what two processes are that both believe they own an operation."""
        stale = saved(world.store, new(3))
        world.pass_by(LEASE + 1)
        fresh = claimed(world.other, stale.root)
        before = world.store.snapshot(stale.root.uuid)
        for checkpoint in (step_on(stale, 0), last_step(stale, 0), step_on(stale, 0, keep=False)):
            with pytest.raises(FencedError):
                world.store.checkpoint(checkpoint)
        assert world.store.snapshot(stale.root.uuid) == before
        assert world.other.checkpoint(step_on(fresh, 0)) == states.RUNNING
        with pytest.raises(FencedError):
            world.store.checkpoint(step_on(stale, 0))

    def test_checkpoint_after_lease_expiry_succeeds_until_another_claim(self, world: World) -> None:
        """Rule 9: a lease that is over is no fence, a claim is."""
        claim = saved(world.store, new(3))
        world.pass_by(LEASE + 1)
        assert world.store.checkpoint(step_on(claim, 0)) == states.RUNNING
        assert due(world.store) == [(claim.root.uuid, DueReason.EXPIRED)]
        assert world.store.checkpoint(step_on(claim, 1)) == states.RUNNING

    def test_checkpoint_after_release_is_fenced(self, world: World) -> None:
        claim = saved(world.store, new(3))
        world.store.checkpoint(step_on(claim, 0, keep=False))
        with pytest.raises(FencedError):
            world.store.checkpoint(step_on(claim, 1))

    def test_checkpoint_from_wrong_step_is_fenced(self, world: World) -> None:
        """Rule 8: the step is current."""
        claim = saved(world.store, new(5))
        world.store.checkpoint(step_on(claim, 0))
        before = world.store.snapshot(claim.root.uuid)
        with pytest.raises(FencedError):
            world.store.checkpoint(step_on(claim, 3))
        assert world.store.snapshot(claim.root.uuid) == before

    def test_checkpoint_from_wrong_phase_is_fenced(self, world: World) -> None:
        """Rule 8: releasing a step must not undo a checkpoint that was recorded meanwhile."""
        claim = saved(world.store, new(3, mode=Mode.DISTRIBUTED))
        world.store.checkpoint(step_on(claim, 0, updates=[update_of(claim.root, 0, phase=Phase.CHOOSE_NEXT)]))
        before = world.store.snapshot(claim.root.uuid)
        with pytest.raises(FencedError):
            world.store.checkpoint(step_on(claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), keep=False))
        assert world.store.snapshot(claim.root.uuid) == before

    def test_checkpoint_from_wrong_step_of_a_nested_operation_is_fenced(self, world: World) -> None:
        inner = new(3)
        claim = saved(world.store, new([new_task(inner)]))
        child = claim.path[1]
        before = world.store.snapshot(inner.uuid), world.store.snapshot(claim.root.uuid)
        updates = [update_of(child._replace(step=1), 2), update_of(claim.root, 0)]
        with pytest.raises(FencedError):
            world.store.checkpoint(step_on(claim, 0, updates=updates, outcomes=[outcome_of(child, 1)]))
        assert (world.store.snapshot(inner.uuid), world.store.snapshot(claim.root.uuid)) == before

    def test_checkpoint_of_a_purged_operation_is_fenced(self, world: World) -> None:
        claim = saved(world.store, new(1))
        world.store.checkpoint(last_step(claim, 0))
        world.pass_by(10)
        assert world.store.purge(5, [states.SUCCESS], 10) == 1
        with pytest.raises(FencedError):
            world.store.checkpoint(last_step(claim, 0))

    # -- again ---------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("keep", [True, False])
    def test_repeated_checkpoint_returns_the_same_status(self, world: World, keep: bool) -> None:
        """Rule 10: after a COMMIT of unknown outcome."""
        claim = saved(world.store, new(3))
        checkpoint = step_on(claim, 0, keep=keep)
        assert world.store.checkpoint(checkpoint) == states.RUNNING
        before = world.store.snapshot(claim.root.uuid)
        assert world.other.checkpoint(checkpoint) == states.RUNNING
        assert world.store.snapshot(claim.root.uuid) == before

    def test_repeated_ending_checkpoint_returns_the_same_status(self, world: World) -> None:
        """Rule 10."""
        for status in (states.SUCCESS, states.FAILED):
            claim = saved(world.store, new(1))
            checkpoint = last_step(claim, 0, status)
            assert world.store.checkpoint(checkpoint) == status
            before = world.store.snapshot(claim.root.uuid)
            assert world.store.checkpoint(checkpoint) == status
            assert world.store.snapshot(claim.root.uuid) == before

    def test_repeated_retry_checkpoint_counts_one_attempt(self, world: World) -> None:
        """Rule 10: the step is the same before and after."""
        for keep in (False, True):
            claim = saved(world.store, new(2))
            failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="no")
            retry = step_on(claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=keep)
            world.store.checkpoint(retry)
            before = world.store.snapshot(claim.root.uuid)
            assert world.store.checkpoint(retry) == states.RUNNING
            assert world.store.snapshot(claim.root.uuid) == before

    def test_repeated_checkpoint_builds_tasks_once(self, world: World) -> None:
        """Rule 10."""
        claim = saved(world.store, new(None))
        built = BuiltTasks(claim.id, [new_task(), new_task(new(1))])
        checkpoint = step_on(claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), built=built)
        world.store.checkpoint(checkpoint)
        before = world.store.snapshot(claim.root.uuid)
        assert world.store.checkpoint(checkpoint) == states.RUNNING
        assert world.store.snapshot(claim.root.uuid) == before

    def test_repeated_checkpoint_after_another_claim_is_fenced(self, world: World) -> None:
        claim = saved(world.store, new(3))
        checkpoint = step_on(claim, 0, keep=False)
        world.store.checkpoint(checkpoint)
        claimed(world.other, claim.root)
        with pytest.raises(FencedError):
            world.store.checkpoint(checkpoint)

    def test_repeated_checkpoint_after_a_resume_is_fenced(self, world: World) -> None:
        """Rule 25: the token is another one."""
        claim = saved(world.store, new(1))
        checkpoint = last_step(claim, 0, states.FAILED)
        world.store.checkpoint(checkpoint)
        resumed(world.store, claim.root.uuid)
        with pytest.raises(FencedError):
            world.store.checkpoint(checkpoint)

    # -- together ------------------------------------------------------------------------------------------------------

    def test_concurrent_checkpoints_are_all_recorded(self, world: World) -> None:
        """Rule 14."""
        claims = [saved(world.store, new(4)) for _ in range(20)]

        def run(claim: Claim) -> list[str]:
            return [world.store.checkpoint(step_on(claim, step)) for step in range(3)] + [
                world.store.checkpoint(last_step(claim, 3))
            ]

        results = at_once(*(lambda claim=claim: run(claim) for claim in claims))
        assert results == [[states.RUNNING] * 3 + [states.SUCCESS]] * 20
        for claim in claims:
            stored = world.store.snapshot(claim.root.uuid)
            assert stored is not None
            assert (stored.operation.status, len(stored.attempts), len(stored.events)) == (states.SUCCESS, 4, 6)
            assert {task.status for task in stored.tasks} == {states.SUCCESS}

    def test_fenced_checkpoint_does_not_affect_concurrent_ones(self, world: World) -> None:
        """Rule 14: each is fenced alone."""
        claims = [saved(world.store, new(3)) for _ in range(12)]
        for stale in claims[::3]:
            world.store.checkpoint(step_on(stale, 0, keep=False))
        results = at_once(
            *(lambda claim=claim: world.store.checkpoint(step_on(claim, 0)) for claim in claims[1::3]),
            *(lambda claim=claim: world.store.checkpoint(step_on(claim, 1)) for claim in claims[::3]),
        )
        assert results[:4] == [states.RUNNING] * 4
        assert [type(result) for result in results[4:]] == [FencedError] * 4

    # -- nested --------------------------------------------------------------------------------------------------------

    def test_end_of_a_nested_operation_ends_the_outer_step_in_one_checkpoint(self, world: World) -> None:
        """Rule 31: up to the root."""
        leaf = new(1)
        middle = new([new_task(leaf)])
        claim = saved(world.store, new([new_task(middle), new_task()]))
        root, two, three = claim.path
        done = {"status": states.SUCCESS, "phase": Phase.END_SUCCESS, "result": '{"inner": 1}'}
        checkpoint = step_on(
            claim,
            0,
            updates=[update_of(three, 0, **done), update_of(two, 0, **done), update_of(root, 1)],
            outcomes=[outcome_of(three, 0), outcome_of(two, 0, 0), outcome_of(root, 0, 0)],
        )
        assert world.store.checkpoint(checkpoint) == states.RUNNING
        for row in (two, three):
            now = row_of(world.store, row.uuid)
            assert (now.status, now.result, now.phase) == (states.SUCCESS, '{"inner": 1}', Phase.END_SUCCESS)
            assert now.started_at is not None
            assert now.ended_at == pytest.approx(world.now, abs=CLOSE)
        now = row_of(world.store, root.uuid)
        assert (now.step, now.status, now.ended_at, now.epoch) == (1, states.RUNNING, None, 1)
        assert [task.status for task in world.store.get_tasks(root.id)] == [states.SUCCESS, states.PENDING]
        before = world.store.snapshot(root.uuid)
        assert world.store.checkpoint(checkpoint) == states.RUNNING
        assert world.store.snapshot(root.uuid) == before

    def test_checkpoint_of_a_nested_step_keeps_the_root_step(self, world: World) -> None:
        inner = new(2)
        claim = saved(world.store, new([new_task(inner)]))
        root, child = claim.path
        checkpoint = step_on(
            claim, 0, updates=[update_of(child, 1), update_of(root, 0)], outcomes=[outcome_of(child, 0)]
        )
        assert world.store.checkpoint(checkpoint) == states.RUNNING
        assert world.store.checkpoint(checkpoint) == states.RUNNING
        now = row_of(world.store, inner.uuid)
        assert (now.step, now.status) == (1, states.RUNNING)
        stored = world.store.snapshot(inner.uuid)
        assert stored is not None
        assert (len(stored.attempts), stored.root_uuid) == (1, root.uuid)
        assert [event.kind for event in stored.events] == ["accepted", "claimed", "task-succeeded"]


class ReaperContract:
    """Tests of leases, due steps and sends."""

    def test_heartbeat_renews_exactly_the_named_claims(self, world: World) -> None:
        """Rule 9: exactly the pairs that are named."""
        claims = [saved(world.store, new(1)) for _ in range(3)]
        world.pass_by(LEASE - 5)
        renewed = world.store.renew([(claim.id, claim.epoch) for claim in claims[:2]], "consumer-a", LEASE)
        assert renewed == {claims[0].id, claims[1].id}
        world.pass_by(10)
        assert due(world.store) == [(claims[2].root.uuid, DueReason.EXPIRED)]
        assert world.store.renew([], "consumer-a", LEASE) == set()

    def test_heartbeat_renews_an_expired_lease_until_another_claim(self, world: World) -> None:
        """Rule 9."""
        claim = saved(world.store, new(1))
        world.pass_by(LEASE + 10)
        assert due(world.store) == [(claim.root.uuid, DueReason.EXPIRED)]
        assert row_of(world.store, claim.root.uuid).owner is None
        assert world.store.renew([(claim.id, claim.epoch)], "consumer-a", LEASE) == {claim.id}
        row = row_of(world.store, claim.root.uuid)
        assert row.owner == "consumer-a"
        assert row.next_check_at == pytest.approx(world.now + LEASE, abs=CLOSE)
        assert isinstance(world.other.claim(row.uuid, row.target.uuid, me()), ClaimRefused)
        world.pass_by(LEASE + 10)
        other = claimed(world.other, row)
        assert world.store.renew([(claim.id, claim.epoch)], "consumer-a", LEASE) == set()
        assert row_of(world.store, row.uuid) == other.root

    def test_heartbeat_does_not_renew_released_or_ended_claims(self, world: World) -> None:
        back, ended = saved(world.store, new(2)), saved(world.store, new(1))
        world.store.checkpoint(step_on(back, 0, keep=False))
        world.store.checkpoint(last_step(ended, 0))
        assert world.store.renew([(back.id, 1), (ended.id, 1), (ended.id, 2), (5, 1)], "consumer-a", LEASE) == set()

    def test_unsent_step_is_due_after_a_few_seconds(self, world: World) -> None:
        """Rules 1 and 20."""
        operation = new(2)
        world.store.save(operation)
        assert due(world.store) == []
        world.pass_by(RESEND_UNSENT_AFTER + 1)
        row = row_of(world.store, operation.uuid)
        steps = world.store.take_due_steps(5, "reaper", expired=True)
        assert steps == [DueStep(id=row.id, uuid=row.uuid, epoch=0, target=operation.target, reason=DueReason.UNSENT)]
        now = row_of(world.store, operation.uuid)
        assert (now.send_count, now.sent_at) == (0, None)
        assert now.next_check_at == pytest.approx(world.now + SEND_GRACE, abs=CLOSE)
        stored = world.store.snapshot(operation.uuid)
        assert stored is not None
        event = stored.events[-1]
        assert event == EventRow(
            root_id=row.id,
            at=event.at,
            kind="sent-again",
            epoch=0,
            consumer="reaper",
            uuid=None,
            text=DueReason.UNSENT,
        )

    def test_sent_step_is_due_again_with_doubling_backoff(self, world: World) -> None:
        """Rule 20: ``resend_after``, doubling to an hour."""
        operation = new(2)
        world.store.save(operation)
        row = row_of(world.store, operation.uuid)
        world.store.mark_sent([(row.id, row.epoch)], RESEND)
        row = row_of(world.store, operation.uuid)
        assert row.send_count == 1
        assert row.sent_at == pytest.approx(world.now, abs=CLOSE)
        waits = [RESEND]
        for _ in range(8):
            world.pass_by(waits[-1] - 10)
            assert due(world.store) == []
            world.pass_by(20)
            before = world.now
            assert due(world.store) == [(row.uuid, DueReason.UNCLAIMED)]
            world.store.mark_sent([(row.id, row.epoch)], RESEND)
            next_check_at = row_of(world.store, row.uuid).next_check_at
            assert next_check_at is not None
            waits.append(next_check_at - before)
        assert waits == pytest.approx([60, 120, 240, 480, 960, 1920, *[MAX_RESEND_DELAY] * 3], abs=CLOSE)

    def test_claim_counts_as_successful_send(self, world: World) -> None:
        """Rule 15: a send is recorded lazily, and recording it changes nothing after the claim."""
        operation = new(2)
        world.store.save(operation)
        row = row_of(world.store, operation.uuid)
        claim = claimed(world.store, row)
        world.store.mark_sent([(row.id, 0), (row.id, 1)], RESEND)
        assert row_of(world.store, row.uuid) == claim.root
        world.store.checkpoint(last_step(claim, 0))
        ended = row_of(world.store, row.uuid)
        world.store.mark_sent([(row.id, ended.epoch)], RESEND)
        assert row_of(world.store, row.uuid) == ended
        world.store.mark_sent([], RESEND)

    def test_delayed_retry_is_not_due_before_due_at(self, world: World) -> None:
        claim = saved(world.store, new(2))
        world.store.checkpoint(step_on(claim, 0, keep=False, delay=500))
        world.store.mark_sent([(claim.id, 2)], RESEND)
        world.pass_by(RESEND + 10)
        assert due(world.store) == []
        world.pass_by(500)
        assert due(world.store) == [(claim.root.uuid, DueReason.UNCLAIMED)]

    def test_step_of_a_dead_reaper_is_due_for_another_reaper(self, world: World) -> None:
        """Rule 20: a reaper may die as any other process."""
        operation = new(1)
        world.store.save(operation)
        world.pass_by(RESEND_UNSENT_AFTER + 1)
        assert due(world.store) == [(operation.uuid, DueReason.UNSENT)]
        world.pass_by(SEND_GRACE - 1)
        assert due(world.other) == []
        world.pass_by(2)
        assert due(world.other) == [(operation.uuid, DueReason.UNSENT)]

    def test_each_due_step_is_taken_by_one_reaper(self, world: World) -> None:
        """Rule 20: N reapers act once."""
        rows = [new(1) for _ in range(30)]
        for operation in rows:
            world.store.save(operation)
        world.pass_by(RESEND_UNSENT_AFTER + 1)
        results = at_once(*(lambda store=store: due(store, 30) for store in (world.store, world.other) * 3))
        taken = [uuid for result in results for uuid, _ in result]
        assert sorted(taken) == sorted(operation.uuid for operation in rows)

    def test_take_due_respects_its_limit_and_takes_the_longest_due_first(self, world: World) -> None:
        operations = [new(1) for _ in range(5)]
        for operation in operations:
            world.store.save(operation)
            world.pass_by(1)
        world.pass_by(RESEND_UNSENT_AFTER + 1)
        parts = [due(world.store, 2), due(world.store, 2), due(world.store, 2)]
        assert [[uuid for uuid, _ in part] for part in parts] == [
            [operation.uuid for operation in operations[:2]],
            [operation.uuid for operation in operations[2:4]],
            [operations[4].uuid],
        ]

    def test_lease_expiry_counts_as_due_only_when_requested(self, world: World) -> None:
        """Rule 21: the store's part."""
        claim, operation = saved(world.store, new(1)), new(1)
        world.store.save(operation)
        world.pass_by(LEASE + 1)
        assert due(world.store, expired=False) == [(operation.uuid, DueReason.UNSENT)]
        assert due(world.store, expired=False) == []
        assert due(world.store, 1) == [(claim.root.uuid, DueReason.EXPIRED)]
        row = row_of(world.store, claim.root.uuid)
        assert (row.owner, row.epoch, row.token, row.send_count) == (None, 1, claim.root.token, 0)
        assert claimed(world.other, row).epoch == 2

    def test_step_that_could_not_be_sent_is_due_again(self, world: World) -> None:
        operation = new(1)
        world.store.save(operation)
        world.pass_by(RESEND_UNSENT_AFTER + 1)
        (taken,) = world.store.take_due_steps(5, "reaper", expired=True)
        world.store.postpone_send([(taken.id, taken.epoch)], 5)
        assert due(world.store) == []
        world.pass_by(6)
        assert due(world.store) == [(operation.uuid, DueReason.UNSENT)]

    def test_postponed_send_does_not_affect_a_claimed_step(self, world: World) -> None:
        operation = new(1)
        world.store.save(operation)
        claim = claimed(world.store, row_of(world.store, operation.uuid))
        world.store.postpone_send([(claim.id, 0), (claim.id, 1)], 5)
        assert row_of(world.store, operation.uuid) == claim.root

    def test_ended_operation_is_never_due(self, world: World) -> None:
        claim = saved(world.store, new(1))
        world.store.checkpoint(last_step(claim, 0))
        world.store.postpone_send([(claim.id, 2)], 0)
        world.pass_by(100_000)
        assert due(world.store) == []


class LifecycleContract:
    """Tests of cancel, resume and purge."""

    def test_cancel_of_an_unclaimed_operation_takes_effect_at_once(self, world: World) -> None:
        """Rule 24, with everything in it; what has ended stays."""
        done, never = new(1), new([new_task(new(1))])
        claim = saved(world.store, new([new_task(done), new_task(never)]))
        root, first = claim.path
        ended = update_of(first, 0, status=states.SUCCESS, phase=Phase.END_SUCCESS, result="{}")
        outcomes = [outcome_of(first, 0), outcome_of(root, 0, 0)]
        world.store.checkpoint(step_on(claim, 0, updates=[ended, update_of(root, 1)], outcomes=outcomes, keep=False))
        before = row_of(world.store, root.uuid)
        row = world.other.cancel(root.uuid, "changed my mind")
        assert row is not None
        assert row == row_of(world.store, root.uuid)
        assert (row.status, row.cancel_reason, row.owner, row.token) == (
            *(states.CANCELLED, "changed my mind"),
            *(None, None),
        )
        assert (row.epoch, row.next_check_at) == (before.epoch + 1, None)
        assert row.ended_at == pytest.approx(world.now, abs=CLOSE)
        assert row_of(world.store, done.uuid).status == states.SUCCESS
        children = [row for row in world.store.get_children(root.id) if row.uuid != done.uuid]
        assert {row.status for row in children} == {states.CANCELLED}
        assert kinds(world.store, root.uuid)[-1] == "ended"
        assert world.store.cancel(root.uuid, "again") == row

    def test_cancel_of_an_operation_that_never_started_takes_effect_at_once(self, world: World) -> None:
        operation = new(2)
        world.store.save(operation)
        row = world.store.cancel(operation.uuid, None)
        assert row is not None
        assert (row.status, row.cancel_reason, row.started_at) == (states.CANCELLED, None, None)
        refusal = world.store.claim(row.uuid, row.target.uuid, me())
        assert refusal == ClaimRefused(RefusalReason.ENDED, row)

    def test_cancel_after_lease_expiry_takes_effect_at_once(self, world: World) -> None:
        claim = saved(world.store, new(2))
        world.pass_by(LEASE + 1)
        row = world.store.cancel(claim.root.uuid, None)
        assert row is not None
        assert row.status == states.CANCELLED
        with pytest.raises(FencedError):
            world.store.checkpoint(step_on(claim, 0))

    def test_cancel_of_a_running_operation_takes_effect_at_its_next_checkpoint(self, world: World) -> None:
        """Rule 24: the running task's result is still recorded, then CANCELLED."""
        inner = new(2)
        claim = saved(world.store, new([new_task(), new_task(inner)]))
        row = world.other.cancel(claim.root.uuid, "why \0")
        assert row is not None
        assert (row.status, row.cancel_requested, row.epoch) == (states.RUNNING, True, 1)
        assert (row.owner, row.next_check_at) == (claim.root.owner, claim.root.next_check_at)
        assert (row.cancel_reason or "").startswith("why")
        assert kinds(world.store, row.uuid)[-1] == "cancel-requested"
        assert world.store.checkpoint(step_on(claim, 0)) == states.CANCELLED
        stored = world.store.snapshot(row.uuid)
        assert stored is not None
        row = stored.operation
        assert (row.status, row.step, row.accumulated, row.epoch) == (states.CANCELLED, 1, '{"up to": 1}', 2)
        assert (row.owner, row.next_check_at) == (None, None)
        assert row.ended_at == pytest.approx(world.now, abs=CLOSE)
        assert (stored.tasks[0].status, stored.tasks[0].result) == (states.SUCCESS, '{"of": 0}')
        assert row_of(world.store, inner.uuid).status == states.CANCELLED
        assert [(event.kind, event.text) for event in stored.events[-2:]] == [
            ("task-succeeded", None),
            ("ended", states.CANCELLED),
        ]

    def test_repeated_checkpoint_of_a_cancelled_operation_returns_cancelled(self, world: World) -> None:
        """Rules 10 and 24."""
        claim = saved(world.store, new(3))
        world.store.cancel(claim.root.uuid, None)
        for checkpoint in (step_on(claim, 0), step_on(claim, 0)):
            assert world.store.checkpoint(checkpoint) == states.CANCELLED
        assert kinds(world.store, claim.root.uuid).count("ended") == 1

    @pytest.mark.parametrize("status", [states.SUCCESS, states.FAILED])
    def test_last_checkpoint_of_a_cancelled_operation_returns_cancelled(self, world: World, status: str) -> None:
        """The status in the update of the root does not matter."""
        claim = saved(world.store, new(1))
        world.store.cancel(claim.root.uuid, None)
        assert world.store.checkpoint(last_step(claim, 0, status)) == states.CANCELLED
        stored = world.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert stored.tasks[0].status == status
        assert [event.text for event in stored.events if event.kind == "ended"] == [states.CANCELLED]

    @pytest.mark.parametrize("keep", [True, False])
    def test_retry_of_a_cancelled_operation_returns_cancelled(self, world: World, keep: bool) -> None:
        claim = saved(world.store, new(1))
        world.store.cancel(claim.root.uuid, None)
        failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="no")
        retry = step_on(
            claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=keep, delay=0 if keep else 60
        )
        assert world.store.checkpoint(retry) == states.CANCELLED
        assert world.store.checkpoint(retry) == states.CANCELLED
        row = row_of(world.store, claim.root.uuid)
        assert (row.status, row.next_check_at) == (states.CANCELLED, None)

    def test_cancel_during_a_nested_step_cancels_all_outer_operations(self, world: World) -> None:
        """Rule 31: cancel goes through the root."""
        inner = new(2)
        claim = saved(world.store, new([new_task(inner)]))
        root, child = claim.path
        world.store.cancel(root.uuid, None)
        checkpoint = step_on(
            claim, 0, updates=[update_of(child, 1), update_of(root, 0)], outcomes=[outcome_of(child, 0)]
        )
        assert world.store.checkpoint(checkpoint) == states.CANCELLED
        now = row_of(world.store, inner.uuid)
        assert (now.status, now.step) == (states.CANCELLED, 1)
        assert now.ended_at == pytest.approx(world.now, abs=CLOSE)
        assert world.store.get_tasks(child.id)[0].status == states.SUCCESS

    def test_stale_owner_of_a_cancelled_operation_is_fenced(self, world: World) -> None:
        stale = saved(world.store, new(3))
        world.pass_by(LEASE + 1)
        claimed(world.other, stale.root)
        world.store.cancel(stale.root.uuid, None)
        with pytest.raises(FencedError):
            world.store.checkpoint(step_on(stale, 0))
        assert row_of(world.store, stale.root.uuid).status == states.RUNNING

    def test_cancel_after_the_end_changes_nothing(self, world: World) -> None:
        """Rule 24: cancel returns the real status."""
        for status in (states.SUCCESS, states.FAILED):
            claim = saved(world.store, new(1))
            world.store.checkpoint(last_step(claim, 0, status))
            before = world.store.snapshot(claim.root.uuid)
            assert before is not None
            assert world.store.cancel(claim.root.uuid, "late") == before.operation
            assert world.store.snapshot(claim.root.uuid) == before

    def test_cancel_and_resume_accept_only_root_operations(self, world: World) -> None:
        """Rule 31."""
        inner = new(1)
        world.store.save(new([new_task(inner)]))
        for uuid in (inner.uuid, name()):
            assert world.store.cancel(uuid, None) is None
            assert world.store.resume(uuid, 0, name()) is None

    # -- resume --------------------------------------------------------------------------------------------------------

    def _failed(self, store: Store, **values: Any) -> OperationRow:
        """A root of three tasks, the second of which failed."""
        claim = saved(store, new(3, **values))
        store.checkpoint(step_on(claim, 0))
        store.checkpoint(last_step(claim, 1, states.FAILED))
        return row_of(store, claim.root.uuid)

    def test_resume_continues_at_the_failed_task(self, world: World) -> None:
        """Rule 25."""
        failed = self._failed(world.store)
        row = world.other.resume(failed.uuid, failed.epoch, "token")
        assert row is not None
        assert row == row_of(world.store, failed.uuid)
        assert (row.status, row.phase, row.step, row.epoch) == (states.RUNNING, Phase.RUN_TASK, 1, failed.epoch + 1)
        assert (row.owner, row.token, row.result, row.ended_at) == (None, "token", None, None)
        assert (row.cancel_requested, row.cancel_reason) == (False, None)
        assert (row.claim_count, row.send_count, row.sent_at) == (0, 0, None)
        assert row.next_check_at == pytest.approx(world.now + RESEND_UNSENT_AFTER, abs=CLOSE)
        assert row.due_at <= world.now
        assert row.target == failed.target
        assert row.started_at == failed.started_at
        task = world.store.get_tasks(row.id)[1]
        assert (task.status, task.result, task.attempts) == (states.PENDING, None, 1)
        assert kinds(world.store, row.uuid)[-1] == "resumed"
        claim = claimed(world.store, row)
        assert (claim.task, claim.epoch) == (task, row.epoch + 1)
        assert world.store.checkpoint(step_on(claim, 1, outcomes=[outcome_of(row, 1, 2)])) == states.RUNNING

    def test_resume_of_a_distributed_operation_targets_the_failed_task(self, world: World) -> None:
        failed = self._failed(world.store, mode=Mode.DISTRIBUTED)
        row = resumed(world.store, failed.uuid)
        assert row is not None
        task = world.store.get_tasks(row.id)[1]
        assert row.target == StepMessage(task.uuid, task.entrypoint, task.topic)

    def test_resume_of_a_cancelled_operation_continues_it(self, world: World) -> None:
        """Rule 26."""
        claim = saved(world.store, new(2))
        world.store.cancel(claim.root.uuid, "stop")
        world.store.checkpoint(step_on(claim, 0))
        row = resumed(world.store, claim.root.uuid)
        assert row is not None
        assert (row.status, row.step, row.cancel_requested, row.cancel_reason) == (states.RUNNING, 1, False, None)
        claim = claimed(world.store, row)
        assert world.store.checkpoint(last_step(claim, 1)) == states.SUCCESS

    def test_resume_of_an_operation_with_unbuilt_tasks_starts_it(self, world: World) -> None:
        for mode in ("local", Mode.DISTRIBUTED):
            operation = new(None, mode=mode)
            world.store.save(operation)
            world.store.cancel(operation.uuid, None)
            row = resumed(world.store, operation.uuid)
            assert row is not None
            assert (row.phase, row.step, row.status) == (Phase.BUILD, 0, states.RUNNING)
            assert row.target == operation.target

    def test_resume_after_all_tasks_succeeded_repeats_only_the_end(self, world: World) -> None:
        """Rule 23: a raising ``onsuccess`` made it FAILED."""
        claim = saved(world.store, new(1, mode=Mode.DISTRIBUTED))
        end = last_step(claim, 0, states.FAILED, outcomes=[outcome_of(claim.root, 0)])
        world.store.checkpoint(end._replace(target=StepMessage("else", "shop.Else", "else")))
        row = resumed(world.store, claim.root.uuid)
        assert row is not None
        assert (row.phase, row.status) == (Phase.END_SUCCESS, states.RUNNING)
        assert row.target == StepMessage(row.uuid, row.entrypoint, row.topic)

    def test_resume_descends_to_the_innermost_operation(self, world: World) -> None:
        """Rules 25 and 31."""
        leaf = new(2)
        middle = new([new_task(leaf)])
        claim = saved(world.store, new([new_task(), new_task(middle)], mode=Mode.DISTRIBUTED))
        world.store.checkpoint(step_on(claim, 0, keep=False))
        claim = claimed(world.store, row_of(world.store, claim.root.uuid))
        root, two, three = claim.path
        world.store.checkpoint(
            step_on(
                claim,
                1,
                updates=[update_of(three, 1), update_of(two, 0), update_of(root, 1)],
                outcomes=[outcome_of(three, 0)],
            )
        )
        failed: dict[str, Any] = {"status": states.FAILED, "phase": "FAILED", "result": "{}"}
        moves = [
            update_of(three._replace(step=1), 1, **failed),
            update_of(two, 0, **failed),
            update_of(root, 1, **failed),
        ]
        broken = {"status": states.FAILED, "error": "no"}
        ends = [outcome_of(three, 1, **broken), outcome_of(two, 0, 0, **broken), outcome_of(root, 1, 0, **broken)]
        assert world.store.checkpoint(step_on(claim, 1, updates=moves, outcomes=ends)) == states.FAILED
        row = resumed(world.store, root.uuid)
        assert row is not None
        assert [row_of(world.store, each.uuid).status for each in claim.path] == [states.RUNNING] * 3
        task = world.store.get_tasks(three.id)[1]
        assert row.target == StepMessage(task.uuid, task.entrypoint, task.topic)
        assert [world.store.get_tasks(each.id)[-1].status for each in claim.path] == [states.PENDING] * 3
        again = claimed(world.store, row)
        assert [each.uuid for each in again.path] == [root.uuid, middle.uuid, leaf.uuid]
        assert again.task == task
        inner = row_of(world.store, leaf.uuid)
        assert (inner.ended_at, inner.result, inner.step, inner.phase) == (None, None, 1, Phase.RUN_TASK)

    def test_resume_of_an_operation_that_did_not_fail_is_rejected(self, world: World) -> None:
        """Rule 26."""
        waiting, running, done = new(1), saved(world.store, new(1)), saved(world.store, new(1))
        world.store.save(waiting)
        world.store.checkpoint(last_step(done, 0))
        for uuid in (waiting.uuid, running.root.uuid, done.root.uuid):
            before = world.store.snapshot(uuid)
            with pytest.raises(StateConflict):
                resumed(world.store, uuid)
            assert world.store.snapshot(uuid) == before

    def test_concurrent_resumes_have_one_winner(self, world: World) -> None:
        """Rule 25."""
        failed = self._failed(world.store)
        answers = at_once(
            *(lambda store=store: resumed(store, failed.uuid) for store in (world.store, world.other) * 3)
        )
        assert sorted(type(answer).__name__ for answer in answers) == ["OperationRow"] + ["StateConflict"] * 5
        assert row_of(world.store, failed.uuid).epoch == failed.epoch + 1

    def test_concurrent_resumes_from_one_row_have_one_winner(self, world: World) -> None:
        """Rule 25: every caller has seen the same epoch."""
        failed = self._failed(world.store)

        def resume(store: Store) -> OperationRow | None:
            return store.resume(failed.uuid, failed.epoch, name())

        answers = at_once(*(lambda store=store: resume(store) for store in (world.store, world.other) * 3))
        assert sorted(type(answer).__name__ for answer in answers) == ["OperationRow"] + ["StateConflict"] * 5
        assert row_of(world.store, failed.uuid).epoch == failed.epoch + 1

    def test_repeated_resume_returns_the_same_row_and_changes_nothing(self, world: World) -> None:
        """Rules 10 and 25: the response to the first call was lost."""
        failed = self._failed(world.store, mode=Mode.DISTRIBUTED)
        row = world.store.resume(failed.uuid, failed.epoch, "token")
        before = world.store.snapshot(failed.uuid)
        assert world.other.resume(failed.uuid, failed.epoch, "token") == row
        assert world.store.snapshot(failed.uuid) == before
        for epoch, token in ((failed.epoch, "other"), (failed.epoch + 1, "token"), (failed.epoch + 1, "other")):
            with pytest.raises(StateConflict, match="is RUNNING: only a FAILED or CANCELLED one can be resumed"):
                world.store.resume(failed.uuid, epoch, token)
        assert world.store.snapshot(failed.uuid) == before

    def test_resume_with_an_old_epoch_is_rejected(self, world: World) -> None:
        """Rule 25: the operation was resumed and has failed again since the caller has read it."""
        failed = self._failed(world.store)
        claim = claimed(world.store, resumed(world.store, failed.uuid))
        world.store.checkpoint(last_step(claim, 1, states.FAILED, outcomes=[outcome_of(claim.root, 1, 2)]))
        before = world.store.snapshot(failed.uuid)
        for epoch in (failed.epoch, failed.epoch + 1):
            with pytest.raises(StateConflict, match="has changed since it was read, and is FAILED"):
                world.store.resume(failed.uuid, epoch, name())
        assert world.store.snapshot(failed.uuid) == before

    # -- purge ---------------------------------------------------------------------------------------------------------

    def test_purge_deletes_old_ended_operations_with_all_their_rows(self, world: World) -> None:
        inner = new(1, labels=[("a", "1")])
        claim = saved(world.store, new([new_task(inner)], labels=[("a", "1")]))
        root, child = claim.path
        done = {"status": states.SUCCESS, "phase": Phase.END_SUCCESS, "result": "{}"}
        updates = [update_of(child, 0, **done), update_of(root, 0, **done)]
        world.store.checkpoint(
            step_on(claim, 0, updates=updates, outcomes=[outcome_of(child, 0), outcome_of(root, 0, 0)])
        )
        young = saved(world.store, new(1))
        assert world.store.purge(60, [states.SUCCESS], 10) == 0
        world.pass_by(100)
        world.store.checkpoint(last_step(young, 0))
        assert world.store.purge(60, [states.FAILED], 10) == 0
        assert world.store.purge(60, [states.SUCCESS, states.FAILED], 10) == 1
        assert world.store.snapshot(root.uuid) is None
        assert world.store.snapshot(inner.uuid) is None
        assert (world.store.get_tasks(root.id), world.store.get_tasks(child.id), world.store.get_children(root.id)) == (
            [],
            [],
            [],
        )
        assert world.store.find(OperationQuery(labels=[("a", "1")]), 5).rows == []
        assert world.store.get_operation(young.root.uuid) is not None
        # The uuid is free again, with nothing left of before.
        again = saved(world.store, new([new_task(inner)], uuid=root.uuid))
        stored = world.store.snapshot(again.root.uuid)
        assert stored is not None
        assert (len(stored.events), stored.attempts) == (2, [])

    def test_purge_deletes_in_batches(self, world: World) -> None:
        for status in (states.SUCCESS, states.FAILED) * 4:
            world.store.checkpoint(last_step(saved(world.store, new(1)), 0, status))
        world.pass_by(100)
        every = [states.SUCCESS, states.FAILED]
        assert [world.store.purge(60, every, 3) for _ in range(4)] == [3, 3, 2, 0]

    def test_purge_keeps_unfinished_operations(self, world: World) -> None:
        saved(world.store, new(1))
        world.store.save(new(1))
        world.pass_by(1000)
        assert world.store.purge(0, [states.PENDING, states.RUNNING], 10) == 0


class FindContract:
    """Tests of get and find."""

    def test_snapshot_contains_operation_tasks_attempts_and_events(self, world: World) -> None:
        claim = saved(world.store, new(2))
        world.store.checkpoint(step_on(claim, 0))
        stored = world.other.snapshot(claim.root.uuid)
        assert stored is not None
        assert stored.operation == row_of(world.store, claim.root.uuid)
        assert list(stored.tasks) == list(world.store.get_tasks(claim.id))
        assert {event.kind for event in stored.events} <= EVENTS.keys()
        assert {event.root_id for event in stored.events} == {claim.id}
        assert world.store.snapshot(name()) is None

    def test_find_returns_the_newest_first_page_by_page(self, world: World) -> None:
        operations = [new(1) for _ in range(7)]
        for operation in operations:
            world.store.save(operation)
        uuids: list[str] = []
        sizes = []
        cursor = None
        while True:
            page = world.other.find(OperationQuery(), 3, cursor)
            uuids += (row.uuid for row in page.rows)
            sizes.append(len(page.rows))
            cursor = page.cursor
            # A later operation does not change the pages that follow.
            world.store.save(new(1, entrypoint="shop.Late"))
            if cursor is None:
                break
        assert uuids == [operation.uuid for operation in reversed(operations)]
        assert sizes == [3, 3, 1]

    def test_full_last_page_has_no_cursor(self, world: World) -> None:
        for _ in range(3):
            world.store.save(new(1))
        assert world.store.find(OperationQuery(), 3).cursor is None

    @pytest.mark.parametrize("after", ["", "x", "-1", "1.5", str(1 << 63), "²"])
    def test_find_rejects_an_invalid_cursor(self, world: World, after: str) -> None:
        with pytest.raises(UsageError, match="cursor"):
            world.store.find(OperationQuery(), 3, after)

    def _some(self, world: World) -> dict[str, OperationRow]:
        """Operations of all kinds, one a minute."""
        store = world.store
        rows: dict[str, OperationRow] = {}
        for which, entrypoint, status in (
            ("pending", "shop.PlaceOrder", None),
            ("running", "shop.PlaceOrder", ""),
            ("failed", "shop.PlaceOrder", states.FAILED),
            ("success", "shop.PlaceOrder", states.SUCCESS),
            ("refund", "shop.Refund", states.FAILED),
        ):
            labels = [("which", which), ("customer", "7" if which in ("failed", "refund") else "8")]
            operation = new(1, entrypoint=entrypoint, labels=labels)
            claim = None if status is None else saved(store, operation)
            if claim is None:
                store.save(operation)
            elif status:
                store.checkpoint(last_step(claim, 0, status))
            rows[which] = row_of(store, operation.uuid)
            world.pass_by(60)
        return rows

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            (OperationQuery(), "refund success failed running pending"),
            (OperationQuery(status=["FAILED"]), "refund failed"),
            (OperationQuery(status={"PENDING", "SUCCESS"}), "success pending"),
            (OperationQuery(status=[]), ""),
            (OperationQuery(status=["UNHEARD"]), ""),
            (OperationQuery(entrypoint="shop.Refund"), "refund"),
            (OperationQuery(entrypoint="shop.PlaceOrder"), "success failed running pending"),
            (OperationQuery(entrypoint="shop.PlaceOrder", status=["FAILED"]), "failed"),
            (OperationQuery(entrypoint="shop.Other"), ""),
            (OperationQuery(labels=[("customer", "7")]), "refund failed"),
            (OperationQuery(labels=[("customer", "7"), ("which", "failed")]), "failed"),
            (OperationQuery(labels=[("customer", "7"), ("which", "running")]), ""),
            (OperationQuery(labels=[("customer", "7")], entrypoint="shop.Refund"), "refund"),
            (OperationQuery(labels=[("customer", "8")], status=["RUNNING", "PENDING"]), "running pending"),
            (OperationQuery(labels=[("customer", "8")], status=[]), ""),
            (OperationQuery(labels=[("customer", "%")]), ""),
            (OperationQuery(parent="nobody"), ""),
        ],
    )
    def test_find_applies_every_filter(self, world: World, query: OperationQuery, expected: str) -> None:
        """An operation must match every filter of the query."""
        rows = self._some(world)
        assert world.store.find(query, 10).rows == [rows[which] for which in expected.split()]

    def test_find_filters_by_creation_time(self, world: World) -> None:
        """From ``since`` on, and before ``until``, exactly."""
        rows = self._some(world)
        since, until = rows["running"].created_at, rows["success"].created_at

        def find(**values: Any) -> list[OperationRow]:
            return list(world.store.find(OperationQuery(**values), 10).rows)

        assert find(since=since) == [rows[which] for which in ("refund", "success", "failed", "running")]
        assert find(until=until) == [rows[which] for which in ("failed", "running", "pending")]
        assert find(since=since, until=until) == [rows["failed"], rows["running"]]
        assert find(since=since, until=until, status=["FAILED"]) == [rows["failed"]]
        assert find(since=since, until=until, labels=[("customer", "8")]) == [rows["running"]]
        assert find(since=until, until=since) == []
        assert find(since=world.now + 60) == []
        assert find(until=0) == []

    def test_find_returns_roots_unless_a_parent_is_given(self, world: World) -> None:
        """Rule 31."""
        leaf = new(1)
        one, two = new([new_task(leaf)], entrypoint="shop.One"), new(1, labels=[("a", "1")])
        outer = new([new_task(one), new_task(two)], labels=[("a", "1")])
        world.store.save(outer)
        saved_row = row_of(world.store, outer.uuid)

        def find(**values: Any) -> list[str]:
            return [row.uuid for row in world.store.find(OperationQuery(**values), 10).rows]

        assert find() == [outer.uuid]
        assert find(labels=[("a", "1")]) == [outer.uuid]
        assert find(parent=outer.uuid) == [two.uuid, one.uuid]
        assert find(parent=one.uuid) == [leaf.uuid]
        assert find(parent=leaf.uuid) == []
        assert find(parent=outer.uuid, entrypoint="shop.One") == [one.uuid]
        assert find(parent=outer.uuid, status=["FAILED"]) == []
        assert find(parent=outer.uuid, labels=[("a", "1")]) == [two.uuid]
        assert find(parent=outer.uuid, since=saved_row.created_at - 5) == [two.uuid, one.uuid]
        page = world.store.find(OperationQuery(parent=outer.uuid), 1)
        assert world.store.find(OperationQuery(parent=outer.uuid), 1, page.cursor).rows == [
            row_of(world.store, one.uuid)
        ]

    def test_label_may_have_any_length(self, world: World) -> None:
        operation = new(1, labels=[("k" * 1000, "\N{SNOWMAN}" * 20_000), ("k", "")])
        world.store.save(operation)
        for pair in operation.labels:
            assert [row.uuid for row in world.store.find(OperationQuery(labels=[pair]), 5).rows] == [operation.uuid]

    def test_special_characters_are_stored_as_plain_text(self, world: World) -> None:
        """Quotes, percent signs, colons and question marks have no special meaning."""
        text = "'; DROP TABLE kser_operation; -- %s %(x)s :x ? $1 \\ \""
        operation = new(1, uuid=text, entrypoint=text, labels=[(text, text)])
        world.store.save(operation)
        assert row_of(world.store, text).entrypoint == text
        query = OperationQuery(entrypoint=text, labels=[(text, text)], status=["PENDING"])
        assert [row.uuid for row in world.store.find(query, 5).rows] == [text]


class StoreContract(SaveAndClaimContract, CheckpointContract, ReaperContract, LifecycleContract, FindContract):
    """The whole store contract."""
