"""Tests of the options of a consumer group: the session timeout of kser, and the group protocols of each client."""

from __future__ import annotations

import json
from typing import Any

import confluent_kafka
import pytest
from kafka import KafkaConsumer

from kser.config import Settings
from kser.confluent import options as confluent_options
from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.consumer.options import ConsumerOptions
from kser.errors import BrokerUnavailable, SettingError
from kser.python_kafka import options as python_kafka_options
from kser.python_kafka.consumer import Consumer as PythonKafkaConsumer

NEXT_PROTOCOL = {"bootstrap.servers": "127.0.0.1:1", "group.id": "shop", "group.protocol": "consumer"}


@pytest.fixture(autouse=True)
def new_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the installed librdkafka supports the group protocol ``consumer``."""
    monkeypatch.setattr(confluent_kafka, "libversion", lambda: ("2.12.0", 0x020C00FF))


# -- the session timeout -----------------------------------------------------------------------------------------------

SESSIONS: list[tuple[dict[str, int], int | None]] = [
    ({}, 15_000),
    ({"session_timeout_ms": 45_000}, 45_000),
    ({"session_timeout_ms": 6_000, "heartbeat_interval_ms": 200}, 6_000),
    ({"heartbeat_interval_ms": 3_000}, 15_000),
    # Three heartbeats must fit into a session.
    ({"heartbeat_interval_ms": 10_000}, 30_000),
]


@pytest.mark.parametrize(("options", "session"), SESSIONS)
def test_session_is_15_seconds_unless_the_options_set_another(options: dict[str, int], session: int) -> None:
    assert python_kafka_options.with_group_defaults(options)["session_timeout_ms"] == session
    dotted = {key.replace("_", "."): value for key, value in options.items()}
    assert confluent_options.with_group_defaults(dotted)["session.timeout.ms"] == session


def test_session_stays_below_a_short_request_timeout_of_kafka_python() -> None:
    options = {"request_timeout_ms": 12_000}
    assert python_kafka_options.with_group_defaults(options) == options


@pytest.mark.parametrize("protocol", ["consumer", "CONSUMER"])
def test_next_protocol_gets_no_session_timeout(protocol: str) -> None:
    options = {"group.protocol": protocol}
    assert "session.timeout.ms" not in confluent_options.with_group_defaults(options)


def test_request_of_librdkafka_takes_less_time_than_the_client_thread_has() -> None:
    limit = ConsumerOptions.from_settings(Settings(), {}).client_limit * 1000
    assert confluent_options.with_group_defaults({})["socket.timeout.ms"] < limit
    assert confluent_options.with_group_defaults({"socket.timeout.ms": 60_000})["socket.timeout.ms"] == 60_000
    assert "socket.timeout.ms" not in confluent_options.with_group_defaults({"fetch.wait.max.ms": 40_000})


def test_new_client_of_kafka_python_waits_only_briefly_for_a_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    if "bootstrap_timeout_ms" not in KafkaConsumer.DEFAULT_CONFIG:
        pytest.skip("this version of kafka-python has no such timeout")
    timeouts: list[Any] = []

    def record_and_fail(_: Any, options: dict[str, Any]) -> Any:
        timeouts.append(options.get("bootstrap_timeout_ms"))
        raise BrokerUnavailable("no broker")

    monkeypatch.setattr("kser.python_kafka.consumer.connect", record_and_fail)
    consumer = PythonKafkaConsumer.__new__(PythonKafkaConsumer)
    consumer._kser_client_options = {}
    for client in (None, object()):
        consumer.client = client
        with pytest.raises(BrokerUnavailable):
            consumer._kser_connect()
    assert timeouts == [None, 5000]


# -- the group protocol ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("session.timeout.ms", 6000),
        ("heartbeat.interval.ms", 500),
        ("partition.assignment.strategy", "cooperative-sticky"),
        ("group.protocol.type", "consumer"),
    ],
)
def test_option_that_the_next_protocol_forbids_is_a_setting_error(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=rf"'{name}' cannot be set together with group.protocol=consumer"):
        ConfluentConsumer({**NEXT_PROTOCOL, name: value}, ["orders"])
    assert confluent_options.with_group_defaults({"group.protocol": "classic", name: value})[name] == value


def test_next_protocol_of_an_old_librdkafka_is_a_setting_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confluent_kafka, "libversion", lambda: ("2.5.0", 0x020500FF))
    with pytest.raises(SettingError, match=r"needs librdkafka 2\.12 or newer, and 2\.5\.0 is installed"):
        ConfluentConsumer(NEXT_PROTOCOL, ["orders"])


@pytest.mark.parametrize("name", ["group_protocol", "group.protocol"])
@pytest.mark.parametrize("is_setting", [False, True])
def test_next_protocol_on_kafka_python_is_a_setting_error(
    name: str, is_setting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bootstrap_servers": "127.0.0.1:1", "group_id": "shop", name: "consumer"}
    if is_setting:
        monkeypatch.setenv("KSER_CONFIG", json.dumps(options))
    with pytest.raises(SettingError, match="kafka-python has only the group protocol 'classic'"):
        PythonKafkaConsumer(None if is_setting else options, ["orders"])


def test_classic_protocol_is_no_option_of_kafka_python() -> None:
    assert python_kafka_options._without_group_protocol({"group_protocol": "classic", "group_id": "a"}) == {
        "group_id": "a"
    }
