"""Tests of messages of operations that no kser has written: wrong reserved metadata, and values above the limits."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from cdumay_result import Result
from flask import Flask

from kser.dummy.broker import InMemoryBroker
from kser.errors import TooManyMetadataKeys, UsageError, UuidTooLong
from kser.schemas import OPERATION_KEY, ORIGINAL_PARAMS_KEY, Message
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import FAILED, SUCCESS
from tests.consumer.harness import ScriptedTask, send_messages
from tests.durable.harness import BOTH_MODES, DurableHarness, Sale
from tests.support import lines
from tests.test_limits import nested

#: Values that are no uuid of an operation.
NO_UUIDS: list[Any] = [None, "", 0, 5, 1.5, True, [], ["1"], {}, {"uuid": "1"}]


def dead_letter_reasons() -> list[bytes | None]:
    """Return the reason of each dead letter."""
    (letters,) = InMemoryBroker.at("").topics["dice.dlq"]
    return [dict(letter.headers)["kser-dlq-reason"] for letter in letters]


def send_steps(*paths: str) -> int:
    """Send a step with each value that is no uuid of an operation to each class, and return the number of messages."""
    for path in paths:
        for value in NO_UUIDS:
            InMemoryBroker.at("").send("dice", Message("1", path, metadata={OPERATION_KEY: value}).dumps().encode())
    return len(paths) * len(NO_UUIDS)


def test_step_without_a_valid_operation_never_runs(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 17"""
    process = harness.start_process(Sale, dead_letter=True, group="letters")
    sent = send_steps(ScriptedTask.path, Sale.path, "no.such.Class")
    send_messages("next")
    process.handle()
    assert ScriptedTask.ran == ["next"]
    assert harness.registry.get("1") is None
    assert dead_letter_reasons() == [b"undecodable"] * sent
    errors = lines(caplog, logging.ERROR)
    assert len(errors) == sent
    assert all(
        "[1]: the metadata key 'kser.operation' must be the uuid of a stored operation" in line for line in errors
    )


def test_step_without_a_valid_operation_is_rejected_by_a_consumer_without_a_store(harness: DurableHarness) -> None:
    process = harness.start_process(store=None, group="without", dead_letter=True)
    sent = send_steps(ScriptedTask.path)
    process.handle()
    assert ScriptedTask.ran == []
    assert dead_letter_reasons() == [b"undecodable"] * sent


@pytest.mark.parametrize("metadata", [{"a": OPERATION_KEY}, {"kser.operations": None}, {}])
def test_metadata_with_other_keys_request_no_step(harness: DurableHarness, metadata: Any) -> None:
    assert harness.first.run(Message("1", ScriptedTask.path, metadata=metadata)).retcode == 0
    assert ScriptedTask.ran == ["1"]


@pytest.mark.parametrize("value", [None, 5, True, [], {}, "", "no JSON", "[]", "5", "null", "[" * 100_000])
def test_operation_with_wrong_original_params_is_rejected(harness: DurableHarness, value: Any) -> None:
    result = harness.first.run(Message("1", Sale.path, metadata={ORIGINAL_PARAMS_KEY: value}))
    assert result.retcode == 400
    assert "the metadata key 'kser.given' must be the JSON text of params" in result.stderr
    assert (ScriptedTask.ran, harness.registry.get("1")) == ([], None)


@pytest.mark.parametrize("value", [5, "no JSON", None])
def test_redelivered_operation_with_wrong_stored_original_params_is_compared_by_its_params(
    harness: DurableHarness, value: Any
) -> None:
    harness.first.class_of(Sale)("1", {"order": 1}, metadata={ORIGINAL_PARAMS_KEY: value}).build().send()
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert harness.first.run(Message("1", Sale.path, {"order": 1})).retcode == 0
    assert harness.first.run(Message("1", Sale.path, {"order": 2})).retcode == 409
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]


@pytest.mark.parametrize("value", [None, 5])
def test_plain_task_may_use_the_key_of_original_params(harness: DurableHarness, value: Any) -> None:
    assert harness.first.run(Message("1", ScriptedTask.path, metadata={ORIGINAL_PARAMS_KEY: value})).retcode == 0


# -- limits ------------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_operation_above_a_limit_is_not_accepted(harness: DurableHarness, cls: type[Sale]) -> None:
    own = harness.first.class_of(cls)
    with pytest.raises(UuidTooLong, match="raise KSER_MAX_UUID_LENGTH"):
        own("u" * 256).build().send()
    with pytest.raises(TooManyMetadataKeys, match="raise KSER_MAX_METADATA_KEYS"):
        own("1", metadata=dict.fromkeys(map(str, range(1001)), 0)).build().send()
    for part in ("params", "metadata"):
        with pytest.raises(UsageError, match=f"{part} of .* cannot be stored: {part} has more than 100 levels"):
            own("1", **{part: {"a": nested(99)}}).build().send()
    assert harness.registry.find() == []
    own("1", {"a": nested(98)}).build().send()
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_operation_whose_task_is_above_a_limit_is_not_accepted(harness: DurableHarness) -> None:
    class LongUuids(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [ScriptedTask("u" * 256)]

    own = harness.first.subscribe_copy(LongUuids)
    with pytest.raises(UuidTooLong):
        own("1").build().send()  # type: ignore[attr-defined]
    assert harness.first.run(Message("2", LongUuids.path)).retcode == 413
    assert harness.registry.find() == []


@BOTH_MODES
def test_result_with_too_many_levels_fails_its_task(harness: DurableHarness, cls: type[Sale]) -> None:
    ScriptedTask.script["1.a"] = Result(retval={"deep": nested(98)})
    harness.first.send(cls)
    harness.first.handle()
    assert harness.status() == FAILED
    result = json.loads(harness.snapshot().tasks[0].result or "{}")
    assert "cannot be stored: the result has more than 100 levels" in result["stderr"]
    assert result["retval"]["error"]["msgid"] == "ERR-50334"


def test_limits_of_the_app_of_a_registry_apply_to_its_operations(harness: DurableHarness) -> None:
    app = Flask("shop")
    app.config["KSER_MAX_UUID_LENGTH"] = 5
    process = harness.start_process(Sale, app=app)
    with pytest.raises(UuidTooLong):
        process.class_of(Sale)("123456").build().send()
    harness.first.class_of(Sale)("123456").build().send()
