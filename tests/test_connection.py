"""Tests of connection errors: their meaning, and how often they are logged."""

from __future__ import annotations

import pytest

from kser.connection import REPEAT_INTERVAL, Connection, FailureLog, LastFailure, explain, unavailable_text
from tests.support import Clock

LOGIN = Connection("broker:9092", "bootstrap.servers", "SASL_SSL", "PLAIN", "alice")
PLAIN = Connection("broker:9092")

#: Errors as the client libraries raise or log them, and the kind and a part of the text for each.
ERRORS = [
    ("ssl://b:1/bootstrap: Authentication failed (after 5ms in state AUTH)", "login", "alice"),
    ("[Error 58] SaslAuthenticationFailedError: refused", "login", "mechanism PLAIN: check the user, the password"),
    ("KafkaConnectionError: socket disconnected", "closed", "during the login of user 'alice'"),
    ("SASL mechanism handshake failed: Broker: Unsupported SASL mechanism", "mechanism", "mechanism PLAIN"),
    ("SSL handshake failed: certificate verify failed", "certificate", "CA file"),
    ("Handshake failed: [SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred", "no tls", "TLS handshake"),
    ("b:1/bootstrap: Failed to resolve 'b:1': Name or service not known", "host name", "'bootstrap.servers'"),
    ("KafkaConnectionError: 111 ECONNREFUSED", "refused", "start one there"),
    ("Receive failed: Invalid response size 1213486160 (0..100)", "http", "HTTP server"),
    ("InvalidReceiveError: Invalid frame length: 352518912", "tls", "expects TLS"),
    ("Invalid frame length: 99", "no kafka", "correct the port"),
    ("1/1 brokers are down", "silent", "start one there"),
    ("Local: Broker transport failure", "silent", "start one there"),
    ("Connection setup timed out in state CONNECT", "silent", "start one there"),
    ("KafkaTimeoutError: Unable to bootstrap from [('b', 1)]", "silent", "start one there"),
    ("Local: Timed out", "slow", "did not answer the request in time"),
    ("KafkaTimeoutError: timeout after 500 ms", "slow", "did not answer the request in time"),
    ("Broker: Request timed out", "slow broker", "check the load"),
    ("[Error 7] RequestTimedOutError", "slow broker", "check the load"),
    ("Broker: Invalid session timeout", "session timeout", "'group.max.session.timeout.ms'"),
    ("[Error 26] InvalidSessionTimeoutError", "session timeout", "'group.max.session.timeout.ms'"),
    ("[Error 50] InvalidTransactionTimeoutError", "transaction timeout", "transaction.max.timeout.ms"),
    ("KafkaConnectionError: 111 ECONNREFUSED dns-kafka.local:9092", "refused", "start one there"),
    ("<BrokerConnection host=dns1.example>: Connection refused", "refused", "start one there"),
    ("authorization-timeout.example:9092: Connection refused", "refused", "start one there"),
    ("node_id=1 host=kafka-dns:9092 Connection refused", "refused", "start one there"),
    ("DNS lookup failed for kafka:9092", "host name", "'bootstrap.servers'"),
    ("Kafka broker does not support PLAIN sasl mechanism. Enabled mechanisms: X", "mechanism", "PLAIN"),
    ("SSL handshake failed: error:0A000086:SSL routines::certificate verify failed", "certificate", "CA file"),
    ("[Error 30] GroupAuthorizationFailedError: g", "group denied", "grant user 'alice' Read on the group"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "kind", "part"), ERRORS)
def test_error_of_a_client_library_has_a_kind_and_advice(reason: str, kind: str, part: str) -> None:
    failure = explain(reason, LOGIN)
    assert failure.kind == kind
    assert part in failure.text


@pytest.mark.parametrize(
    "reason",
    [
        "Broker: Message format on broker does not support request",
        "Broker: Client metadata is stale, client should rebootstrap to obtain new metadata",
        "Strange error at timeout.example:9092",
    ],
)
def test_error_without_a_known_meaning_keeps_its_text(reason: str) -> None:
    assert explain(reason, LOGIN).text == reason


def test_details_of_an_attempt_change_neither_kind_nor_text() -> None:
    texts = [
        f"b:{n}/bootstrap: Strange error (after {n}ms in state X, {n} identical error(s) suppressed)" for n in (1, 2)
    ]
    assert explain(texts[0], PLAIN) == explain(texts[1], PLAIN)
    assert explain("code 12", PLAIN).kind == explain("code 13", PLAIN).kind


def test_closed_connection_without_a_login_does_not_blame_the_password() -> None:
    assert "password" not in explain("socket disconnected", PLAIN).text


def test_unavailable_broker_is_named_with_the_option_to_correct() -> None:
    text = unavailable_text("Connection refused", PLAIN)
    assert text.startswith("no Kafka broker responds at broker:9092 (Connection refused)")
    assert "'bootstrap.servers' in KSER_CONFIG" in text


def test_failure_is_logged_once_a_kind_then_after_ten_minutes_and_again_after_a_success() -> None:
    clock = Clock()
    log = FailureLog(clock)
    assert [log.is_due(kind) for kind in ("a", "b", "a", "b")] == [True, True, False, False]
    clock.advance(REPEAT_INTERVAL)
    assert log.is_due("a")
    assert (log.succeed(), log.succeed()) == (True, False)
    assert log.is_due("a")


def test_reason_of_a_failed_connection_expires_and_persists_only_if_repeated() -> None:
    clock = Clock()
    failure = LastFailure(clock)
    failure.note("refused")
    assert (failure.reason(), failure.persistent_reason()) == ("refused", "")
    for _ in range(3):
        clock.advance(6)
        failure.note("refused")
    assert failure.persistent_reason() == "refused"
    clock.advance(31)
    assert failure.reason() == ""


def test_try_that_ran_out_of_time_does_not_hide_the_reason_of_an_earlier_try() -> None:
    failure = LastFailure(Clock())
    failure.note("[Error 7] RequestTimedOutError: Request timed out after 70 ms")
    assert "70 ms" in failure.reason()
    failure.note("SaslAuthenticationFailed")
    failure.note("[Error 7] RequestTimedOutError: Request timed out after 3 ms")
    assert failure.reason() == "SaslAuthenticationFailed"
