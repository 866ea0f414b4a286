"""Contract tests of heartbeat and reaper."""

from __future__ import annotations

import pytest

from kser.store.model import (
    MAX_RESEND_DELAY,
    RESEND_UNSENT_AFTER,
    SEND_GRACE,
    ClaimRefused,
    DueReason,
    DueStep,
    EventRow,
)
from tests.store.harness import (
    LEASE,
    RESEND,
    TIME_TOLERANCE,
    StoreHarness,
    claim_request,
    claim_root,
    due_steps,
    ending_checkpoint,
    new_operation,
    row_of,
    save_and_claim,
    step_checkpoint,
)
from tests.support import run_concurrently


class ReaperContract:
    """The contract of leases, due steps and sends."""

    def test_heartbeat_renews_exactly_the_named_claims(self, harness: StoreHarness) -> None:
        """Rule 9: the heartbeat names each claim by its id and epoch."""
        claims = [save_and_claim(harness.store, new_operation(1)) for _ in range(3)]
        harness.advance(LEASE - 5)
        renewed = harness.store.renew([(claim.id, claim.epoch) for claim in claims[:2]], "consumer-a", LEASE)
        assert renewed == {claims[0].id, claims[1].id}
        harness.advance(10)
        assert due_steps(harness.store) == [(claims[2].root.uuid, DueReason.EXPIRED)]
        assert harness.store.renew([], "consumer-a", LEASE) == set()

    def test_heartbeat_renews_an_expired_lease_until_another_claim(self, harness: StoreHarness) -> None:
        """Rule 9: an expired lease alone does not end a claim."""
        claim = save_and_claim(harness.store, new_operation(1))
        harness.advance(LEASE + 10)
        assert due_steps(harness.store) == [(claim.root.uuid, DueReason.EXPIRED)]
        assert row_of(harness.store, claim.root.uuid).owner is None
        assert harness.store.renew([(claim.id, claim.epoch)], "consumer-a", LEASE) == {claim.id}
        row = row_of(harness.store, claim.root.uuid)
        assert row.owner == "consumer-a"
        assert row.next_check_at == pytest.approx(harness.now + LEASE, abs=TIME_TOLERANCE)
        assert isinstance(harness.other.claim(row.uuid, row.target.uuid, claim_request()), ClaimRefused)
        harness.advance(LEASE + 10)
        next_claim = claim_root(harness.other, row)
        assert harness.store.renew([(claim.id, claim.epoch)], "consumer-a", LEASE) == set()
        assert row_of(harness.store, row.uuid) == next_claim.root

    def test_heartbeat_does_not_renew_released_or_ended_claims(self, harness: StoreHarness) -> None:
        released = save_and_claim(harness.store, new_operation(2))
        ended = save_and_claim(harness.store, new_operation(1))
        harness.store.checkpoint(step_checkpoint(released, 0, keep=False))
        harness.store.checkpoint(ending_checkpoint(ended, 0))
        claims = [(released.id, 1), (ended.id, 1), (ended.id, 2), (5, 1)]
        assert harness.store.renew(claims, "consumer-a", LEASE) == set()

    def test_unsent_step_is_due_after_a_few_seconds(self, harness: StoreHarness) -> None:
        """Rules 1 and 20."""
        operation = new_operation(2)
        harness.store.save(operation)
        assert due_steps(harness.store) == []
        harness.advance(RESEND_UNSENT_AFTER + 1)
        row = row_of(harness.store, operation.uuid)
        steps = harness.store.take_due_steps(5, "reaper", expired=True)
        assert steps == [DueStep(id=row.id, uuid=row.uuid, epoch=0, target=operation.target, reason=DueReason.UNSENT)]
        row = row_of(harness.store, operation.uuid)
        assert (row.send_count, row.sent_at) == (0, None)
        assert row.next_check_at == pytest.approx(harness.now + SEND_GRACE, abs=TIME_TOLERANCE)
        stored = harness.store.snapshot(operation.uuid)
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

    def test_sent_step_is_due_again_with_doubling_backoff(self, harness: StoreHarness) -> None:
        """Rule 20: ``resend_after``, doubled after each send, at most an hour."""
        operation = new_operation(2)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        harness.store.mark_sent([(row.id, row.epoch)], RESEND)
        row = row_of(harness.store, operation.uuid)
        assert row.send_count == 1
        assert row.sent_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        delays = [RESEND]
        for _ in range(8):
            harness.advance(delays[-1] - 10)
            assert due_steps(harness.store) == []
            harness.advance(20)
            taken_at = harness.now
            assert due_steps(harness.store) == [(row.uuid, DueReason.UNCLAIMED)]
            harness.store.mark_sent([(row.id, row.epoch)], RESEND)
            next_check_at = row_of(harness.store, row.uuid).next_check_at
            assert next_check_at is not None
            delays.append(next_check_at - taken_at)
        assert delays == pytest.approx([60, 120, 240, 480, 960, 1920, *[MAX_RESEND_DELAY] * 3], abs=TIME_TOLERANCE)

    def test_claim_counts_as_successful_send(self, harness: StoreHarness) -> None:
        """Rule 15: a send may be recorded after the claim, and then changes nothing."""
        operation = new_operation(2)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        claim = claim_root(harness.store, row)
        harness.store.mark_sent([(row.id, 0), (row.id, 1)], RESEND)
        assert row_of(harness.store, row.uuid) == claim.root
        harness.store.checkpoint(ending_checkpoint(claim, 0))
        ended = row_of(harness.store, row.uuid)
        harness.store.mark_sent([(row.id, ended.epoch)], RESEND)
        assert row_of(harness.store, row.uuid) == ended
        harness.store.mark_sent([], RESEND)

    def test_delayed_retry_is_not_due_before_due_at(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False, delay=500))
        harness.store.mark_sent([(claim.id, 2)], RESEND)
        harness.advance(RESEND + 10)
        assert due_steps(harness.store) == []
        harness.advance(500)
        assert due_steps(harness.store) == [(claim.root.uuid, DueReason.UNCLAIMED)]

    def test_step_of_a_dead_reaper_is_due_for_another_reaper(self, harness: StoreHarness) -> None:
        """Rule 20: a reaper that dies before it sends the message delays the step, and does not lose it."""
        operation = new_operation(1)
        harness.store.save(operation)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        assert due_steps(harness.store) == [(operation.uuid, DueReason.UNSENT)]
        harness.advance(SEND_GRACE - 1)
        assert due_steps(harness.other) == []
        harness.advance(2)
        assert due_steps(harness.other) == [(operation.uuid, DueReason.UNSENT)]

    def test_each_due_step_is_taken_by_one_reaper(self, harness: StoreHarness) -> None:
        """Rule 20: several reapers send one message for each step."""
        operations = [new_operation(1) for _ in range(30)]
        for operation in operations:
            harness.store.save(operation)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        results = run_concurrently(
            *(lambda store=store: due_steps(store, 30) for store in (harness.store, harness.other) * 3)
        )
        taken = [uuid for result in results for uuid, _ in result]
        assert sorted(taken) == sorted(operation.uuid for operation in operations)

    def test_take_due_respects_its_limit_and_takes_the_longest_due_first(self, harness: StoreHarness) -> None:
        operations = [new_operation(1) for _ in range(5)]
        for operation in operations:
            harness.store.save(operation)
            harness.advance(1)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        batches = [due_steps(harness.store, 2), due_steps(harness.store, 2), due_steps(harness.store, 2)]
        assert [[uuid for uuid, _ in batch] for batch in batches] == [
            [operation.uuid for operation in operations[:2]],
            [operation.uuid for operation in operations[2:4]],
            [operations[4].uuid],
        ]

    def test_lease_expiry_counts_as_due_only_when_requested(self, harness: StoreHarness) -> None:
        """Rule 21: after an outage the reaper does not request the steps with an expired lease."""
        claim, operation = save_and_claim(harness.store, new_operation(1)), new_operation(1)
        harness.store.save(operation)
        harness.advance(LEASE + 1)
        assert due_steps(harness.store, expired=False) == [(operation.uuid, DueReason.UNSENT)]
        assert due_steps(harness.store, expired=False) == []
        assert due_steps(harness.store, 1) == [(claim.root.uuid, DueReason.EXPIRED)]
        row = row_of(harness.store, claim.root.uuid)
        assert (row.owner, row.epoch, row.token, row.send_count) == (None, 1, claim.root.token, 0)
        assert claim_root(harness.other, row).epoch == 2

    def test_step_that_could_not_be_sent_is_due_again(self, harness: StoreHarness) -> None:
        operation = new_operation(1)
        harness.store.save(operation)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        (taken,) = harness.store.take_due_steps(5, "reaper", expired=True)
        harness.store.postpone_send([(taken.id, taken.epoch)], 5)
        assert due_steps(harness.store) == []
        harness.advance(6)
        assert due_steps(harness.store) == [(operation.uuid, DueReason.UNSENT)]

    def test_postponed_send_does_not_affect_a_claimed_step(self, harness: StoreHarness) -> None:
        operation = new_operation(1)
        harness.store.save(operation)
        claim = claim_root(harness.store, row_of(harness.store, operation.uuid))
        harness.store.postpone_send([(claim.id, 0), (claim.id, 1)], 5)
        assert row_of(harness.store, operation.uuid) == claim.root

    def test_ended_operation_is_never_due(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(1))
        harness.store.checkpoint(ending_checkpoint(claim, 0))
        harness.store.postpone_send([(claim.id, 2)], 0)
        harness.advance(100_000)
        assert due_steps(harness.store) == []
