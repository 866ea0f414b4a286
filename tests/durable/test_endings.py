"""Tests of the end of a stored operation: its hooks, cancel and resume."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser import signals
from kser.attempt import current_attempt
from kser.errors import StateConflict, StoreUnavailable, UsageError
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.status import CANCELLED, FAILED, FINAL, PENDING, RUNNING, SUCCESS, TRANSITIONS, can_transition
from kser.store.model import Claim
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import (
    BOTH_WAYS,
    LEASE_EXPIRED,
    DurableHarness,
    Sale,
    Spread,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import claim_request, resume_stored
from tests.support import WAIT_SECONDS, lines


class Hooked(Sale):
    """Notes what becomes of it."""

    told: ClassVar[list[Any]] = []
    ending: ClassVar[Any] = None

    def onsuccess(self, result: Result) -> Any:
        return self._tell("onsuccess", result)

    def onerror(self, result: Result) -> Any:
        return self._tell("onerror", result)

    def _tell(self, name: str, result: Result) -> Any:
        self.told.append((name, self.uuid, result.retval.get("c")))
        ending = type(self).ending
        return ending(name, result) if ending else result


class HookedSpread(Hooked):
    DISTRIBUTED = True


HOOKED = pytest.mark.parametrize("cls", [Hooked, HookedSpread])


@pytest.fixture(autouse=True)
def forget(harness: DurableHarness) -> Any:
    for cls in (Hooked, HookedSpread):
        harness.first.subscribe_copy(cls)
    yield
    Hooked.told.clear()
    Hooked.ending = None


def results(harness: DurableHarness, uuid: str = "1") -> Result:
    """What an operation gave."""
    operation = harness.registry.get(uuid)
    assert operation is not None
    found: Result = operation.result
    return found


# -- hooks -------------------------------------------------------------------------------------------------------------


@HOOKED
def test_onsuccess_hook_runs_under_the_claim_before_the_end_is_recorded(
    harness: DurableHarness, cls: type[Hooked]
) -> None:
    """durability rule 23"""
    seen: list[Any] = []
    Hooked.ending = lambda name, result: seen.append(harness.stored().operation) or result
    ScriptedTask.script["1.c"] = lambda: Result(retval={"c": 1})
    send_raw_message(cls)
    harness.first.handle()
    assert Hooked.told == [("onsuccess", "1", 1)]
    (row,) = seen
    assert (row.status, row.phase, row.owner is not None) == (RUNNING, "SUCCESS", True)
    assert harness.status() == SUCCESS


@HOOKED
def test_onerror_hook_runs_when_a_task_failed(harness: DurableHarness, cls: type[Hooked]) -> None:
    """durability rule 23"""
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    harness.first.handle()
    assert [name for name, *_ in Hooked.told] == ["onerror"]
    assert (harness.status(), harness.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert "no" in results(harness).stderr


@HOOKED
def test_hook_return_value_is_the_stored_result(harness: DurableHarness, cls: type[Hooked]) -> None:
    """durability rule 23"""
    Hooked.ending = lambda name, result: Result(uuid="1", retval={"made": name})
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), results(harness).retval) == (SUCCESS, {"made": "onsuccess"})


@HOOKED
@pytest.mark.parametrize("error", [ConnectionError("no"), SystemExit(3)])
def test_raising_onsuccess_hook_fails_the_operation(
    harness: DurableHarness, cls: type[Hooked], error: BaseException
) -> None:
    """durability rule 23"""

    def raising(name: str, result: Result) -> Result:
        if name == "onsuccess":
            raise error
        return result

    Hooked.ending = raising
    send_raw_message(cls)
    harness.first.handle()
    assert [name for name, *_ in Hooked.told] == ["onsuccess", "onerror"]
    assert (harness.status(), harness.tasks()) == (FAILED, [SUCCESS] * 3)


@HOOKED
def test_raising_onerror_hook_leaves_the_operation_failed_and_is_logged(
    harness: DurableHarness, cls: type[Hooked], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 23"""

    def raising(name: str, result: Result) -> Result:
        raise ValueError("not even that")

    Hooked.ending = raising
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    harness.first.handle()
    assert harness.status() == FAILED
    assert any("onerror raised: not even that" in line for line in lines(caplog, logging.ERROR))


