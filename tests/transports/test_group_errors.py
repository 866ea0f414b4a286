"""Tests of the errors of a consumer group: the table of each client, and what the consumer makes of each row."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from kafka import errors

from kser.confluent import group_errors as confluent_errors
from kser.confluent.logs import ClientLog
from kser.consumer.recoveries import Recovery, as_recovery
from kser.errors import ClientError, ClientFenced, GroupSettingError, SettingError
from kser.python_kafka import group_errors as python_kafka_errors

REJOIN, WAIT, REPLACE, FENCED, SETTING = Recovery

#: For each error of librdkafka: the recovery while the client works, and after librdkafka has declared it fatal.
CONFLUENT = [
    ("REBALANCE_IN_PROGRESS", REJOIN, REPLACE),
    ("ILLEGAL_GENERATION", REJOIN, REPLACE),
    ("UNKNOWN_MEMBER_ID", REJOIN, REPLACE),
    ("MEMBER_ID_REQUIRED", REJOIN, REPLACE),
    ("FENCED_MEMBER_EPOCH", REJOIN, REPLACE),
    ("STALE_MEMBER_EPOCH", REJOIN, REPLACE),
    ("_MAX_POLL_EXCEEDED", REJOIN, REPLACE),
    ("LEADER_NOT_AVAILABLE", REJOIN, REPLACE),
    ("NOT_LEADER_FOR_PARTITION", REJOIN, REPLACE),
    ("FENCED_LEADER_EPOCH", REJOIN, REPLACE),
    ("UNKNOWN_LEADER_EPOCH", REJOIN, REPLACE),
    ("GROUP_AUTHORIZATION_FAILED", WAIT, REPLACE),
    ("GROUP_MAX_SIZE_REACHED", WAIT, REPLACE),
    ("INCONSISTENT_GROUP_PROTOCOL", WAIT, REPLACE),
    ("UNRELEASED_INSTANCE_ID", WAIT, REPLACE),
    ("INVALID_REQUEST", WAIT, REPLACE),
    ("FENCED_INSTANCE_ID", FENCED, FENCED),
    ("_FENCED", FENCED, FENCED),
    ("INVALID_GROUP_ID", SETTING, SETTING),
    ("INVALID_SESSION_TIMEOUT", SETTING, SETTING),
    ("UNSUPPORTED_ASSIGNOR", WAIT, SETTING),
    ("UNSUPPORTED_VERSION", WAIT, SETTING),
    ("_UNSUPPORTED_FEATURE", WAIT, SETTING),
    # Errors without a row.
    ("_TRANSPORT", WAIT, REPLACE),
    ("TOPIC_AUTHORIZATION_FAILED", WAIT, REPLACE),
    ("OFFSET_METADATA_TOO_LARGE", WAIT, REPLACE),
]

PYTHON_KAFKA = [
    ("RebalanceInProgressError", REJOIN),
    ("IllegalGenerationError", REJOIN),
    ("LeaderNotAvailableError", REJOIN),
    ("NotLeaderForPartitionError", REJOIN),
    ("FencedLeaderEpochError", REJOIN),
    ("UnknownLeaderEpochError", REJOIN),
    ("UnknownMemberIdError", REJOIN),
    ("MemberIdRequiredError", REJOIN),
    ("CommitFailedError", REJOIN),
    ("IllegalStateError", REPLACE),
    ("GroupAuthorizationFailedError", WAIT),
    ("GroupMaxSizeReachedError", WAIT),
    ("InconsistentGroupProtocolError", WAIT),
    ("UnsupportedVersionError", WAIT),
    ("FencedInstanceIdError", FENCED),
    ("InvalidGroupIdError", SETTING),
    ("InvalidSessionTimeoutError", SETTING),
    # Errors without a row.
    ("KafkaTimeoutError", WAIT),
    ("CoordinatorNotAvailableError", WAIT),
    ("TopicAuthorizationFailedError", WAIT),
]


@pytest.mark.parametrize(("name", "alive", "dead"), CONFLUENT)
def test_recovery_from_each_error_of_librdkafka(name: str, alive: Recovery, dead: Recovery) -> None:
    if not hasattr(KafkaError, name):
        pytest.skip(f"this version of confluent-kafka has no {name}")
    code = getattr(KafkaError, name)
    assert confluent_errors.recovery_from(KafkaError(code)) == alive
    assert confluent_errors.recovery_from(KafkaError(code, fatal=True)) == dead
    # A dead consumer reports the cause of its end only as text.
    text = f"Fatal error: {KafkaError(code).str()}: ConsumerGroupHeartbeat fatal error: {KafkaError(code).str()}"
    assert confluent_errors.recovery_from(KafkaError(KafkaError._FATAL, text)) == dead


def test_fatal_error_of_librdkafka_without_a_known_cause_replaces_the_client() -> None:
    error = KafkaError(KafkaError._FATAL, "Commit failed: Local: Fatal error")
    assert confluent_errors.recovery_from(error) == REPLACE
    assert confluent_errors.is_fatal(error)


def test_texts_of_the_errors_of_librdkafka_are_unambiguous() -> None:
    texts = {code: KafkaError(code).str() for code in confluent_errors.RECOVERIES}
    assert [(a, b) for a in texts for b in texts if a != b and texts[a] in texts[b]] == []


@pytest.mark.parametrize(("name", "recovery"), PYTHON_KAFKA)
def test_recovery_from_each_error_of_kafka_python(name: str, recovery: Recovery) -> None:
    assert python_kafka_errors.recovery_from(getattr(errors, name)()) == recovery


def test_tables_have_no_further_rows() -> None:
    assert set(confluent_errors._BY_NAME) <= {name for name, *_ in CONFLUENT}
    assert set(python_kafka_errors._BY_NAME) <= {name for name, _ in PYTHON_KAFKA}


@pytest.mark.parametrize(
    ("recovery", "cls", "flags"),
    [
        (REJOIN, ClientError, (False, True)),
        (WAIT, ClientError, (False, False)),
        (REPLACE, ClientError, (True, False)),
        (FENCED, ClientFenced, (False, False)),
        (SETTING, GroupSettingError, (False, False)),
    ],
)
def test_error_of_each_recovery(recovery: Recovery, cls: type[ClientError], flags: tuple[bool, bool]) -> None:
    error = as_recovery(ClientError("cannot fetch messages"), recovery, "shop-1")
    assert type(error) is cls
    assert (error.fatal, error.transient) == flags
    assert error.message.startswith("cannot fetch messages")
    assert ("'shop-1'" in error.message) == (recovery is FENCED)
    assert isinstance(error, SettingError) == (recovery is SETTING)


@pytest.mark.parametrize("error", [KafkaError(-185), KafkaException(KafkaError(-185))])
def test_errors_of_the_library_are_raised_in_one_form(error: Any) -> None:
    context = confluent_errors.library_errors()
    with pytest.raises(confluent_errors.LibraryError) as caught:
        context.__exit__(type(error), error, None)
    assert caught.value.error.code() == -185


def test_other_errors_pass_the_context_unchanged() -> None:
    with pytest.raises(ValueError, match="surprise"), confluent_errors.library_errors():
        raise ValueError("surprise")


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
@pytest.mark.parametrize("is_subscribed", [True, False])
def test_new_client_has_not_joined_its_group(protocol: str, is_subscribed: bool, unused_address: str) -> None:
    client = Consumer(
        {"bootstrap.servers": unused_address, "group.id": "g", "group.protocol": protocol, "log_level": 0}
    )
    try:
        if is_subscribed:
            client.subscribe(["dice"])
        client.poll(0.1)
        assert not confluent_errors.has_joined(client)
    finally:
        client.close()


@pytest.mark.parametrize(
    ("member", "generation", "has_joined"),
    [("m", 1, True), ("m", 70_000, True), ("m", 0, False), ("m", -1, False), ("", 1, False), (None, 1, False)],
)
def test_member_has_a_generation(member: str | None, generation: int, has_joined: bool) -> None:
    metadata = b"CGMDv2:" + generation.to_bytes(4, sys.byteorder, signed=True) + b"group\0m\0\1"
    client = SimpleNamespace(memberid=lambda: member, consumer_group_metadata=lambda: metadata)
    assert confluent_errors.has_joined(client) is has_joined


@pytest.mark.parametrize(("metadata", "has_joined"), [(b"CGMDv9:", True), (b"", False), (None, False)])
def test_member_id_counts_if_the_generation_is_unknown(metadata: bytes | None, has_joined: bool) -> None:
    client = SimpleNamespace(memberid=lambda: "m", consumer_group_metadata=lambda: metadata)
    assert confluent_errors.has_joined(client) is has_joined


@pytest.mark.parametrize(
    ("kind", "is_logged"), [("FATAL", False), ("FAIL", False), ("ERROR", False), ("CONFWARN", True)]
)
def test_library_logs_only_the_errors_that_kser_does_not_log_itself(
    kind: str, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "confluent_kafka"):
        ClientLog().log(
            logging.CRITICAL, "%s [%s] %s", kind, "rdkafka#consumer-1", "[thrd:main]: the instance id is used"
        )
    assert bool(caplog.records) is is_logged
