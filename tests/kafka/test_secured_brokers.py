"""Tests of brokers with logins, certificates and access control: each trouble has one line that names its cause."""

from __future__ import annotations

import contextlib
import gc
import logging
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from confluent_kafka.admin import AclOperation, ResourceType
from kafka import KafkaConsumer

from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.confluent.producer import Producer as ConfluentProducer
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.errors import BrokerUnavailable
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from kser.schemas import Message
from tests.conftest import needs
from tests.kafka.broker import ServiceMissing
from tests.kafka.helpers import message, send_records, step_until, wait_until
from tests.kafka.secured import PASSWORD, USER, SecuredKafka
from tests.support import lines

# kafka-python leaves the sockets of failed connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

WRONG_PASSWORD = "sesame-open"
BOOTSTRAP_TIMEOUT = (
    "bootstrap_timeout_ms" if "bootstrap_timeout_ms" in KafkaConsumer.DEFAULT_CONFIG else "api_version_auto_timeout_ms"
)
#: The names of the options of kafka-python that differ from those of librdkafka.
NAMES = {
    "sasl_username": "sasl_plain_username",
    "sasl_password": "sasl_plain_password",
    "ssl_ca_location": "ssl_cafile",
}
CONSUMERS: list[Any] = [Consumer, ConfluentConsumer]
both_consumers = pytest.mark.parametrize("kind", CONSUMERS, ids=["python_kafka", "confluent"])


@pytest.fixture(scope="module")
def secured() -> Iterator[SecuredKafka]:
    try:
        broker = SecuredKafka()
    except ServiceMissing as problem:
        needs("Apache Kafka", problem)
    with broker:
        yield broker


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    yield
    gc.collect()


class RunRecorder(Entrypoint):
    """An entrypoint that records the uuids of its messages."""

    runs: list[str] = []  # noqa: RUF012  emptied before each test

    def run(self) -> None:
        self.runs.append(self.uuid)


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunRecorder, "runs", [])
    Controller.register(RunRecorder.path, RunRecorder)


def login(kafka: SecuredKafka, **options: str) -> dict[str, str]:
    """Return the options of librdkafka for the listener with logins."""
    return {
        "bootstrap.servers": kafka.sasl,
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": USER,
        "sasl.password": PASSWORD,
        **{name.replace("_", "."): value for name, value in options.items()},
    }


def options_of(kind: type[Any], options: dict[str, str], **more: Any) -> dict[str, Any]:
    """Return options of librdkafka in the form of the client of ``kind``."""
    if kind in (ConfluentConsumer, ConfluentProducer):
        return {**options, **{name.replace("_", "."): value for name, value in more.items()}}
    renamed = {name.replace(".", "_"): value for name, value in options.items()}
    return {NAMES.get(name, name): value for name, value in renamed.items()} | more


