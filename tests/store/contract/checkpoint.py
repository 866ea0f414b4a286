"""Contract tests of checkpoints."""

from __future__ import annotations

import pytest

from kser import status as states
from kser.errors import FencedError
from kser.store.model import (
    MAX_ERROR_LENGTH,
    RESEND_UNSENT_AFTER,
    SEND_DELAY,
    AttemptRow,
    BuiltTasks,
    Claim,
    ClaimRefused,
    DueReason,
    EventRow,
    Mode,
    NewEvent,
    OperationQuery,
    Phase,
    RefusalReason,
    StepMessage,
)
from tests.store.harness import (
    LEASE,
    TIME_TOLERANCE,
    StoreHarness,
    claim_request,
    claim_root,
    due_steps,
    ending_checkpoint,
    event_kinds,
    new_operation,
    new_task,
    outcome_of,
    reserved_steps,
    resume_stored,
    row_of,
    save_and_claim,
    step_checkpoint,
    update_of,
)
from tests.support import run_concurrently


class CheckpointContract:
    """The contract of checkpoints."""

    def test_checkpoint_records_result_attempt_event_and_step_together(self, harness: StoreHarness) -> None:
        """Rule 13: one transaction writes the results of task and operation, the attempt, the events and the step."""
        claim = save_and_claim(harness.store, new_operation(3))
        assert harness.store.checkpoint(step_checkpoint(claim, 0)) == states.RUNNING
        stored = harness.other.snapshot(claim.root.uuid)
        assert stored is not None
        assert stored.operation == claim.root._replace(
            step=1, accumulated='{"up to": 1}', claim_count=0, current_entrypoints=None
        )
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
        assert attempt.ended_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
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
        assert event.at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert stored.root_uuid == claim.root.uuid

    def test_ending_checkpoint_releases_the_claim(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(1))
        assert harness.store.checkpoint(ending_checkpoint(claim, 0)) == states.SUCCESS
        row = row_of(harness.store, claim.root.uuid)
        assert (row.status, row.result, row.phase) == (states.SUCCESS, '{"all": "over"}', Phase.END_SUCCESS)
        assert (row.epoch, row.owner, row.lease_until) == (2, None, None)
        assert (row.take_at, row.send_at, row.due_reason) == (None, None, None)
        assert row.ended_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert event_kinds(harness.store, row.uuid) == ["accepted", "claimed", "ended"]

    def test_checkpoint_may_record_the_result_before_the_end(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(1))
        update = update_of(claim.root, 0, phase=Phase.END_SUCCESS, result='{"nearly": 1}')
        harness.store.checkpoint(step_checkpoint(claim, 0, updates=[update], keep=False))
        row = row_of(harness.store, claim.root.uuid)
        assert (row.result, row.status, row.ended_at) == ('{"nearly": 1}', states.RUNNING, None)

    def test_released_claim_can_be_claimed_by_any_consumer(self, harness: StoreHarness) -> None:
        """Rule 30: a hand-over releases the claim."""
        claim = save_and_claim(harness.store, new_operation(3))
        target = StepMessage("task-1", "shop.Ship", "gpu")
        assert harness.store.checkpoint(step_checkpoint(claim, 0, keep=False, target=target)) == states.RUNNING
        row = row_of(harness.store, claim.root.uuid)
        assert (row.epoch, row.owner, row.target, row.claim_count) == (2, None, target, 0)
        assert (row.send_count, row.sent_at) == (0, None)
        assert (row.lease_until, row.due_reason) == (None, DueReason.UNSENT)
        assert row.take_at == row.send_at == pytest.approx(row.due_at + RESEND_UNSENT_AFTER, abs=0.001)
        assert row.due_at <= harness.now
        assert claim_root(harness.other, row).epoch == 3

    @pytest.mark.parametrize("keep", [True, False])
    def test_checkpoint_stores_the_class_of_the_next_task(self, harness: StoreHarness, keep: bool) -> None:
        """Rule 6: a local operation is taken over only where the class of its current task is known."""
        claim = save_and_claim(harness.store, new_operation(3))
        harness.store.checkpoint(step_checkpoint(claim, 0, current_entrypoints='["shop.Ship"]', keep=keep))
        assert row_of(harness.other, claim.root.uuid).current_entrypoints == '["shop.Ship"]'

    def test_kept_claim_may_get_another_target(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(3, mode=Mode.DISTRIBUTED))
        target = StepMessage(claim.root.uuid, "shop.PlaceOrder", "gpu")
        harness.store.checkpoint(step_checkpoint(claim, 0, target=target))
        row = row_of(harness.store, claim.root.uuid)
        assert (row.target, row.owner, row.take_at) == (target, claim.root.owner, claim.root.take_at)

    def test_released_step_is_due_at_once(self, harness: StoreHarness) -> None:
        """Rule 30: the next consumer takes the step over, and its message is sent if nobody has within a second."""
        claim = save_and_claim(harness.store, new_operation(3))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False, due_reason=DueReason.RELEASED))
        row = row_of(harness.store, claim.root.uuid)
        assert row.take_at == row.due_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert row.send_at == pytest.approx(row.take_at + SEND_DELAY, abs=0.001)
        assert reserved_steps(harness.other) == [(row.uuid, DueReason.RELEASED)]

    def test_retry_without_a_delay_is_due_at_once(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(3))
        harness.store.checkpoint(
            step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], keep=False, due_reason=DueReason.RETRY)
        )
        assert reserved_steps(harness.other) == [(claim.root.uuid, DueReason.RETRY)]

    def test_checkpoint_without_a_target_keeps_the_target(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(3))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False))
        assert row_of(harness.store, claim.root.uuid).target == claim.root.target

    def test_retry_backoff_blocks_the_claim_until_due_at(self, harness: StoreHarness) -> None:
        """Rule 27: a retry releases the claim with ``due_at``, and counts as an attempt."""
        claim = save_and_claim(harness.store, new_operation(2))
        failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="ConnectionError: later")
        retry = step_checkpoint(
            claim,
            0,
            updates=[update_of(claim.root, 0)],
            outcomes=[failed],
            keep=False,
            delay=50,
            due_reason=DueReason.RETRY,
        )
        harness.store.checkpoint(retry)
        row = row_of(harness.store, claim.root.uuid)
        assert row.due_at == row.take_at == pytest.approx(harness.now + 50, abs=TIME_TOLERANCE)
        assert row.send_at == pytest.approx(row.due_at + SEND_DELAY, abs=0.001)
        refusal = harness.store.claim(row.uuid, row.target.uuid, claim_request())
        assert refusal == ClaimRefused(RefusalReason.WAITING, row)
        stored = harness.store.snapshot(row.uuid)
        assert stored is not None
        assert (stored.tasks[0].status, stored.tasks[0].attempts) == (states.PENDING, 1)
        (attempt,) = stored.attempts
        assert (attempt.status, attempt.error) == (states.FAILED, "ConnectionError: later")
        assert due_steps(harness.store) == []
        harness.advance(52)
        assert due_steps(harness.store) == [(row.uuid, DueReason.RETRY)]
        assert claim_root(harness.store, row).epoch == 3

    def test_retry_keeps_the_result_saved_with_the_task(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation([new_task(result='{"saved": "with the task"}')]))
        failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="no")
        harness.store.checkpoint(
            step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=False)
        )
        assert harness.store.get_tasks(claim.id)[0].result == '{"saved": "with the task"}'

    def test_attempts_are_appended_and_never_replaced(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        for number in (1, 2, 3):
            failed = outcome_of(claim.root, 0, number, status=states.PENDING, result=None, error="x" * 3000)
            harness.store.checkpoint(
                step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=False)
            )
            claim = claim_root(harness.store, claim.root)
        stored = harness.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert [(attempt.number, attempt.epoch) for attempt in stored.attempts] == [(1, 1), (2, 3), (3, 5)]
        assert stored.tasks[0].attempts == 3
        assert {len(attempt.error or "") for attempt in stored.attempts} == {MAX_ERROR_LENGTH}

    def test_task_end_without_an_attempt_adds_no_attempt(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.store.checkpoint(step_checkpoint(claim, 0, outcomes=[outcome_of(claim.root, 0, 0)]))
        stored = harness.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert (stored.attempts, stored.tasks[0].attempts, stored.tasks[0].status) == ([], 0, states.SUCCESS)

    def test_error_may_contain_any_character(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        error = "nul \0, a lone \ud800, and \N{SNOWMAN}"
        failed = ending_checkpoint(
            claim, 0, states.FAILED, outcomes=[outcome_of(claim.root, 0, status=states.FAILED, error=error)]
        )
        harness.store.checkpoint(failed._replace(events=[NewEvent("ended", text=error)]))
        stored = harness.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert "\N{SNOWMAN}" in (stored.attempts[0].error or "")
        assert "\N{SNOWMAN}" in (stored.events[-1].text or "")

    def test_built_tasks_are_stored_with_their_nested_operations(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(None))
        inner = new_operation(2, labels=[("inner", "1")])
        built = BuiltTasks(claim.id, [new_task(), new_task(inner)])
        checkpoint = step_checkpoint(
            claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), built=built, events=[NewEvent("built")]
        )
        assert harness.store.checkpoint(checkpoint) == states.RUNNING
        row = row_of(harness.store, claim.root.uuid)
        assert (row.task_count, row.phase, row.step) == (2, Phase.RUN_TASK, 0)
        first, second = harness.store.get_tasks(claim.id)
        child = row_of(harness.store, inner.uuid)
        assert (first.child_id, second.child_id) == (None, child.id)
        assert (child.parent_id, child.root_id, child.status) == (claim.id, claim.id, states.PENDING)
        assert child.id > claim.id
        assert len(harness.store.get_tasks(child.id)) == 2
        assert harness.store.find(OperationQuery(labels=[("inner", "1")], parent=row.uuid), 5).rows == [child]

    def test_ten_thousand_built_tasks_are_stored(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(None))
        built = BuiltTasks(claim.id, [new_task() for _ in range(10_000)])
        harness.store.checkpoint(
            step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), built=built)
        )
        assert [task.position for task in harness.store.get_tasks(claim.id)] == list(range(10_000))

    # -- fencing -------------------------------------------------------------------------------------------------------

    def test_stale_owner_is_fenced_and_records_nothing(self, harness: StoreHarness) -> None:
        """Rules 8 and 11: two processes may both run as owner, and only the current claim may write."""
        stale = save_and_claim(harness.store, new_operation(3))
        harness.advance(LEASE + 1)
        current = claim_root(harness.other, stale.root)
        before = harness.store.snapshot(stale.root.uuid)
        for checkpoint in (
            step_checkpoint(stale, 0),
            ending_checkpoint(stale, 0),
            step_checkpoint(stale, 0, keep=False),
        ):
            with pytest.raises(FencedError):
                harness.store.checkpoint(checkpoint)
        assert harness.store.snapshot(stale.root.uuid) == before
        assert harness.other.checkpoint(step_checkpoint(current, 0)) == states.RUNNING
        with pytest.raises(FencedError):
            harness.store.checkpoint(step_checkpoint(stale, 0))

    def test_checkpoint_after_lease_expiry_succeeds_until_another_claim(self, harness: StoreHarness) -> None:
        """Rule 9: only another claim fences the owner, not the expired lease."""
        claim = save_and_claim(harness.store, new_operation(3))
        harness.advance(LEASE + 1)
        assert harness.store.checkpoint(step_checkpoint(claim, 0)) == states.RUNNING
        assert reserved_steps(harness.store) == [(claim.root.uuid, DueReason.EXPIRED)]
        assert harness.store.checkpoint(step_checkpoint(claim, 1)) == states.RUNNING

    def test_checkpoint_after_release_is_fenced(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(3))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False))
        with pytest.raises(FencedError):
            harness.store.checkpoint(step_checkpoint(claim, 1))

    def test_checkpoint_from_wrong_step_is_fenced(self, harness: StoreHarness) -> None:
        """Rule 8: the checkpoint must start from the current step."""
        claim = save_and_claim(harness.store, new_operation(5))
        harness.store.checkpoint(step_checkpoint(claim, 0))
        before = harness.store.snapshot(claim.root.uuid)
        with pytest.raises(FencedError):
            harness.store.checkpoint(step_checkpoint(claim, 3))
        assert harness.store.snapshot(claim.root.uuid) == before

    def test_checkpoint_from_wrong_phase_is_fenced(self, harness: StoreHarness) -> None:
        """Rule 8: a release must not undo a checkpoint that was written before it."""
        claim = save_and_claim(harness.store, new_operation(3, mode=Mode.DISTRIBUTED))
        harness.store.checkpoint(step_checkpoint(claim, 0, updates=[update_of(claim.root, 0, phase=Phase.CHOOSE_NEXT)]))
        before = harness.store.snapshot(claim.root.uuid)
        with pytest.raises(FencedError):
            harness.store.checkpoint(
                step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), keep=False)
            )
        assert harness.store.snapshot(claim.root.uuid) == before

    def test_checkpoint_from_wrong_step_of_a_nested_operation_is_fenced(self, harness: StoreHarness) -> None:
        inner = new_operation(3)
        claim = save_and_claim(harness.store, new_operation([new_task(inner)]))
        child = claim.path[1]
        before = harness.store.snapshot(inner.uuid), harness.store.snapshot(claim.root.uuid)
        updates = [update_of(child._replace(step=1), 2), update_of(claim.root, 0)]
        with pytest.raises(FencedError):
            harness.store.checkpoint(step_checkpoint(claim, 0, updates=updates, outcomes=[outcome_of(child, 1)]))
        assert (harness.store.snapshot(inner.uuid), harness.store.snapshot(claim.root.uuid)) == before

    def test_checkpoint_of_a_purged_operation_is_fenced(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(1))
        harness.store.checkpoint(ending_checkpoint(claim, 0))
        harness.advance(10)
        assert harness.store.purge(5, [states.SUCCESS], 10) == 1
        with pytest.raises(FencedError):
            harness.store.checkpoint(ending_checkpoint(claim, 0))

    # -- repeated checkpoints ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("keep", [True, False])
    def test_repeated_checkpoint_returns_the_same_status(self, harness: StoreHarness, keep: bool) -> None:
        """Rule 10: the caller repeats a checkpoint after a commit of unknown outcome."""
        claim = save_and_claim(harness.store, new_operation(3))
        checkpoint = step_checkpoint(claim, 0, keep=keep)
        assert harness.store.checkpoint(checkpoint) == states.RUNNING
        before = harness.store.snapshot(claim.root.uuid)
        assert harness.other.checkpoint(checkpoint) == states.RUNNING
        assert harness.store.snapshot(claim.root.uuid) == before

    @pytest.mark.parametrize("status", [states.SUCCESS, states.FAILED])
    def test_repeated_ending_checkpoint_returns_the_same_status(self, harness: StoreHarness, status: str) -> None:
        """Rule 10."""
        claim = save_and_claim(harness.store, new_operation(1))
        checkpoint = ending_checkpoint(claim, 0, status)
        assert harness.store.checkpoint(checkpoint) == status
        before = harness.store.snapshot(claim.root.uuid)
        assert harness.store.checkpoint(checkpoint) == status
        assert harness.store.snapshot(claim.root.uuid) == before

    @pytest.mark.parametrize("keep", [True, False])
    def test_repeated_retry_checkpoint_counts_one_attempt(self, harness: StoreHarness, keep: bool) -> None:
        """Rule 10: a retry does not change the step, so the step does not show that the retry was written."""
        claim = save_and_claim(harness.store, new_operation(2))
        failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="no")
        retry = step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=keep)
        harness.store.checkpoint(retry)
        before = harness.store.snapshot(claim.root.uuid)
        assert before is not None
        assert len(before.attempts) == 1
        assert harness.store.checkpoint(retry) == states.RUNNING
        assert harness.store.snapshot(claim.root.uuid) == before

    def test_repeated_checkpoint_builds_tasks_once(self, harness: StoreHarness) -> None:
        """Rule 10."""
        claim = save_and_claim(harness.store, new_operation(None))
        built = BuiltTasks(claim.id, [new_task(), new_task(new_operation(1))])
        checkpoint = step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], outcomes=(), built=built)
        harness.store.checkpoint(checkpoint)
        before = harness.store.snapshot(claim.root.uuid)
        assert harness.store.checkpoint(checkpoint) == states.RUNNING
        assert harness.store.snapshot(claim.root.uuid) == before

    def test_repeated_checkpoint_after_another_claim_is_fenced(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(3))
        checkpoint = step_checkpoint(claim, 0, keep=False)
        harness.store.checkpoint(checkpoint)
        claim_root(harness.other, claim.root)
        with pytest.raises(FencedError):
            harness.store.checkpoint(checkpoint)

    def test_repeated_checkpoint_after_a_resume_is_fenced(self, harness: StoreHarness) -> None:
        """Rule 25: a resume replaces the token."""
        claim = save_and_claim(harness.store, new_operation(1))
        checkpoint = ending_checkpoint(claim, 0, states.FAILED)
        harness.store.checkpoint(checkpoint)
        resume_stored(harness.store, claim.root.uuid)
        with pytest.raises(FencedError):
            harness.store.checkpoint(checkpoint)

    # -- concurrent checkpoints ----------------------------------------------------------------------------------------

    def test_concurrent_checkpoints_are_all_recorded(self, harness: StoreHarness) -> None:
        """Rule 14."""
        claims = [save_and_claim(harness.store, new_operation(4)) for _ in range(20)]

        def run(claim: Claim) -> list[str]:
            return [harness.store.checkpoint(step_checkpoint(claim, step)) for step in range(3)] + [
                harness.store.checkpoint(ending_checkpoint(claim, 3))
            ]

        results = run_concurrently(*(lambda claim=claim: run(claim) for claim in claims))
        assert results == [[states.RUNNING] * 3 + [states.SUCCESS]] * 20
        for claim in claims:
            stored = harness.store.snapshot(claim.root.uuid)
            assert stored is not None
            assert (stored.operation.status, len(stored.attempts), len(stored.events)) == (states.SUCCESS, 4, 6)
            assert {task.status for task in stored.tasks} == {states.SUCCESS}

    def test_fenced_checkpoint_does_not_affect_concurrent_ones(self, harness: StoreHarness) -> None:
        """Rule 14: the store fences each checkpoint of a group separately."""
        current, stale = ([save_and_claim(harness.store, new_operation(3)) for _ in range(4)] for _ in range(2))
        for claim in stale:
            harness.store.checkpoint(step_checkpoint(claim, 0, keep=False))
        checkpoints = [step_checkpoint(claim, 0) for claim in current] + [step_checkpoint(claim, 1) for claim in stale]
        results = run_concurrently(*(lambda item=item: harness.store.checkpoint(item) for item in checkpoints))
        statuses, errors = results[: len(current)], results[len(current) :]
        assert statuses == [states.RUNNING] * 4
        assert [type(error) for error in errors] == [FencedError] * 4

    # -- nested operations ---------------------------------------------------------------------------------------------

    def test_end_of_a_nested_operation_ends_the_outer_step_in_one_checkpoint(self, harness: StoreHarness) -> None:
        """Rule 31: one checkpoint writes every operation up to the root."""
        leaf = new_operation(1)
        middle = new_operation([new_task(leaf)])
        claim = save_and_claim(harness.store, new_operation([new_task(middle), new_task()]))
        root, middle_row, leaf_row = claim.path
        success = {"status": states.SUCCESS, "phase": Phase.END_SUCCESS, "result": '{"inner": 1}'}
        checkpoint = step_checkpoint(
            claim,
            0,
            updates=[update_of(leaf_row, 0, **success), update_of(middle_row, 0, **success), update_of(root, 1)],
            outcomes=[outcome_of(leaf_row, 0), outcome_of(middle_row, 0, 0), outcome_of(root, 0, 0)],
        )
        assert harness.store.checkpoint(checkpoint) == states.RUNNING
        for operation in (middle, leaf):
            row = row_of(harness.store, operation.uuid)
            assert (row.status, row.result, row.phase) == (states.SUCCESS, '{"inner": 1}', Phase.END_SUCCESS)
            assert row.started_at is not None
            assert row.ended_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        row = row_of(harness.store, root.uuid)
        assert (row.step, row.status, row.ended_at, row.epoch) == (1, states.RUNNING, None, 1)
        assert [task.status for task in harness.store.get_tasks(root.id)] == [states.SUCCESS, states.PENDING]
        before = harness.store.snapshot(root.uuid)
        assert harness.store.checkpoint(checkpoint) == states.RUNNING
        assert harness.store.snapshot(root.uuid) == before

    def test_checkpoint_of_a_nested_step_keeps_the_root_step(self, harness: StoreHarness) -> None:
        inner = new_operation(2)
        claim = save_and_claim(harness.store, new_operation([new_task(inner)]))
        root, child = claim.path
        checkpoint = step_checkpoint(
            claim, 0, updates=[update_of(child, 1), update_of(root, 0)], outcomes=[outcome_of(child, 0)]
        )
        assert harness.store.checkpoint(checkpoint) == states.RUNNING
        assert harness.store.checkpoint(checkpoint) == states.RUNNING
        row = row_of(harness.store, inner.uuid)
        assert (row.step, row.status) == (1, states.RUNNING)
        stored = harness.store.snapshot(inner.uuid)
        assert stored is not None
        assert (len(stored.attempts), stored.root_uuid) == (1, root.uuid)
        assert [event.kind for event in stored.events] == ["accepted", "claimed", "task-succeeded"]