@HOOKED
def test_hook_runs_again_only_when_its_consumer_died_in_it(harness: DurableHarness, cls: type[Hooked]) -> None:
    """durability rule 23"""
    second = harness.process(cls, group="second")
    went: list[int] = []

    def die(name: str, result: Result) -> Result:
        went.append(1)
        if len(went) == 1:
            in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()
        return result

    Hooked.ending = die
    send_raw_message(cls)
    harness.first.handle()
    assert [name for name, *_ in Hooked.told] == ["onsuccess", "onsuccess"]
    assert harness.status() == SUCCESS
    assert harness.event_kinds().count("ended") == 1
    send_raw_message(cls)
    harness.first.handle()
    assert len(Hooked.told) == 2


def test_end_of_an_operation_is_sent_to_a_consumer_that_knows_its_class(harness: DurableHarness) -> None:
    """durability rule 23: the hooks run in a consumer that knows the class."""
    other = harness.process(group="other")
    harness.first.class_of(HookedSpread)("1").build().send(topic="orders")
    other.handle()
    assert (ScriptedTask.ran, Hooked.told, harness.status()) == (["1.a", "1.b", "1.c"], [], RUNNING)
    (end,) = sent_messages("orders")
    assert (end.uuid, end.entrypoint) == ("1", HookedSpread.path)
    harness.first.run(end)
    assert ([name for name, *_ in Hooked.told], harness.status()) == (["onsuccess"], SUCCESS)


def test_operation_without_hooks_sends_no_extra_message(harness: DurableHarness) -> None:
    """durability rule 23: no message and no transaction more."""
    counts: dict[str, int] = {}
    for cls in (Spread, HookedSpread):
        before = len(sent_messages())
        harness.first.send(cls, cls.__name__)
        harness.first.handle()
        counts[cls.__name__] = len(sent_messages()) - before
        assert harness.status(cls.__name__) == SUCCESS
    # The operation to begin, and its tasks.
    assert counts == {"Spread": 4, "HookedSpread": 4}


