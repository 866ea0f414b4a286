"""Tests of the resume of stored operations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.errors import StateConflict, StoreUnavailable, UsageError
from kser.sequencing.operation import Operation
from kser.status import CANCELLED, FAILED, PENDING, RUNNING, SUCCESS
from kser.store.model import Claim
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    HOOKED,
    LEASE_EXPIRED,
    DurableHarness,
    HookedSale,
    Sale,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import claim_request, resume_stored
from tests.support import lines, run_concurrently


@BOTH_MODES
def test_resume_continues_at_the_failed_task(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 25: under the next epoch, with a new attempt and the stored results."""
    ScriptedTask.script["1.a"] = lambda: Result(retval={"a": 1})
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    harness.first.handle()
    epoch = harness.snapshot().operation.epoch
    operation = harness.operation()
    assert operation.resume() is operation
    assert (harness.snapshot().operation.epoch, harness.status()) == (epoch + 1, RUNNING)
    assert harness.task_statuses() == [SUCCESS, PENDING, PENDING]
    ScriptedTask.script["1.b"] = lambda: Result(retval={"b": 2})
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)
    assert harness.operation().result.retval == {"a": 1, "b": 2}
    assert (harness.operation().result.retcode, harness.operation().result.stderr) == (0, "")
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, SUCCESS), (2, 1, SUCCESS)]


@BOTH_MODES
def test_resume_of_a_cancelled_operation_continues_it(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 25"""
    ScriptedTask.script["1.b"] = in_other_thread(lambda: harness.store.cancel("1", "enough"))
    send_raw_message(cls)
    harness.first.handle()
    ScriptedTask.script.clear()
    harness.operation().resume()
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    row = harness.snapshot().operation
    assert (row.cancel_requested, row.cancel_reason) == (False, None)


@HOOKED
@pytest.mark.usefixtures("hooked_classes")
def test_resume_after_a_failed_hook_repeats_only_the_end(harness: DurableHarness, cls: type[HookedSale]) -> None:
    """durability rule 25: no task runs again."""

    def fail(name: str, result: Result) -> Result:
        if name == "onsuccess":
            raise ConnectionError("no")
        return result

    HookedSale.on_hook = fail
    send_raw_message(cls)
    harness.first.handle()
    assert harness.status() == FAILED
    HookedSale.on_hook = None
    harness.operation().resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])
    assert harness.operation().result.retcode == 0


def test_resume_builds_an_operation_whose_build_failed(harness: DurableHarness) -> None:
    """durability rule 25"""

    class FailingBuild(Sale):
        fails: ClassVar[bool] = True

        def build_tasks(self, **kwargs: Any) -> list[Any]:
            if self.fails:
                raise ConnectionError("no catalogue")
            return super().build_tasks(**kwargs)

    harness.first.subscribe_copy(FailingBuild)("1").send()
    harness.first.handle()
    assert (harness.status(), "no catalogue" in harness.operation().result.stderr) == (FAILED, True)
    FailingBuild.fails = False
    harness.operation().resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


def test_concurrent_resumes_have_one_winner(harness: DurableHarness) -> None:
    """durability rule 25"""
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(Sale)
    harness.first.handle()
    operation = harness.operation()
    results = run_concurrently(*[operation.resume] * 8)
    conflicts = [result for result in results if isinstance(result, StateConflict)]
    assert [result for result in results if result not in conflicts] == [operation]
    assert len(conflicts) == 7
    assert {conflict.code for conflict in conflicts} == {409}
    assert "only a FAILED or CANCELLED one can be resumed" in conflicts[0].message
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
    operation = harness.operation()
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
    before = harness.snapshot()
    with pytest.raises(StateConflict, match=f"is {state.upper()}: only a FAILED or CANCELLED one can be resumed"):
        operation.resume()
    assert harness.snapshot() == before


def test_resume_needs_neither_the_class_nor_a_producer(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 25: a consumer takes the step over."""
    ScriptedTask.script["1.b"] = [ConnectionError("no"), None]
    send_raw_message(Sale)
    harness.first.handle()
    web_process = harness.start_process(group="web", producer=None)
    operation = web_process.registry.get("1")
    assert type(operation) is Operation
    caplog.clear()
    operation.resume()
    assert lines(caplog, logging.INFO) == []
    sent_before = len(sent_messages())
    harness.first.handle()
    assert (harness.status(), len(sent_messages())) == (SUCCESS, sent_before)


@pytest.mark.parametrize("method", ["resume", "cancel", "wait"])
def test_resume_cancel_and_wait_of_an_unknown_operation_raise(harness: DurableHarness, method: str) -> None:
    operation = harness.first.class_of(Sale)("unknown")
    with pytest.raises(UsageError, match="there is no stored operation 'unknown': it was never sent, was purged, or"):
        getattr(operation, method)()


def test_claim_from_before_a_resume_is_fenced(harness: DurableHarness) -> None:
    """durability rules 8 and 25"""

    def cancel_and_resume() -> Result:
        harness.advance(LEASE_EXPIRED)
        assert harness.store.cancel("1", None).status == CANCELLED  # type: ignore[union-attr]
        resume_stored(harness.store, "1")
        return Result(retval={"late": 1})

    ScriptedTask.script["1.b"] = [cancel_and_resume, None]
    send_raw_message(Sale)
    harness.first.step()
    assert harness.task_statuses() == [SUCCESS, PENDING, PENDING]
    claim = harness.store.claim("1", "1", claim_request())
    assert isinstance(claim, Claim)
    assert claim.root.step == 1


def test_resume_sends_nothing(harness: DurableHarness) -> None:
    """durability rule 25: a consumer takes the step over, or sends it if no consumer has within a second."""
    ScriptedTask.script["1.b"] = [ValueError("no"), None]
    send_raw_message(Sale)
    harness.first.handle()
    web_process = harness.start_process(Sale)
    operation = web_process.registry.get("1")
    assert operation is not None
    sent_before = len(sent_messages())
    operation.resume()
    assert len(sent_messages()) == sent_before
    harness.advance(2)
    assert harness.first.background_service.reap() == 1
    assert len(sent_messages()) == sent_before + 1
