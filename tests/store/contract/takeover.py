"""Contract tests of reservations and takeovers."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from kser import status as states
from kser.errors import FencedError
from kser.store.model import (
    MAX_RESEND_DELAY,
    RESEND_UNSENT_AFTER,
    SEND_DELAY,
    Claim,
    ClaimRefused,
    DueReason,
    Mode,
    RefusalReason,
)
from tests.store.harness import (
    LEASE,
    LONG_RESERVATION,
    RESEND,
    TIME_TOLERANCE,
    StoreHarness,
    claim_request,
    claim_root,
    due_steps,
    event_kinds,
    new_operation,
    new_task,
    reserve,
    reserved_steps,
    resume_stored,
    row_of,
    save_and_claim,
    step_checkpoint,
    update_of,
)
from tests.support import run_concurrently


class TakeoverContract:
    """The contract of reservations."""

    def test_expired_lease_is_reserved_and_claimed_by_another_consumer(self, harness: StoreHarness) -> None:
        """Rules 20b and 20c: a reservation changes only ``take_at``, and the claim names its epoch."""
        claim = save_and_claim(harness.store, new_operation(2))
        assert reserved_steps(harness.other) == []
        harness.advance(LEASE + 0.1)
        (step,) = reserve(harness.other)
        row = row_of(harness.store, claim.root.uuid)
        assert row == claim.root._replace(take_at=step.take_at)
        assert step.take_at == pytest.approx(harness.now + LONG_RESERVATION, abs=TIME_TOLERANCE)
        assert (step.id, step.uuid, step.epoch) == (row.id, row.uuid, 1)
        assert (step.target, step.reason) == (row.target, DueReason.EXPIRED)
        request = claim_request("consumer-b", epoch=step.epoch, topic="orders", taken_over=step.reason)
        taken = claim_root(harness.other, row, request)
        assert (taken.epoch, taken.root.owner, taken.root.claim_count) == (2, "consumer-b", 2)
        stored = harness.store.snapshot(row.uuid)
        assert stored is not None
        assert [(event.kind, event.epoch, event.consumer, event.text) for event in stored.events[-2:]] == [
            ("taken-over", 1, "consumer-b", DueReason.EXPIRED),
            ("claimed", 2, "consumer-b", None),
        ]

    def test_record_reserves_a_step_whose_lease_has_expired_before_its_claim(self, harness: StoreHarness) -> None:
        """Rules 9 and 20c: until the claim, the owner may renew its lease."""
        first, second = (save_and_claim(harness.store, new_operation(2)) for _ in range(2))
        for_record = claim_request("consumer-b", expired=False, topic="orders")
        for claim in (first, second):
            refusal = harness.other.claim(claim.root.uuid, claim.root.uuid, for_record)
            assert isinstance(refusal, ClaimRefused)
            assert refusal.reason == RefusalReason.HELD
        harness.advance(LEASE + 0.1)
        steps = []
        for claim in (first, second):
            refusal = harness.other.claim(claim.root.uuid, claim.root.uuid, for_record)
            assert isinstance(refusal, ClaimRefused)
            assert refusal.reason == RefusalReason.EXPIRED
            step = harness.other.reserve_step(refusal.root, LONG_RESERVATION)
            assert step is not None
            assert (step.id, step.epoch, step.reason) == (claim.id, 1, DueReason.EXPIRED)
            # The row has changed, so the reservation cannot be repeated, and no other record reserves the step.
            assert harness.store.reserve_step(refusal.root, LONG_RESERVATION) is None
            again = harness.store.claim(claim.root.uuid, claim.root.uuid, claim_request(expired=False))
            assert isinstance(again, ClaimRefused)
            assert again.reason == RefusalReason.WAITING
            steps.append(step)
        assert harness.store.renew([(first.id, 1)], "consumer-a", LEASE) == {first.id}
        results = [
            harness.other.claim(step.uuid, step.uuid, claim_request("consumer-b", epoch=step.epoch)) for step in steps
        ]
        assert isinstance(results[0], ClaimRefused)
        assert results[0].reason == RefusalReason.HELD
        assert isinstance(results[1], Claim)
        assert results[1].epoch == 2

    def test_step_is_reserved_only_after_it_was_due_for_some_time(self, harness: StoreHarness) -> None:
        """Rule 20d: a busy consumer leaves steps to idle consumers at first."""
        uuid = self._make_due(harness, DueReason.RELEASED)
        harness.advance(2)
        assert reserved_steps(harness.store, overdue=10) == []
        harness.advance(9)
        assert reserved_steps(harness.store, overdue=10) == [(uuid, DueReason.RELEASED)]

    def test_due_step_stays_due_after_a_send(self, harness: StoreHarness) -> None:
        """Rule 12: its message may wait in the partition of a dead consumer."""
        for reason in (DueReason.EXPIRED, DueReason.RELEASED, DueReason.RESUMED):
            uuid = self._make_due(harness, reason)
            harness.advance(SEND_DELAY + 0.1)
            due = dict(due_steps(harness.store))
            assert due[uuid] == reason
            row = row_of(harness.store, uuid)
            harness.store.mark_sent([(row.id, row.epoch)], RESEND, LEASE)
            sent = row_of(harness.store, uuid)
            assert (sent.take_at, sent.due_reason, sent.send_count) == (row.take_at, reason, 1)
            assert sent.send_at == pytest.approx(harness.now + RESEND, abs=TIME_TOLERANCE)
            assert (uuid, reason) in reserved_steps(harness.other)

    def test_owner_renews_its_lease_in_spite_of_a_reservation(self, harness: StoreHarness) -> None:
        """Rules 9 and 20b: the slow owner keeps its claim, and the takeover is refused."""
        claim = save_and_claim(harness.store, new_operation(2))
        harness.advance(LEASE + 0.1)
        (step,) = reserve(harness.other)
        assert harness.store.renew([(claim.id, claim.epoch)], "consumer-a", LEASE) == {claim.id}
        renewed = row_of(harness.store, claim.root.uuid)
        refusal = harness.other.claim(step.uuid, step.target.uuid, claim_request(epoch=step.epoch))
        assert refusal == ClaimRefused(RefusalReason.HELD, renewed)
        harness.other.return_reservations([step])
        harness.other.postpone_takeover([step], 5)
        assert row_of(harness.store, renewed.uuid) == renewed

    def test_owner_checkpoints_in_spite_of_a_reservation(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(3))
        harness.advance(LEASE + 0.1)
        (step,) = reserve(harness.other)
        assert harness.store.checkpoint(step_checkpoint(claim, 0)) == states.RUNNING
        taken = claim_root(harness.other, row_of(harness.store, step.uuid), claim_request(epoch=step.epoch))
        assert taken.root.step == 1
        with pytest.raises(FencedError):
            harness.store.checkpoint(step_checkpoint(claim, 1))

    def test_record_of_a_reserved_step_may_still_be_claimed(self, harness: StoreHarness) -> None:
        """Rule 20c: of a takeover and the step's own record, one claim wins."""
        operation = new_operation(2)
        harness.store.save(operation)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        (step,) = reserve(harness.other)
        claim = claim_root(harness.store, row_of(harness.store, operation.uuid))
        refusal = harness.other.claim(step.uuid, step.target.uuid, claim_request(epoch=step.epoch))
        assert refusal == ClaimRefused(RefusalReason.HELD, claim.root)
        harness.store.checkpoint(step_checkpoint(claim, 0, keep=False, due_reason=DueReason.RELEASED))
        released = row_of(harness.store, step.uuid)
        refusal = harness.other.claim(step.uuid, step.target.uuid, claim_request(epoch=step.epoch))
        assert refusal == ClaimRefused(RefusalReason.STALE, released)

    def test_each_due_step_is_reserved_by_one_consumer(self, harness: StoreHarness) -> None:
        """Rule 20b."""
        uuids = sorted(save_and_claim(harness.store, new_operation(2)).root.uuid for _ in range(30))
        harness.advance(LEASE + 1)
        results = run_concurrently(
            *(lambda store=store: reserved_steps(store, 5) for store in (harness.store, harness.other) * 3)
        )
        assert [len(result) for result in results] == [5] * 6
        assert sorted(uuid for result in results for uuid, _ in result) == uuids
        assert reserved_steps(harness.store) == []

    def test_concurrent_claims_of_a_takeover_and_a_record_have_one_winner(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.advance(LEASE + 0.1)
        (step,) = reserve(harness.other)
        requests = [claim_request(epoch=step.epoch), claim_request(), claim_request(epoch=step.epoch)]
        results = run_concurrently(
            *(lambda request=request: harness.other.claim(step.uuid, step.target.uuid, request) for request in requests)
        )
        assert sum(isinstance(result, Claim) for result in results) == 1
        assert row_of(harness.store, claim.root.uuid).epoch == 2

    def test_step_is_due_again_when_its_reservation_ends(self, harness: StoreHarness) -> None:
        """Rule 20b: a consumer that dies between reservation and claim delays the step, and does not lose it."""
        claim = save_and_claim(harness.store, new_operation(2))
        harness.advance(LEASE + 0.1)
        assert reserved_steps(harness.store) == [(claim.root.uuid, DueReason.EXPIRED)]
        harness.advance(LONG_RESERVATION - 10)
        assert reserved_steps(harness.other) == []
        harness.advance(10.1)
        assert reserved_steps(harness.other) == [(claim.root.uuid, DueReason.EXPIRED)]

    def test_reserved_step_is_not_sent(self, harness: StoreHarness) -> None:
        claim = save_and_claim(harness.store, new_operation(2))
        harness.advance(LEASE + SEND_DELAY + 0.1)
        assert len(reserve(harness.store)) == 1
        assert due_steps(harness.store) == []
        harness.advance(LONG_RESERVATION + 0.1)
        assert due_steps(harness.store) == [(claim.root.uuid, DueReason.EXPIRED)]

    @pytest.mark.parametrize("reason", [DueReason.EXPIRED, DueReason.RETRY, DueReason.RESUMED, DueReason.RELEASED])
    def test_step_that_nobody_takes_over_is_sent_after_a_second(self, harness: StoreHarness, reason: DueReason) -> None:
        """Rule 20."""
        uuid = self._make_due(harness, reason)
        row = row_of(harness.store, uuid)
        assert (row.send_at or 0) - (row.take_at or 0) == pytest.approx(SEND_DELAY, abs=0.001)
        harness.advance(SEND_DELAY + 0.1)
        assert due_steps(harness.store) == [(uuid, reason)]
        # The step may still be taken over while its message is under way.
        assert reserved_steps(harness.store) == [(uuid, reason)]

    def _make_due(self, harness: StoreHarness, reason: DueReason, tasks: Any = 3, **values: Any) -> str:
        """Store an operation whose current step has just become due for a reason, and return its uuid."""
        claim = save_and_claim(harness.store, new_operation(tasks, **values))
        if reason == DueReason.EXPIRED:
            harness.advance(LEASE + 0.1)
        elif reason == DueReason.RETRY:
            retry = step_checkpoint(claim, 0, updates=[update_of(claim.root, 0)], keep=False, delay=20)
            harness.store.checkpoint(retry._replace(due_reason=reason))
            harness.advance(20.1)
        elif reason == DueReason.RESUMED:
            harness.store.cancel(claim.root.uuid, None)
            harness.store.checkpoint(step_checkpoint(claim, 0))
            resume_stored(harness.store, claim.root.uuid)
        elif reason == DueReason.RELEASED:
            harness.store.checkpoint(step_checkpoint(claim, 0, keep=False, due_reason=reason))
        else:
            harness.store.checkpoint(step_checkpoint(claim, 0, keep=False))
            if reason == DueReason.UNCLAIMED:
                harness.store.mark_sent([(claim.id, 2)], RESEND, LEASE)
            harness.advance(LEASE + 0.1)
        return claim.root.uuid

    @pytest.mark.parametrize("reason", [reason for reason in DueReason if reason != DueReason.UNKNOWN_CLASS])
    def test_busy_consumer_reserves_only_expired_leases_and_due_retries(
        self, harness: StoreHarness, reason: DueReason
    ) -> None:
        """Rule 20d."""
        uuid = self._make_due(harness, reason)
        urgent = [(uuid, reason)] if reason in (DueReason.EXPIRED, DueReason.RETRY) else []
        assert reserved_steps(harness.store, only_urgent=True) == urgent
        if not urgent:
            assert reserved_steps(harness.store) == [(uuid, reason)]

    def test_untrusted_leases_are_not_reserved(self, harness: StoreHarness) -> None:
        """Rule 21: a consumer that has just reached the store does not know which owners are gone."""
        expired = self._make_due(harness, DueReason.EXPIRED)
        retry = self._make_due(harness, DueReason.RETRY)
        assert reserved_steps(harness.store, expired=False) == [(retry, DueReason.RETRY)]
        assert reserved_steps(harness.store, expired=False) == []
        # Also an expired step whose message was sent meanwhile.
        row = row_of(harness.store, expired)
        harness.store.mark_sent([(row.id, row.epoch)], 1, LEASE)
        harness.advance(2)
        assert reserved_steps(harness.store, expired=False) == []
        assert reserved_steps(harness.store) == [(expired, DueReason.EXPIRED)]

    def test_only_steps_of_the_named_topics_are_reserved(self, harness: StoreHarness) -> None:
        """Rules 6 and 20a."""
        uuids = [self._make_due(harness, DueReason.RESUMED, topic=topic) for topic in ("orders", "gpu", "mail", "été")]
        assert harness.store.get_topics() == ["gpu", "mail", "orders", "été"]
        assert reserved_steps(harness.store, topics=[]) == []
        assert reserved_steps(harness.store, topics=["ORDERS", "order", "orders2"]) == []
        assert reserved_steps(harness.store, topics=["mail", "unknown"]) == [(uuids[2], DueReason.RESUMED)]
        assert reserved_steps(harness.store, topics={"gpu", "été"}) == [
            (uuids[1], DueReason.RESUMED),
            (uuids[3], DueReason.RESUMED),
        ]

    def test_only_steps_of_known_classes_are_reserved(self, harness: StoreHarness) -> None:
        """Rules 6 and 17: the class of the message; in a local operation, also the class of the current task."""
        uuid = self._make_due(harness, DueReason.EXPIRED, tasks=[new_task(entrypoint="shop.Ship"), new_task()])
        for known in ([], ["shop.PlaceOrder"], ["shop.Ship"], ["shop.PlaceOrder", "shop.Charge"]):
            assert reserved_steps(harness.store, known=known) == []
        assert reserved_steps(harness.store, known={"shop.PlaceOrder", "shop.Ship"}) == [(uuid, DueReason.EXPIRED)]

    def test_distributed_step_needs_only_the_class_of_its_message(self, harness: StoreHarness) -> None:
        uuid = self._make_due(harness, DueReason.EXPIRED, mode=Mode.DISTRIBUTED)
        assert reserved_steps(harness.store, known=["shop.PlaceOrder"]) == [(uuid, DueReason.EXPIRED)]

    def test_steps_of_unknown_classes_do_not_hide_those_of_known_ones(self, harness: StoreHarness) -> None:
        for _ in range(20):
            self._make_due(harness, DueReason.RELEASED, entrypoint="other.Class")
        uuid = self._make_due(harness, DueReason.RELEASED)
        assert reserved_steps(harness.store, 1) == [(uuid, DueReason.RELEASED)]

    def test_longest_due_steps_are_reserved_first_over_all_topics_and_reasons(self, harness: StoreHarness) -> None:
        reasons = [DueReason.UNSENT, DueReason.RETRY, DueReason.UNCLAIMED, DueReason.EXPIRED, DueReason.RELEASED]
        uuids = []
        for index, reason in enumerate(reasons):
            uuids.append(self._make_due(harness, reason, topic="gpu" if index % 2 else "orders"))
            harness.advance(1)
        batches = [reserved_steps(harness.store, 2), reserved_steps(harness.store, 2), reserved_steps(harness.store, 2)]
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert [uuid for batch in batches for uuid, _ in batch] == uuids

    def test_returned_reservation_is_due_at_once_for_another_consumer(self, harness: StoreHarness) -> None:
        """Rule 20b: a consumer that ends gives its reservations back."""
        claims = [save_and_claim(harness.store, new_operation(2)) for _ in range(2)]
        harness.advance(LEASE + 0.1)
        steps = reserve(harness.store)
        harness.store.return_reservations([])
        harness.store.return_reservations(steps[:1])
        harness.store.return_reservations(steps[:1])
        (again,) = reserve(harness.other)
        assert (again.id, again.reason) == (steps[0].id, DueReason.EXPIRED)
        assert {step.id for step in steps} == {claim.id for claim in claims}
        # The second consumer now holds the reservation, so the first one cannot return it.
        before = row_of(harness.store, again.uuid)
        harness.store.return_reservations(steps[:1])
        assert row_of(harness.store, again.uuid) == before

    def test_returned_reservation_of_a_claimed_step_changes_nothing(self, harness: StoreHarness) -> None:
        operation = new_operation(2)
        harness.store.save(operation)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        (step,) = reserve(harness.other)
        claim = claim_root(harness.store, row_of(harness.store, operation.uuid))
        harness.other.return_reservations([step])
        harness.other.postpone_takeover([step], 5)
        assert row_of(harness.store, operation.uuid) == claim.root

    def test_takeover_that_ended_before_its_claim_waits_twice_as_long_each_time(self, harness: StoreHarness) -> None:
        """Rules 17 and 20e."""
        uuid = self._make_due(harness, DueReason.RELEASED)
        for wait in (5, 10, 20, 40):
            (step,) = reserve(harness.store)
            harness.store.postpone_takeover([step], 5)
            harness.store.postpone_takeover([step], 5)
            row = row_of(harness.store, uuid)
            assert row.take_at == pytest.approx(harness.now + wait, abs=TIME_TOLERANCE / 2)
            assert (row.send_at, row.due_reason) == ((row.take_at or 0) + SEND_DELAY, DueReason.UNCLAIMED)
            assert reserved_steps(harness.other) == due_steps(harness.other) == []
            harness.advance(wait + 0.1)
        assert row.send_count == 4
        (step,) = reserve(harness.store)
        harness.store.postpone_takeover([step], 4000)
        take_at = row_of(harness.store, uuid).take_at
        assert take_at == pytest.approx(harness.now + MAX_RESEND_DELAY, abs=TIME_TOLERANCE)

    def test_reservation_adds_no_event(self, harness: StoreHarness) -> None:
        """A busy consumer may reserve a step again and again, so events would fill the database."""
        uuid = self._make_due(harness, DueReason.RESUMED)
        reserve(harness.store)
        assert event_kinds(harness.store, uuid)[-1] == "resumed"

    def test_step_needs_all_classes_of_its_nested_operations(self, harness: StoreHarness) -> None:
        """Rule 6."""
        inner = new_operation([new_task(entrypoint="shop.Deep")], entrypoint="shop.Inner")
        operation = new_operation([new_task(inner)])
        harness.store.save(operation)
        harness.advance(RESEND_UNSENT_AFTER + 1)
        every = ["shop.PlaceOrder", "shop.Inner", "shop.Deep"]
        for missing in every:
            assert reserved_steps(harness.store, known=[path for path in every if path != missing]) == []
        assert reserved_steps(harness.store, known=every) == [(operation.uuid, DueReason.UNSENT)]

    # -- the renewer of leases -----------------------------------------------------------------------------------------

    def test_lease_renewer_renews_exactly_the_named_claims(self, harness: StoreHarness) -> None:
        """Rule 9: the heartbeat has a connection of its own, and renews a lease also after it has expired."""
        claims = [save_and_claim(harness.store, new_operation(2)) for _ in range(3)]
        lost = save_and_claim(harness.store, new_operation(2))
        harness.advance(LEASE + 1)
        claim_root(harness.other, lost.root)
        with contextlib.closing(harness.store.lease_renewer(3)) as renewer:
            keys = [(claim.id, claim.epoch) for claim in (*claims[:2], lost)]
            assert renewer.renew(keys, "consumer-a", LEASE) == ({claims[0].id, claims[1].id}, set())
            assert renewer.renew([], "consumer-a", LEASE) == (set(), set())
            assert renewer.renew(keys[2:], "consumer-a", LEASE) == (set(), set())
        row = row_of(harness.store, claims[0].root.uuid)
        assert row.lease_until == row.take_at == pytest.approx(harness.now + LEASE, abs=TIME_TOLERANCE)
        assert row_of(harness.store, claims[2].root.uuid) == claims[2].root
