"""Contract tests of cancel, resume and purge."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kser import status as states
from kser.errors import FencedError, StateConflict
from kser.store.base import Store
from kser.store.model import (
    SEND_DELAY,
    ClaimRefused,
    DueReason,
    Mode,
    OperationQuery,
    OperationRow,
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
    ending_checkpoint,
    event_kinds,
    new_operation,
    new_task,
    outcome_of,
    reserve,
    resume_stored,
    row_of,
    save_and_claim,
    step_checkpoint,
    unique_name,
    update_of,
)
from tests.support import run_concurrently


class LifecycleContract:
    """The contract of cancel, resume and purge."""

    def test_cancel_of_an_unclaimed_operation_takes_effect_at_once(self, harness: StoreHarness) -> None:
        """Rule 24: the nested operations are cancelled too, except those that have ended."""
        finished, waiting = new_operation(1), new_operation([new_task(new_operation(1))])
        claim = save_and_claim(harness.store, new_operation([new_task(finished), new_task(waiting)]))
        root, first = claim.path
        ended = update_of(first, 0, status=states.SUCCESS, phase=Phase.END_SUCCESS, result="{}")
        outcomes = [outcome_of(first, 0), outcome_of(root, 0, 0)]
        harness.store.checkpoint(
            step_checkpoint(claim, 0, updates=[ended, update_of(root, 1)], outcomes=outcomes, keep=False)
        )
        before = row_of(harness.store, root.uuid)
        row = harness.other.cancel(root.uuid, "changed my mind")
        assert row is not None
        assert row == row_of(harness.store, root.uuid)
        assert (row.status, row.cancel_reason) == (states.CANCELLED, "changed my mind")
        assert (row.owner, row.token) == (None, None)
        assert (row.epoch, row.lease_until, row.take_at, row.send_at) == (before.epoch + 1, None, None, None)
        assert row.ended_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert row_of(harness.store, finished.uuid).status == states.SUCCESS
        children = [row for row in harness.store.get_children(root.id) if row.uuid != finished.uuid]
        assert {row.status for row in children} == {states.CANCELLED}
        assert event_kinds(harness.store, root.uuid)[-1] == "ended"
        assert harness.store.cancel(root.uuid, "again") == row

    def test_cancel_of_an_operation_that_never_started_takes_effect_at_once(self, harness: StoreHarness) -> None:
        operation = new_operation(2)
        harness.store.save(operation)
        row = harness.store.cancel(operation.uuid, None)
        assert row is not None
        assert (row.status, row.cancel_reason, row.started_at) == (states.CANCELLED, None, None)
        refusal = harness.store.claim(row.uuid, row.target.uuid, claim_request())
        assert refusal == ClaimRefused(RefusalReason.ENDED, row)

    def test_cancel_of_a_reserved_step_takes_effect_at_once(self, harness: StoreHarness) -> None:
        """Rule 24: the reservation is no claim, and its claim is refused."""
        operation = new_operation(2)
        harness.store.save(operation)
        harness.advance(10)
        (step,) = reserve(harness.other)
        row = harness.store.cancel(operation.uuid, None)
        assert row is not None
        assert row.status == states.CANCELLED
        refusal = harness.other.claim(row.uuid, step.target.uuid, claim_request(epoch=step.epoch))
        assert refusal == ClaimRefused(RefusalReason.ENDED, row)
        harness.other.return_reservations([step])
        harness.other.postpone_takeover([step], 5)
        assert row_of(harness.store, row.uuid) == row

    def test_cancel_after_lease_expiry_takes_effect_at_once(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.advance(LEASE + 1)
        row = harness.store.cancel(claim.root.uuid, None)
        assert row is not None
        assert row.status == states.CANCELLED
        with pytest.raises(FencedError):
            harness.store.checkpoint(step_checkpoint(claim, 0))

    def test_cancel_of_a_running_operation_takes_effect_at_its_next_checkpoint(self, harness: StoreHarness) -> None:
        """Rule 24: the result of the running task is recorded, and the operation ends as CANCELLED."""
        inner = new_operation(2)
        claim = save_and_claim(harness.store, new_operation([new_task(), new_task(inner)]))
        row = harness.other.cancel(claim.root.uuid, "why \0")
        assert row is not None
        assert (row.status, row.cancel_requested, row.epoch) == (states.RUNNING, True, 1)
        assert (row.owner, row.lease_until, row.take_at) == (
            claim.root.owner,
            claim.root.lease_until,
            claim.root.take_at,
        )
        assert (row.cancel_reason or "").startswith("why")
        assert event_kinds(harness.store, row.uuid)[-1] == "cancel-requested"
        assert harness.store.checkpoint(step_checkpoint(claim, 0)) == states.CANCELLED
        stored = harness.store.snapshot(row.uuid)
        assert stored is not None
        row = stored.operation
        assert (row.status, row.step, row.accumulated, row.epoch) == (states.CANCELLED, 1, '{"up to": 1}', 2)
        assert (row.owner, row.lease_until, row.take_at, row.send_at) == (None, None, None, None)
        assert row.ended_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert (stored.tasks[0].status, stored.tasks[0].result) == (states.SUCCESS, '{"of": 0}')
        assert row_of(harness.store, inner.uuid).status == states.CANCELLED
        assert [(event.kind, event.text) for event in stored.events[-2:]] == [
            ("task-succeeded", None),
            ("ended", states.CANCELLED),
        ]

    @pytest.mark.parametrize("reason", ["late", "too slow", None])
    def test_second_cancel_of_a_running_operation_changes_nothing(
        self, harness: StoreHarness, reason: str | None
    ) -> None:
        row = save_and_claim(harness.store, new_operation(2)).root
        first = harness.store.cancel(row.uuid, "too slow")
        assert harness.other.cancel(row.uuid, reason) == first == row_of(harness.store, row.uuid)
        assert event_kinds(harness.store, row.uuid).count("cancel-requested") == 1

    def test_second_cancel_takes_effect_at_once_if_the_lease_has_expired_meanwhile(self, harness: StoreHarness) -> None:
        row = save_and_claim(harness.store, new_operation(2)).root
        harness.store.cancel(row.uuid, "too slow")
        harness.advance(LEASE + 1)
        cancelled = harness.store.cancel(row.uuid, "late")
        assert cancelled is not None
        assert (cancelled.status, cancelled.cancel_reason) == (states.CANCELLED, "late")
        assert event_kinds(harness.store, row.uuid)[-2:] == ["cancel-requested", "ended"]

    def test_repeated_checkpoint_of_a_cancelled_operation_returns_cancelled(self, harness: StoreHarness) -> None:
        """Rules 10 and 24."""
        claim = save_and_claim(harness.store, new_operation(3))
        harness.store.cancel(claim.root.uuid, None)
        for checkpoint in (step_checkpoint(claim, 0), step_checkpoint(claim, 0)):
            assert harness.store.checkpoint(checkpoint) == states.CANCELLED
        assert event_kinds(harness.store, claim.root.uuid).count("ended") == 1

    @pytest.mark.parametrize("status", [states.SUCCESS, states.FAILED])
    def test_last_checkpoint_of_a_cancelled_operation_returns_cancelled(
        self, harness: StoreHarness, status: str
    ) -> None:
        """The status that the checkpoint has for the root operation is not used."""
        claim = save_and_claim(harness.store, new_operation(1))
        harness.store.cancel(claim.root.uuid, None)
        assert harness.store.checkpoint(ending_checkpoint(claim, 0, status)) == states.CANCELLED
        stored = harness.store.snapshot(claim.root.uuid)
        assert stored is not None
        assert stored.tasks[0].status == status
        assert [event.text for event in stored.events if event.kind == "ended"] == [states.CANCELLED]

    @pytest.mark.parametrize("keep", [True, False])
    def test_retry_of_a_cancelled_operation_returns_cancelled(self, harness: StoreHarness, keep: bool) -> None:
        claim = save_and_claim(harness.store, new_operation(1))
        harness.store.cancel(claim.root.uuid, None)
        failed = outcome_of(claim.root, 0, status=states.PENDING, result=None, error="no")
        retry = step_checkpoint(
            claim, 0, updates=[update_of(claim.root, 0)], outcomes=[failed], keep=keep, delay=0 if keep else 60
        )
        assert harness.store.checkpoint(retry) == states.CANCELLED
        assert harness.store.checkpoint(retry) == states.CANCELLED
        row = row_of(harness.store, claim.root.uuid)
        assert (row.status, row.take_at) == (states.CANCELLED, None)

    def test_cancel_during_a_nested_step_cancels_all_outer_operations(self, harness: StoreHarness) -> None:
        """Rule 31: cancel names the root operation."""
        inner = new_operation(2)
        claim = save_and_claim(harness.store, new_operation([new_task(inner)]))
        root, child = claim.path
        harness.store.cancel(root.uuid, None)
        checkpoint = step_checkpoint(
            claim, 0, updates=[update_of(child, 1), update_of(root, 0)], outcomes=[outcome_of(child, 0)]
        )
        assert harness.store.checkpoint(checkpoint) == states.CANCELLED
        row = row_of(harness.store, inner.uuid)
        assert (row.status, row.step) == (states.CANCELLED, 1)
        assert row.ended_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert harness.store.get_tasks(child.id)[0].status == states.SUCCESS

    def test_stale_owner_of_a_cancelled_operation_is_fenced(self, harness: StoreHarness) -> None:
        stale = save_and_claim(harness.store, new_operation(3))
        harness.advance(LEASE + 1)
        claim_root(harness.other, stale.root)
        harness.store.cancel(stale.root.uuid, None)
        with pytest.raises(FencedError):
            harness.store.checkpoint(step_checkpoint(stale, 0))
        assert row_of(harness.store, stale.root.uuid).status == states.RUNNING

    @pytest.mark.parametrize("status", [states.SUCCESS, states.FAILED])
    def test_cancel_after_the_end_changes_nothing(self, harness: StoreHarness, status: str) -> None:
        """Rule 24: cancel returns the status with which the operation ended."""
        claim = save_and_claim(harness.store, new_operation(1))
        harness.store.checkpoint(ending_checkpoint(claim, 0, status))
        before = harness.store.snapshot(claim.root.uuid)
        assert before is not None
        assert harness.store.cancel(claim.root.uuid, "late") == before.operation
        assert harness.store.snapshot(claim.root.uuid) == before

    def test_cancel_and_resume_accept_only_root_operations(self, harness: StoreHarness) -> None:
        """Rule 31."""
        inner = new_operation(1)
        harness.store.save(new_operation([new_task(inner)]))
        for uuid in (inner.uuid, unique_name()):
            assert harness.store.cancel(uuid, None) is None
            assert harness.store.resume(uuid, 0, unique_name()) is None

    # -- resume --------------------------------------------------------------------------------------------------------

    def _save_failed(self, store: Store, **values: Any) -> OperationRow:
        """Save an operation of three tasks whose second task has failed; return its row."""
        claim = save_and_claim(store, new_operation(3, **values))
        store.checkpoint(step_checkpoint(claim, 0))
        store.checkpoint(ending_checkpoint(claim, 1, states.FAILED))
        return row_of(store, claim.root.uuid)

    def test_resume_continues_at_the_failed_task(self, harness: StoreHarness) -> None:
        """Rule 25."""
        failed = self._save_failed(harness.store)
        row = harness.other.resume(failed.uuid, failed.epoch, "token")
        assert row is not None
        assert row == row_of(harness.store, failed.uuid)
        assert (row.status, row.phase, row.step, row.epoch) == (states.RUNNING, Phase.RUN_TASK, 1, failed.epoch + 1)
        assert (row.owner, row.token, row.result, row.ended_at) == (None, "token", None, None)
        assert (row.cancel_requested, row.cancel_reason) == (False, None)
        assert (row.claim_count, row.send_count, row.sent_at) == (0, 0, None)
        assert row.take_at == row.due_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        assert row.send_at == row.take_at + SEND_DELAY
        assert (row.lease_until, row.due_reason, row.current_entrypoints) == (
            None,
            DueReason.RESUMED,
            '["shop.Charge"]',
        )
        assert row.target == failed.target
        assert row.started_at == failed.started_at
        task = harness.store.get_tasks(row.id)[1]
        assert (task.status, task.result, task.attempts) == (states.PENDING, None, 1)
        assert event_kinds(harness.store, row.uuid)[-1] == "resumed"
        claim = claim_root(harness.store, row)
        assert (claim.task, claim.epoch) == (task, row.epoch + 1)
        assert harness.store.checkpoint(step_checkpoint(claim, 1, outcomes=[outcome_of(row, 1, 2)])) == states.RUNNING

    def test_resume_of_a_distributed_operation_targets_the_failed_task(self, harness: StoreHarness) -> None:
        failed = self._save_failed(harness.store, mode=Mode.DISTRIBUTED)
        row = resume_stored(harness.store, failed.uuid)
        task = harness.store.get_tasks(row.id)[1]
        assert row.target == StepMessage(task.uuid, task.entrypoint, task.topic)

    def test_resume_of_a_cancelled_operation_continues_it(self, harness: StoreHarness) -> None:
        """Rule 26."""
        claim = save_and_claim(harness.store, new_operation(2))
        harness.store.cancel(claim.root.uuid, "stop")
        harness.store.checkpoint(step_checkpoint(claim, 0))
        row = resume_stored(harness.store, claim.root.uuid)
        assert (row.status, row.step, row.cancel_requested, row.cancel_reason) == (states.RUNNING, 1, False, None)
        claim = claim_root(harness.store, row)
        assert harness.store.checkpoint(ending_checkpoint(claim, 1)) == states.SUCCESS

    @pytest.mark.parametrize("mode", [Mode.LOCAL, Mode.DISTRIBUTED])
    def test_resume_of_an_operation_with_unbuilt_tasks_starts_it(self, harness: StoreHarness, mode: Mode) -> None:
        operation = new_operation(None, mode=mode)
        harness.store.save(operation)
        harness.store.cancel(operation.uuid, None)
        row = resume_stored(harness.store, operation.uuid)
        assert (row.phase, row.step, row.status) == (Phase.BUILD, 0, states.RUNNING)
        assert row.target == operation.target

    def test_resume_after_all_tasks_succeeded_repeats_only_the_end(self, harness: StoreHarness) -> None:
        """Rule 23: the operation is FAILED because its ``onsuccess`` raised."""
        claim = save_and_claim(harness.store, new_operation(1, mode=Mode.DISTRIBUTED))
        end = ending_checkpoint(claim, 0, states.FAILED, outcomes=[outcome_of(claim.root, 0)])
        harness.store.checkpoint(end._replace(target=StepMessage("other-uuid", "shop.Other", "other-topic")))
        row = resume_stored(harness.store, claim.root.uuid)
        assert (row.phase, row.status) == (Phase.END_SUCCESS, states.RUNNING)
        assert row.target == StepMessage(row.uuid, row.entrypoint, row.topic)

    def test_resume_descends_to_the_innermost_operation(self, harness: StoreHarness) -> None:
        """Rules 25 and 31."""
        leaf = new_operation(2)
        middle = new_operation([new_task(leaf)])
        claim = save_and_claim(harness.store, new_operation([new_task(), new_task(middle)], mode=Mode.DISTRIBUTED))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False))
        claim = claim_root(harness.store, row_of(harness.store, claim.root.uuid))
        root, middle_row, leaf_row = claim.path
        harness.store.checkpoint(
            step_checkpoint(
                claim,
                1,
                updates=[update_of(leaf_row, 1), update_of(middle_row, 0), update_of(root, 1)],
                outcomes=[outcome_of(leaf_row, 0)],
            )
        )
        failed: dict[str, Any] = {"status": states.FAILED, "phase": "FAILED", "result": "{}"}
        updates = [
            update_of(leaf_row._replace(step=1), 1, **failed),
            update_of(middle_row, 0, **failed),
            update_of(root, 1, **failed),
        ]
        error = {"status": states.FAILED, "error": "no"}
        outcomes = [
            outcome_of(leaf_row, 1, **error),
            outcome_of(middle_row, 0, 0, **error),
            outcome_of(root, 1, 0, **error),
        ]
        end = step_checkpoint(claim, 1, updates=updates, outcomes=outcomes)
        assert harness.store.checkpoint(end) == states.FAILED
        row = resume_stored(harness.store, root.uuid)
        assert [row_of(harness.store, member.uuid).status for member in claim.path] == [states.RUNNING] * 3
        task = harness.store.get_tasks(leaf_row.id)[1]
        assert row.target == StepMessage(task.uuid, task.entrypoint, task.topic)
        assert [harness.store.get_tasks(member.id)[-1].status for member in claim.path] == [states.PENDING] * 3
        next_claim = claim_root(harness.store, row)
        assert [member.uuid for member in next_claim.path] == [root.uuid, middle.uuid, leaf.uuid]
        assert next_claim.task == task
        leaf_row = row_of(harness.store, leaf.uuid)
        assert (leaf_row.ended_at, leaf_row.result, leaf_row.step, leaf_row.phase) == (None, None, 1, Phase.RUN_TASK)

    def test_resume_of_an_operation_that_did_not_fail_is_rejected(self, harness: StoreHarness) -> None:
        """Rule 26."""
        pending = new_operation(1)
        harness.store.save(pending)
        running, succeeded = (save_and_claim(harness.store, new_operation(1)) for _ in range(2))
        harness.store.checkpoint(ending_checkpoint(succeeded, 0))
        for uuid in (pending.uuid, running.root.uuid, succeeded.root.uuid):
            before = harness.store.snapshot(uuid)
            with pytest.raises(StateConflict):
                resume_stored(harness.store, uuid)
            assert harness.store.snapshot(uuid) == before

    def test_concurrent_resumes_have_one_winner(self, harness: StoreHarness) -> None:
        """Rule 25."""
        failed = self._save_failed(harness.store)
        results = run_concurrently(
            *(lambda store=store: resume_stored(store, failed.uuid) for store in (harness.store, harness.other) * 3)
        )
        assert sorted(type(result).__name__ for result in results) == ["OperationRow"] + ["StateConflict"] * 5
        assert row_of(harness.store, failed.uuid).epoch == failed.epoch + 1

    def test_concurrent_resumes_from_one_row_have_one_winner(self, harness: StoreHarness) -> None:
        """Rule 25: each caller has read the same epoch."""
        failed = self._save_failed(harness.store)

        def resume(store: Store) -> OperationRow | None:
            return store.resume(failed.uuid, failed.epoch, unique_name())

        results = run_concurrently(*(lambda store=store: resume(store) for store in (harness.store, harness.other) * 3))
        assert sorted(type(result).__name__ for result in results) == ["OperationRow"] + ["StateConflict"] * 5
        assert row_of(harness.store, failed.uuid).epoch == failed.epoch + 1

    def test_repeated_resume_returns_the_same_row_and_changes_nothing(self, harness: StoreHarness) -> None:
        """Rules 10 and 25: the response to the first call was lost."""
        failed = self._save_failed(harness.store, mode=Mode.DISTRIBUTED)
        row = harness.store.resume(failed.uuid, failed.epoch, "token")
        before = harness.store.snapshot(failed.uuid)
        assert harness.other.resume(failed.uuid, failed.epoch, "token") == row
        assert harness.store.snapshot(failed.uuid) == before
        for epoch, token in ((failed.epoch, "other"), (failed.epoch + 1, "token"), (failed.epoch + 1, "other")):
            with pytest.raises(StateConflict, match="is RUNNING: only a FAILED or CANCELLED one can be resumed"):
                harness.store.resume(failed.uuid, epoch, token)
        assert harness.store.snapshot(failed.uuid) == before

    def test_resume_with_an_old_epoch_is_rejected(self, harness: StoreHarness) -> None:
        """Rule 25: since the caller read the operation, it was resumed and has failed a second time."""
        failed = self._save_failed(harness.store)
        claim = claim_root(harness.store, resume_stored(harness.store, failed.uuid))
        harness.store.checkpoint(ending_checkpoint(claim, 1, states.FAILED, outcomes=[outcome_of(claim.root, 1, 2)]))
        before = harness.store.snapshot(failed.uuid)
        for epoch in (failed.epoch, failed.epoch + 1):
            with pytest.raises(StateConflict, match="has changed since it was read, and is FAILED"):
                harness.store.resume(failed.uuid, epoch, unique_name())
        assert harness.store.snapshot(failed.uuid) == before

    def test_resumed_operation_is_due_at_once(self, harness: StoreHarness) -> None:
        """Rule 25: whoever resumes need not send the step."""
        failed = self._save_failed(harness.store)
        harness.advance(1000)
        row = resume_stored(harness.store, failed.uuid)
        (step,) = reserve(harness.other)
        assert (step.uuid, step.epoch, step.reason) == (row.uuid, row.epoch, DueReason.RESUMED)

    def test_resume_forgets_refusals(self, harness: StoreHarness) -> None:
        operation = new_operation(2)
        harness.store.save(operation)
        harness.store.refuse_class(operation.uuid, operation.uuid)
        harness.store.cancel(operation.uuid, None)
        row = resume_stored(harness.store, operation.uuid)
        assert (row.refusal_count, row.refused_since) == (0, None)

    @pytest.mark.parametrize("built", [True, False])
    def test_resume_names_the_class_of_the_task_that_runs_next(self, harness: StoreHarness, built: bool) -> None:
        """Rule 6: also the class of a task in a nested operation that has not started."""
        inner = new_operation([new_task(entrypoint="shop.Deep")] if built else None, entrypoint="shop.Inner")
        operation = new_operation([new_task(inner)])
        harness.store.save(operation)
        harness.store.cancel(operation.uuid, None)
        row = resume_stored(harness.store, operation.uuid)
        assert json.loads(row.current_entrypoints or "") == (["shop.Inner", "shop.Deep"] if built else ["shop.Inner"])
        # The check after the claim shows that the claim reaches the same task.
        claim = claim_root(harness.store, row)
        path = [claim.task.entrypoint] if claim.task else []
        assert [*(row.entrypoint for row in claim.path[1:]), *path] == json.loads(row.current_entrypoints or "")

    # -- purge ---------------------------------------------------------------------------------------------------------

    def test_purge_deletes_old_ended_operations_with_all_their_rows(self, harness: StoreHarness) -> None:
        inner = new_operation(1, labels=[("a", "1")])
        claim = save_and_claim(harness.store, new_operation([new_task(inner)], labels=[("a", "1")]))
        root, child = claim.path
        success = {"status": states.SUCCESS, "phase": Phase.END_SUCCESS, "result": "{}"}
        updates = [update_of(child, 0, **success), update_of(root, 0, **success)]
        harness.store.checkpoint(
            step_checkpoint(claim, 0, updates=updates, outcomes=[outcome_of(child, 0), outcome_of(root, 0, 0)])
        )
        young = save_and_claim(harness.store, new_operation(1))
        assert harness.store.purge(60, [states.SUCCESS], 10) == 0
        harness.advance(100)
        harness.store.checkpoint(ending_checkpoint(young, 0))
        assert harness.store.purge(60, [states.FAILED], 10) == 0
        assert harness.store.purge(60, [states.SUCCESS, states.FAILED], 10) == 1
        assert harness.store.snapshot(root.uuid) is None
        assert harness.store.snapshot(inner.uuid) is None
        assert harness.store.get_tasks(root.id) == harness.store.get_tasks(child.id) == []
        assert harness.store.get_children(root.id) == []
        assert harness.store.find(OperationQuery(labels=[("a", "1")]), 5).rows == []
        assert harness.store.get_operation(young.root.uuid) is not None
        # A new operation may have the same uuid, and no row of the purged one belongs to it.
        successor = save_and_claim(harness.store, new_operation([new_task(inner)], uuid=root.uuid))
        stored = harness.store.snapshot(successor.root.uuid)
        assert stored is not None
        assert (len(stored.events), stored.attempts) == (2, [])

    def test_purge_deletes_in_batches(self, harness: StoreHarness) -> None:
        for status in (states.SUCCESS, states.FAILED) * 4:
            harness.store.checkpoint(ending_checkpoint(save_and_claim(harness.store, new_operation(1)), 0, status))
        harness.advance(100)
        statuses = [states.SUCCESS, states.FAILED]
        assert [harness.store.purge(60, statuses, 3) for _ in range(4)] == [3, 3, 2, 0]

    def test_purge_keeps_unfinished_operations(self, harness: StoreHarness) -> None:
        save_and_claim(harness.store, new_operation(1))
        harness.store.save(new_operation(1))
        harness.advance(1000)
        assert harness.store.purge(0, [states.PENDING, states.RUNNING], 10) == 0