def trouble(kind: type[Any], options: dict[str, str], caplog: pytest.LogCaptureFixture) -> str:
    """Run a consumer that cannot connect, until it has reported the trouble; return its only ERROR line."""
    caplog.set_level(logging.INFO)
    # With kafka-python 2, the login follows after the construction, so the consumer must poll.
    more = {BOOTSTRAP_TIMEOUT: 1600} if kind is Consumer else {}
    with (
        contextlib.suppress(BrokerUnavailable),
        closing(kind(options_of(kind, options, group_id="g", **more), ["work"])) as consumer,
    ):
        step_until(consumer, lambda: errors(caplog), "the trouble is reported", seconds=60, timeout=0.2)
        for _ in range(10):
            consumer.step(timeout=0.1)
    (line,) = errors(caplog)
    return line


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the ERROR lines, also those of the client libraries."""
    return lines(caplog, logging.ERROR)


@both_consumers
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sasl_password": WRONG_PASSWORD}, ("'alice'", "PLAIN", "check the user, the password")),
        (
            {"sasl_password": WRONG_PASSWORD, "sasl_mechanism": "SCRAM-SHA-256"},
            ("'alice'", "SCRAM-SHA-256", "password"),
        ),
        ({"sasl_username": "nobody"}, ("'nobody'", "PLAIN", "check the user")),
        ({"sasl_mechanism": "SCRAM-SHA-512"}, ("SCRAM-SHA-512", "mechanism")),
    ],
    ids=["password", "scram", "user", "mechanism"],
)
def test_refused_login_has_one_line_with_user_and_mechanism(
    kind: type[Any],
    changed: dict[str, str],
    words: tuple[str, ...],
    secured: SecuredKafka,
    caplog: pytest.LogCaptureFixture,
) -> None:
    line = trouble(kind, login(secured, **changed), caplog)
    assert all(word in line for word in words), line
    assert WRONG_PASSWORD not in caplog.text and PASSWORD not in caplog.text


@both_consumers
@pytest.mark.parametrize("case", ["plain client, TLS port", "TLS client, plain port", "unknown authority", "no login"])
def test_wrong_security_protocol_has_one_line_with_advice(
    kind: type[Any], case: str, secured: SecuredKafka, caplog: pytest.LogCaptureFixture
) -> None:
    options, word = {
        "plain client, TLS port": ({"bootstrap.servers": secured.tls}, "TLS|security protocol"),
        "TLS client, plain port": ({"bootstrap.servers": secured.bootstrap_servers, "security.protocol": "SSL"}, "TLS"),
        "unknown authority": ({"bootstrap.servers": secured.tls, "security.protocol": "SSL"}, "CA file"),
        "no login": ({"bootstrap.servers": secured.sasl}, "security protocol"),
    }[case]
    line = trouble(kind, options, caplog)
    assert any(part in line for part in word.split("|")), line


@pytest.mark.parametrize("kind", [Producer, ConfluentProducer], ids=["python_kafka", "confluent"])
def test_send_with_a_wrong_password_names_the_user(kind: type[Any], secured: SecuredKafka) -> None:
    options = options_of(kind, login(secured, sasl_password=WRONG_PASSWORD))
    if kind is Producer:
        options[BOOTSTRAP_TIMEOUT] = 2000
    try:
        with closing(kind(options)) as producer:
            text = producer.send("work", message(), timeout=3).stderr
    except BrokerUnavailable as error:
        text = error.message
    assert "user 'alice' with mechanism PLAIN: check the user, the password" in text
    assert WRONG_PASSWORD not in text


@pytest.mark.parametrize("kind", [Producer, ConfluentProducer], ids=["python_kafka", "confluent"])
def test_producer_that_may_write_nowhere_sends_after_a_grant(kind: type[Any], secured: SecuredKafka) -> None:
    """The brokers refuse the user a producer id, which puts the client into a fatal state."""
    topic = f"dead-{uuid.uuid4()}"
    secured.create_topic(topic)
    secured.grant(ResourceType.TOPIC, topic, AclOperation.DESCRIBE)
    with closing(kind(options_of(kind, login(secured)))) as producer:
        wait_until(lambda: producer.send(topic, message(), timeout=5).retcode, "a send is refused", 30)
        secured.grant(ResourceType.TOPIC, topic)
        wait_until(lambda: producer.send(topic, message(), timeout=5).retcode == 0, "a send succeeds", 60)
    secured.deny(ResourceType.TOPIC, topic)


@both_consumers
def test_denied_topic_is_named_and_consumed_after_the_grant_and_a_later_topic_too(
    kind: type[Any], secured: SecuredKafka, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = {part: f"{part}-{uuid.uuid4()}" for part in ("denied", "open", "later", "group")}
    for part in ("denied", "open"):
        secured.create_topic(names[part])
        send_records(secured, names[part], [Message(part, RunRecorder.path)], 1)
    secured.grant(ResourceType.GROUP, names["group"])
    for part in ("open", "later"):
        secured.grant(ResourceType.TOPIC, names[part])
    topics = [names[part] for part in ("denied", "open", "later")]
    more = {"group_id": names["group"], "auto_offset_reset": "earliest"}
    with closing(kind(options_of(kind, login(secured), **more), topics)) as consumer:
        step_until(consumer, lambda: "open" in RunRecorder.runs, "the open topic is consumed", seconds=60, timeout=0.2)
        step_until(consumer, lambda: len(reports(caplog)) >= 2, "both topics are reported", seconds=60, timeout=0.2)
        secured.grant(ResourceType.TOPIC, names["denied"])
        step_until(
            consumer, lambda: "denied" in RunRecorder.runs, "the granted topic is consumed", seconds=30, timeout=0.2
        )
        secured.create_topic(names["later"])
        send_records(secured, names["later"], [Message("later", RunRecorder.path)], 1)
        step_until(consumer, lambda: "later" in RunRecorder.runs, "the new topic is consumed", seconds=30, timeout=0.2)
    assert sorted(RunRecorder.runs) == ["denied", "later", "open"]
    own = " ".join(errors(caplog))
    assert own.count(f"not authorized to read topic {names['denied']!r}") == 1
    assert f"have no topic {names['later']!r}" in own


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the sentences of the ERROR lines about topics that cannot be read."""
    text = " ".join(errors(caplog))
    return ["denied"] * text.count("not authorized to read topic") + ["missing"] * text.count("have no topic")