@BOTH_WAYS
def test_log_line_of_an_end_matches_the_in_memory_one(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 23"""
    send_raw_message(cls)
    harness.first.handle()
    assert any(
        line.startswith(f"{cls.__name__}.SetStatus: {cls.path}[1] status update 'RUNNING' -> 'SUCCESS'")
        for line in lines(caplog, logging.INFO)
    )


# -- cancelling --------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_unclaimed_operation_is_cancelled_at_once(harness: DurableHarness, cls: type[Hooked]) -> None:
    """durability rule 24"""
    operation = harness.first.class_of(cls)("1").build().send()
    assert operation.cancel(reason="changed my mind") == CANCELLED
    assert (harness.status(), harness.stored().operation.cancel_reason) == (CANCELLED, "changed my mind")
    harness.first.handle()
    assert (ScriptedTask.ran, harness.tasks()) == ([], [PENDING] * 3)


@HOOKED
def test_claimed_operation_is_cancelled_after_its_running_task_without_hooks(
    harness: DurableHarness, cls: type[Hooked]
) -> None:
    """durability rule 24: the result of that task is still recorded."""
    answers: list[str] = []

    def cancel() -> Result:
        operation = harness.registry.get("1")
        assert operation is not None
        in_other_thread(lambda: answers.append(operation.cancel("enough")))()
        return Result(retval={"b": 1})

    ScriptedTask.script["1.b"] = cancel
    send_raw_message(cls)
    harness.first.handle()
    assert (answers, ScriptedTask.ran, Hooked.told) == ([RUNNING], ["1.a", "1.b"], [])
    assert (harness.status(), harness.tasks()) == (CANCELLED, [SUCCESS, SUCCESS, PENDING])
    assert (results(harness).retval, harness.event_kinds()[-1]) == ({"b": 1}, "ended")
    assert harness.event_kinds().count("ended") == 1


@BOTH_WAYS
@pytest.mark.parametrize("end", [None, ConnectionError("no")], ids=["succeeds", "fails"])
def test_cancel_takes_effect_whether_the_running_task_succeeds_or_fails(
    harness: DurableHarness, cls: type[Sale], end: Exception | None
) -> None:
    """durability rule 24"""

    def cancel() -> None:
        in_other_thread(lambda: harness.store.cancel("1", None))()
        if end is not None:
            raise end

    ScriptedTask.script["1.b"] = cancel
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), harness.tasks()[1]) == (CANCELLED, SUCCESS if end is None else FAILED)


@BOTH_WAYS
def test_task_sees_a_cancel_request(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24: and may return early."""

    class Looking(ScriptedTask):
        seen_request: ClassVar[list[Any]] = []

        def run(self) -> Any:
            self.seen_request.append(self.cancel_requested)
            harness.store.cancel("1", None)
            # What it asks again and again is looked up now and then.
            current_attempt.get()._checked_at = -10  # type: ignore[union-attr]
            self.seen_request.append(self.cancel_requested)

    class Own(cls):  # type: ignore[valid-type,misc]
        def build_tasks(self, **kwargs: Any) -> list[Any]:
            return [Looking("1.x")]

    harness.first.subscribe_copy(Looking)
    harness.first.subscribe_copy(Own)
    send_raw_message(Own)
    harness.first.handle()
    assert (Looking.seen_request, harness.status()) == ([False, True], CANCELLED)


@BOTH_WAYS
def test_cancel_after_the_last_checkpoint_returns_the_real_status(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24"""
    send_raw_message(cls)
    harness.first.handle()
    before = harness.stored()
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.cancel() == SUCCESS
    assert harness.stored() == before


@BOTH_WAYS
def test_cancel_after_lease_expiry_of_a_dead_owner_takes_effect_at_once(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 24"""
    operation = harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    assert operation.cancel() == PENDING or harness.status() == RUNNING
    harness.advance(LEASE_EXPIRED)
    assert operation.cancel() == CANCELLED
    harness.first.handle()
    assert ScriptedTask.ran == []


@BOTH_WAYS
def test_cancel_survives_owner_crash(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24"""
    operation = harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    operation.cancel()
    harness.advance(LEASE_EXPIRED)
    harness.first.handle()
    assert (harness.status(), len(ScriptedTask.ran) <= 1) == (CANCELLED, True)


def test_operation_waiting_for_a_retry_is_cancelled_at_once(harness: DurableHarness) -> None:
    """durability rule 24"""
    ScriptedTask.script["1.b"] = Retry.later(100)
    send_raw_message(Sale)
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.cancel() == CANCELLED
    harness.advance(101)
    harness.first.background_service.reap()
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b"]


@BOTH_WAYS
def test_operation_changed_signal_reports_a_cancel(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24"""
    heard: list[Any] = []

    def hear(sender: Any, uuid: str, old: Any, new: str, **_: Any) -> None:
        heard.append((uuid, old, new, harness.status(uuid)))

    ScriptedTask.script["1.b"] = in_other_thread(lambda: harness.store.cancel("1", None))
    with signals.operation_changed.connected_to(hear):
        send_raw_message(cls)
        harness.first.handle()
        other = harness.first.class_of(cls)("2").build().send()
        other.cancel()
    assert ("1", RUNNING, CANCELLED, CANCELLED) in heard
    assert ("2", PENDING, CANCELLED, CANCELLED) in heard


@BOTH_WAYS
def test_release_of_an_interrupted_claim_applies_a_pending_cancel(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24: and that is told, and nothing is sent."""
    heard: list[Any] = []

    def hear(sender: Any, old: Any, new: str, **_: Any) -> None:
        heard.append((old, new))

    def interrupted() -> None:
        in_other_thread(lambda: harness.store.cancel("1", None))()
        raise KeyboardInterrupt

    ScriptedTask.script["1.b"] = interrupted
    send_raw_message(cls)
    with signals.operation_changed.connected_to(hear), pytest.raises(KeyboardInterrupt):
        harness.first.handle()
    assert (harness.status(), heard[-1]) == (CANCELLED, (RUNNING, CANCELLED))
    assert [kmsg.uuid for kmsg in sent_messages()] == (["1"] if cls is Sale else ["1", "1.a", "1.b"])


# -- going on ----------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_resume_continues_at_the_failed_task(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 25: under the next epoch, with a new attempt, with the results there are."""
    ScriptedTask.script["1.a"] = lambda: Result(retval={"a": 1})
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    harness.first.handle()
    epoch = harness.stored().operation.epoch
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.resume() is operation
    assert (harness.stored().operation.epoch, harness.status()) == (epoch + 1, RUNNING)
    assert harness.tasks() == [SUCCESS, PENDING, PENDING]
    ScriptedTask.script["1.b"] = lambda: Result(retval={"b": 2})
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)
    assert results(harness).retval == {"a": 1, "b": 2}
    assert (results(harness).retcode, results(harness).stderr) == (0, "")
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, SUCCESS), (2, 1, SUCCESS)]


@BOTH_WAYS
def test_resume_of_a_cancelled_operation_continues_it(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 25"""
    ScriptedTask.script["1.b"] = in_other_thread(lambda: harness.store.cancel("1", "enough"))
    send_raw_message(cls)
    harness.first.handle()
    ScriptedTask.script.clear()
    operation = harness.registry.get("1")
    assert operation is not None
    operation.resume()
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    row = harness.stored().operation
    assert (row.cancel_requested, row.cancel_reason) == (False, None)


@HOOKED
def test_resume_after_a_failed_hook_repeats_only_the_end(harness: DurableHarness, cls: type[Hooked]) -> None:
    """durability rule 25: there is no task to run."""

    def raising(name: str, result: Result) -> Result:
        if name == "onsuccess":
            raise ConnectionError("no")
        return result

    Hooked.ending = raising
    send_raw_message(cls)
    harness.first.handle()
    assert harness.status() == FAILED
    Hooked.ending = None
    operation = harness.registry.get("1")
    assert operation is not None
    operation.resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])
    assert results(harness).retcode == 0


def test_resume_builds_an_operation_whose_build_failed(harness: DurableHarness) -> None:
    """durability rule 25"""

    class Moody(Sale):
        fails: ClassVar[bool] = True

        def build_tasks(self, **kwargs: Any) -> list[Any]:
            if self.fails:
                raise ConnectionError("no catalogue")
            return super().build_tasks(**kwargs)

    harness.first.subscribe_copy(Moody)("1").send()
    harness.first.handle()
    assert (harness.status(), "no catalogue" in results(harness).stderr) == (FAILED, True)
    Moody.fails = False
    operation = harness.registry.get("1")
    assert operation is not None
    operation.resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


def test_concurrent_resumes_have_one_winner(harness: DurableHarness) -> None:
    """durability rule 25"""
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(Sale)
    harness.first.handle()
    operation = harness.registry.get("1")
    assert operation is not None
    answers: list[Any] = []
    together = threading.Barrier(8)

    def resume() -> None:
        together.wait(WAIT_SECONDS)
        try:
            answers.append(operation.resume())
        except StateConflict as conflict:
            answers.append(conflict)

    threads = [threading.Thread(target=resume) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    told = [answer for answer in answers if isinstance(answer, StateConflict)]
    assert (len(answers), len(told)) == (8, 7)
    assert {conflict.code for conflict in told} == {409}
    assert "only a FAILED or CANCELLED one can be resumed" in told[0].message
    assert harness.event_kinds().count("resumed") == 1


def resume_with_an_outage(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, first_call: Callable[..., Any]
) -> list[tuple[Any, ...]]:
    """Resume operation 1 while the first call of the store ends in an outage, and return the arguments of each call.

    :param first_call: called in place of the store's first ``resume``, with that method and its arguments.
    """
    resume = harness.store.resume
    calls: list[tuple[Any, ...]] = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            return resume(*args)
        first_call(resume, *args)
        raise StoreUnavailable("the connection was lost")

    monkeypatch.setattr(harness.store, "resume", interrupted)
    operation = harness.registry.get("1")
    assert operation is not None
    try:
        operation.resume()
    finally:
        assert len(calls) == 2
    return calls


def test_resume_whose_response_is_lost_takes_effect_once(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rules 10 and 25"""
    ScriptedTask.script["1.b"] = [ConnectionError("no"), None]
    send_raw_message(Sale)
    harness.first.handle()
    calls = resume_with_an_outage(harness, monkeypatch, lambda resume, *args: resume(*args))
    assert calls[0] == calls[1]
    assert harness.event_kinds().count("resumed") == 1
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_resume_whose_response_is_lost_survives_a_claim_before_the_repetition(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rules 10 and 25"""
    ScriptedTask.script["1.b"] = [ConnectionError("no"), None]
    send_raw_message(Sale)
    harness.first.handle()

    def resume_and_claim(resume: Callable[..., Any], *args: Any) -> None:
        resume(*args)
        harness.claim_and_die()

    resume_with_an_outage(harness, monkeypatch, resume_and_claim)
    assert harness.status() == RUNNING
    assert harness.event_kinds().count("resumed") == 1


def test_rejected_resume_stays_rejected_after_an_outage(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 25"""
    send_raw_message(Sale)
    harness.first.handle()
    with pytest.raises(StateConflict, match="is SUCCESS: only a FAILED or CANCELLED one can be resumed"):
        resume_with_an_outage(harness, monkeypatch, lambda *_: None)


@pytest.mark.parametrize("state", ["pending", "running", "success"])
def test_resume_of_an_operation_that_did_not_fail_is_rejected(harness: DurableHarness, state: str) -> None:
    """durability rule 25"""
    operation = harness.first.class_of(Sale)("1").build().send()
    if state == "running":
        harness.claim_and_die()
    if state == "success":
        harness.first.handle()
    before = harness.stored()
    with pytest.raises(StateConflict, match=f"is {state.upper()}: only a FAILED or CANCELLED one can be resumed"):
        operation.resume()
    assert harness.stored() == before


def test_resume_needs_neither_the_class_nor_a_producer(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 25: a consumer's reaper sends it."""
    ScriptedTask.script["1.b"] = [ConnectionError("no"), None]
    send_raw_message(Sale)
    harness.first.handle()
    desk = harness.process(group="desk")
    desk.registry._kser_producer = None
    operation = desk.registry.get("1")
    assert type(operation) is Operation
    caplog.clear()
    operation.resume()
    (line,) = lines(caplog, logging.INFO)
    assert line.startswith(
        "operation 1 is resumed, and the reaper of a consumer will send it: the registry has no producer"
    )
    harness.advance_with_reaper(5)
    harness.first.handle()
    assert harness.status() == SUCCESS


@pytest.mark.parametrize("what", ["resume", "cancel", "wait"])
def test_resume_cancel_and_wait_of_an_unknown_operation_raise(harness: DurableHarness, what: str) -> None:
    operation = harness.first.class_of(Sale)("unknown")
    with pytest.raises(UsageError, match="there is no stored operation 'unknown': it was never sent, was purged, or"):
        getattr(operation, what)()


def test_claim_from_before_a_resume_is_fenced(harness: DurableHarness) -> None:
    """durability rules 8 and 25"""
    late: list[Any] = []

    def cancelled_and_resumed() -> Result:
        harness.advance(LEASE_EXPIRED)
        assert harness.store.cancel("1", None).status == CANCELLED  # type: ignore[union-attr]
        resume_stored(harness.store, "1")
        return Result(retval={"late": 1})

    ScriptedTask.script["1.b"] = [cancelled_and_resumed, None]
    send_raw_message(Sale)
    harness.first.handle()
    late.append(harness.tasks())
    claim = harness.store.claim("1", "1", claim_request())
    assert isinstance(claim, Claim)
    assert (late, claim.root.step) == ([[SUCCESS, PENDING, PENDING]], 1)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_status_transitions_match_the_table() -> None:
    """durability rule 26"""
    allowed = {(old, new) for old, follow in TRANSITIONS.items() for new in follow}
    assert allowed == {
        (PENDING, RUNNING),
        (RUNNING, SUCCESS),
        (RUNNING, FAILED),
        (PENDING, CANCELLED),
        (RUNNING, CANCELLED),
        (FAILED, RUNNING),
        (CANCELLED, RUNNING),
    }
    assert not any(can_transition(SUCCESS, new) for new in TRANSITIONS)
    assert {state for state in TRANSITIONS if state in FINAL} == {SUCCESS, FAILED, CANCELLED}


@BOTH_WAYS
@pytest.mark.parametrize("end", ["success", "failure", "cancel", "resume"])
def test_emitted_status_changes_are_transitions_of_the_table(
    harness: DurableHarness, cls: type[Sale], end: str
) -> None:
    """durability rule 26"""
    heard: list[Any] = []

    def hear(sender: Any, old: Any, new: str, **_: Any) -> None:
        heard.append((old, new))

    with signals.operation_changed.connected_to(hear):
        if end in ("failure", "resume"):
            ScriptedTask.script["1.b"] = [ConnectionError("no"), None]
        if end == "cancel":
            ScriptedTask.script["1.b"] = in_other_thread(lambda: harness.store.cancel("1", None))
        harness.first.class_of(cls)("1").build().send()
        harness.first.handle()
        if end == "resume":
            operation = harness.registry.get("1")
            assert operation is not None
            operation.resume()
            harness.first.handle()
    ways = {
        "success": [(RUNNING, SUCCESS)],
        "failure": [(RUNNING, FAILED)],
        "cancel": [(RUNNING, CANCELLED)],
        "resume": [(RUNNING, FAILED), (FAILED, RUNNING), (RUNNING, SUCCESS)],
    }
    assert heard == [(None, PENDING), (PENDING, RUNNING), *ways[end]]
    assert all(can_transition(old, new) for old, new in heard[1:])
