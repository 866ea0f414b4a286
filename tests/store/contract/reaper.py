"""Contract tests of heartbeat and reaper."""

from __future__ import annotations

import pytest

from kser.store.model import (
    MAX_RESEND_DELAY,
    RESEND_UNSENT_AFTER,
    SEND_DELAY,
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
    event_kinds,
    new_operation,
    new_task,
    reserved_steps,
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
        assert reserved_steps(harness.store) == [(claims[2].root.uuid, DueReason.EXPIRED)]
        assert harness.store.renew([], "consumer-a", LEASE) == set()

    def test_heartbeat_renews_an_expired_lease_until_another_claim(self, harness: StoreHarness) -> None:
        """Rule 9: an expired lease alone does not end a claim."""
        claim = save_and_claim(harness.store, new_operation(1))
        harness.advance(LEASE + 10)
        assert due_steps(harness.store) == [(claim.root.uuid, DueReason.EXPIRED)]
        harness.store.mark_sent([(claim.id, claim.epoch)], RESEND, LEASE)
        assert row_of(harness.store, claim.root.uuid).owner == "consumer-a"
        assert harness.store.renew([(claim.id, claim.epoch)], "consumer-a", LEASE) == {claim.id}
        row = row_of(harness.store, claim.root.uuid)
        assert (row.owner, row.due_reason) == ("consumer-a", DueReason.EXPIRED)
        assert row.lease_until == row.take_at == pytest.approx(harness.now + LEASE, abs=TIME_TOLERANCE)
        assert row.send_at == row.take_at + SEND_DELAY
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
        assert steps == [
            DueStep(
                id=row.id,
                uuid=row.uuid,
                epoch=0,
                target=operation.target,
                reason=DueReason.UNSENT,
                take_at=row.take_at or 0,
            )
        ]
        taken = row_of(harness.store, operation.uuid)
        assert taken == row._replace(send_at=taken.send_at)
        assert taken.send_at == pytest.approx(harness.now + SEND_GRACE, abs=TIME_TOLERANCE)
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
        harness.store.mark_sent([(row.id, row.epoch)], RESEND, LEASE)
        row = row_of(harness.store, operation.uuid)
        assert row.send_count == 1
        # Until it was claimed for the first time, its record may wait in its lane, so nobody takes the step over before
        # its message is sent again.
        assert row.take_at == row.send_at
        assert row.sent_at == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        delays = [RESEND]
        for _ in range(8):
            harness.advance(delays[-1] - 10)
            assert due_steps(harness.store) == []
            harness.advance(20)
            taken_at = harness.now
            assert due_steps(harness.store) == [(row.uuid, DueReason.UNCLAIMED)]
            harness.store.mark_sent([(row.id, row.epoch)], RESEND, LEASE)
            sent = row_of(harness.store, row.uuid)
            assert (sent.take_at, sent.due_reason) == (row.take_at, DueReason.UNCLAIMED)
            assert sent.send_at is not None
            delays.append(sent.send_at - taken_at)
        assert delays == pytest.approx([60, 120, 240, 480, 960, 1920, *[MAX_RESEND_DELAY] * 3], abs=TIME_TOLERANCE)

    def test_claim_counts_as_successful_send(self, harness: StoreHarness) -> None:
        """Rule 15: a send may be recorded after the claim, and then changes nothing."""
        operation = new_operation(2)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        claim = claim_root(harness.store, row)
        harness.store.mark_sent([(row.id, 0), (row.id, 1)], RESEND, LEASE)
        assert row_of(harness.store, row.uuid) == claim.root
        harness.store.checkpoint(ending_checkpoint(claim, 0))
        ended = row_of(harness.store, row.uuid)
        harness.store.mark_sent([(row.id, ended.epoch)], RESEND, LEASE)
        assert row_of(harness.store, row.uuid) == ended
        harness.store.mark_sent([], RESEND, LEASE)

    def test_delayed_retry_is_not_due_before_due_at(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False, delay=500, due_reason=DueReason.RETRY))
        harness.store.mark_sent([(claim.id, 2)], RESEND, LEASE)
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
        harness.advance(SEND_DELAY)
        assert due_steps(harness.store, 1) == [(claim.root.uuid, DueReason.EXPIRED)]
        row = row_of(harness.store, claim.root.uuid)
        assert row == claim.root._replace(send_at=row.send_at)
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
        harness.store.mark_sent([(claim.id, 2)], RESEND, LEASE)
        harness.advance(100_000)
        assert due_steps(harness.store) == []
        assert reserved_steps(harness.store) == []
        assert harness.store.get_topics() == []

    def test_send_of_a_handed_over_step_allows_a_takeover_after_one_lease(self, harness: StoreHarness) -> None:
        """Rules 17 and 20: the wait doubles with each send that no claim follows."""
        claim = save_and_claim(harness.store, new_operation(2))
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False))
        for doublings in range(4):
            harness.store.mark_sent([(claim.id, 2)], RESEND, LEASE)
            row = row_of(harness.store, claim.root.uuid)
            assert (row.send_count, row.due_reason) == (doublings + 1, DueReason.UNCLAIMED)
            assert row.take_at == pytest.approx(harness.now + LEASE * 2**doublings, abs=TIME_TOLERANCE)
            assert row.send_at == pytest.approx(harness.now + RESEND * 2**doublings, abs=TIME_TOLERANCE)
        harness.store.mark_sent([(claim.id, 2)], 1, LEASE)
        row = row_of(harness.store, claim.root.uuid)
        assert row.take_at == row.send_at
        assert claim_root(harness.other, row).root.send_count == 0

    def test_send_after_an_expired_lease_counts_and_a_send_during_a_lease_does_not(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.store.mark_sent([(claim.id, 1)], RESEND, LEASE)
        assert row_of(harness.store, claim.root.uuid) == claim.root
        harness.advance(LEASE + 1)
        harness.store.mark_sent([(claim.id, 1)], RESEND, LEASE)
        row = row_of(harness.store, claim.root.uuid)
        assert (row.owner, row.lease_until, row.send_count) == ("consumer-a", claim.root.lease_until, 1)
        assert reserved_steps(harness.store) == [(row.uuid, DueReason.EXPIRED)]

    def test_postponed_send_does_not_postpone_a_takeover(self, harness: StoreHarness) -> None:
        operation = new_operation(1)
        harness.store.save(operation)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        harness.store.postpone_send([(row_of(harness.store, operation.uuid).id, 0)], 60)
        assert due_steps(harness.store) == []
        assert reserved_steps(harness.store) == [(operation.uuid, DueReason.UNSENT)]

    # -- unknown classes -----------------------------------------------------------------------------------------------

    def test_step_that_every_consumer_refuses_fails_after_enough_sends_and_time(self, harness: StoreHarness) -> None:
        """Rule 17: the step is neither sent nor taken over, but claimed and failed."""
        operation = new_operation(1)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        limits = {"max_sends": 3, "unknown_after": 500}
        for _ in range(3):
            harness.store.mark_sent([(row.id, 0)], RESEND, LEASE)
            assert harness.store.refuse_class(row.uuid, row.target.uuid) is not None
            harness.advance(240)
            row = row_of(harness.store, operation.uuid)
            last = harness.store.take_due_steps(5, "reaper", expired=True, **limits)
        assert (row.refusal_count, row.send_count) == (3, 3)
        assert [step.reason for step in last] == [DueReason.UNKNOWN_CLASS]
        assert event_kinds(harness.store, row.uuid) == ["accepted", "sent-again", "sent-again"]
        harness.advance(1)
        assert harness.store.take_due_steps(5, "reaper", expired=True, **limits) == []
        claim = claim_root(harness.store, row, claim_request(epoch=last[0].epoch))
        assert (claim.root.refusal_count, claim.root.refused_since) == (0, None)

    def test_step_is_sent_again_while_its_refusals_are_too_few_or_too_new(self, harness: StoreHarness) -> None:
        operation = new_operation(1)
        harness.store.save(operation)
        row = row_of(harness.store, operation.uuid)
        harness.store.mark_sent([(row.id, 0)], RESEND, LEASE)
        harness.store.refuse_class(row.uuid, row.target.uuid)
        harness.advance(RESEND + 1)
        for limits in ({"max_sends": 2, "unknown_after": 0}, {"max_sends": 1, "unknown_after": 3600}):
            (step,) = harness.store.take_due_steps(5, "reaper", expired=True, **limits)
            assert step.reason == DueReason.UNCLAIMED
            harness.advance(SEND_GRACE + 1)

    def test_refusal_is_counted_once_for_each_send(self, harness: StoreHarness) -> None:
        """A record may be delivered twice, and a refusal may be recorded before the send that caused it."""
        operation = new_operation(1)
        harness.store.save(operation)
        counts = []
        for _ in range(3):
            row = harness.store.refuse_class(operation.uuid, operation.uuid)
            assert row is not None
            counts.append(row.refusal_count)
        assert counts == [1, 1, 1]
        assert row == row_of(harness.other, operation.uuid)
        assert row.refused_since == pytest.approx(harness.now, abs=TIME_TOLERANCE)
        since = row.refused_since
        harness.advance(50)
        harness.store.mark_sent([(row.id, 0)], RESEND, LEASE)
        row = harness.store.refuse_class(operation.uuid, operation.uuid)
        assert row is not None
        assert (row.refusal_count, row.refused_since) == (2, since)

    def test_refusal_of_another_step_or_of_a_claimed_operation_changes_nothing(self, harness: StoreHarness) -> None:
        inner = new_operation(1)
        claim = save_and_claim(harness.store, new_operation([new_task(inner)]))
        uuid = claim.root.uuid
        assert harness.store.refuse_class(uuid, uuid) == claim.root
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False))
        row = row_of(harness.store, uuid)
        assert harness.store.refuse_class(uuid, "other-step") == row
        assert harness.store.refuse_class("unknown-root", uuid) is None
        assert harness.store.refuse_class(inner.uuid, inner.uuid) is None
        harness.store.cancel(uuid, None)
        row = row_of(harness.store, uuid)
        assert harness.store.refuse_class(uuid, uuid) == row
