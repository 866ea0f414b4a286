"""Tests of secrets in texts: no log line and no error contains a password."""

from __future__ import annotations

import traceback
from contextlib import closing
from typing import Any

import pytest
from kafka import KafkaProducer

import kser.confluent.options as confluent_options
import kser.python_kafka.options as python_kafka_options
from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.confluent.producer import Producer as ConfluentProducer
from kser.connection import explain, unavailable_text
from kser.errors import BrokerUnavailable, SettingError
from kser.masking import Secrets, mask_address
from kser.python_kafka.consumer import Consumer as PythonKafkaConsumer
from kser.python_kafka.producer import Producer as PythonKafkaProducer
from kser.schemas import Message
from kser.store import open_store

SECRET = "s3cretW0rd"
#: The time for a connection of kafka-python; version 2 has a short time anyway.
SHORT = {"bootstrap_timeout_ms": 500} if "bootstrap_timeout_ms" in KafkaProducer.DEFAULT_CONFIG else {}


def text_of(caught: Any) -> str:
    """Return everything that Python prints for an error, with its causes."""
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("address", "masked"),
    [
        ("broker:9092", "broker:9092"),
        ("user:secret@broker:9092", "***@broker:9092"),
        ("SASL_SSL://user:secret@broker:9092", "***@broker:9092"),
        ("user:sec,ret@broker:9092", "***@broker:9092"),
        ("user:se@cret@broker:9092", "***@broker:9092"),
        ("a:1,b:2", "a:1,b:2"),
    ],
)
def test_address_is_shown_without_its_password(address: str, masked: str) -> None:
    assert mask_address(address) == masked
    assert confluent_options.servers({"bootstrap.servers": address}) == masked
    assert python_kafka_options.servers({"bootstrap_servers": [address]}) == masked


@pytest.mark.parametrize(
    "options",
    [
        {"sasl.password": SECRET},
        {"sasl_plain_password": SECRET},
        {"ssl.key.pem": f"-----BEGIN\n{SECRET}\n-----END"},
        {"sasl.oauthbearer.client.secret": SECRET},
        {"sasl.oauthbearer.config": SECRET},
        {"sasl_oauth_token": SECRET},
        {"sasl.pasword": {"a": [SECRET]}, "sasl.passwd": SECRET},
        {"sasl.mechanism": SECRET},
        {"sasl_mechanism": SECRET},
        {"bootstrap.servers": f"user:{SECRET}@broker:9092"},
        {"bootstrap_servers": ["a:1", f"user:{SECRET}@broker:9092"]},
    ],
    ids=str,
)
def test_secret_value_of_an_option_is_hidden(options: dict[str, Any]) -> None:
    assert Secrets(options).hide(f"wrong value {SECRET} (see above)") == "wrong value *** (see above)"


@pytest.mark.parametrize(
    "options",
    [
        {"ssl.key.location": "/etc/key.pem", "sasl.mechanism": "plain", "ssl.ca.location": "/etc"},
        {"sasl_kerberos_keytab": "/etc", "enable.ssl.certificate.verification": True, "sasl.password": None},
        {"bootstrap.servers": "/etc/key.pem:9092", "sasl.username": "plain"},
    ],
    ids=str,
)
def test_paths_addresses_and_mechanisms_stay_visible(options: dict[str, Any]) -> None:
    text = "True: None: /etc/key.pem is no file, plain"
    assert Secrets(options).hide(text) == text


def test_short_password_hides_only_whole_words() -> None:
    assert Secrets({"sasl.password": "a"}).hide("a bad password: a") == "*** bad password: ***"


@pytest.mark.parametrize("module", [confluent_options, python_kafka_options])
@pytest.mark.parametrize("reason", [f"Strange {SECRET}", f"{SECRET}: Connection refused", f"invalid response {SECRET}"])
def test_reason_of_a_failed_connection_contains_no_secret(module: Any, reason: str) -> None:
    connection = module.connection_of({"sasl.password": SECRET, "security.protocol": "SASL_SSL"})
    failure = explain(reason, connection)
    assert SECRET not in f"{failure} {unavailable_text(reason, connection)} {connection}"


@pytest.mark.parametrize(
    ("construct", "nearest"),
    [
        (lambda: PythonKafkaProducer({"sasl_plain_pasword": SECRET}), "sasl_plain_password"),
        (lambda: PythonKafkaConsumer({"sasl_plain_pasword": SECRET}, topics=["dice"]), "sasl_plain_password"),
        (lambda: PythonKafkaProducer({"sasl.plain.password": SECRET}), "sasl_plain_password"),
        (lambda: ConfluentProducer({"sasl.pasword": SECRET}), "sasl.password"),
    ],
    ids=["producer", "consumer", "dots", "confluent"],
)
def test_wrong_name_of_an_option_is_a_setting_error_without_the_value(construct: Any, nearest: str) -> None:
    with pytest.raises(SettingError, match=nearest) as caught:
        construct()
    assert SECRET not in text_of(caught)


@pytest.mark.parametrize(
    "construct",
    [
        lambda: ConfluentProducer({"security.protocol": "SASL_SSL", "sasl.mechanism": SECRET, "sasl.username": "u"}),
        lambda: ConfluentConsumer(
            {"group.id": "g", "security.protocol": "SASL_SSL", "sasl.mechanism": SECRET}, topics=["dice"]
        ),
    ],
    ids=["producer", "consumer"],
)
def test_password_in_the_place_of_the_mechanism_is_a_setting_error_without_it(construct: Any) -> None:
    with pytest.raises(SettingError) as caught:
        construct()._kser_connect()
    assert SECRET not in text_of(caught)


def test_password_in_an_address_is_in_no_error_of_either_client(caplog: pytest.LogCaptureFixture) -> None:
    address = f"user:{SECRET}@127.0.0.1:1"
    with closing(ConfluentProducer({"bootstrap.servers": address})) as producer:
        result = producer.send("dice", Message(uuid="u", entrypoint="e"), timeout=0.5)
    assert result.retcode == 500
    # kafka-python 2 rejects the address, and kafka-python 3 tries to connect.
    with pytest.raises((BrokerUnavailable, SettingError)) as caught:
        PythonKafkaProducer({"bootstrap_servers": address, **SHORT})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("kser")]
    assert lines
    assert SECRET not in f"{result.stderr} {lines} {text_of(caught)}"


@pytest.mark.parametrize("uri", [f"user:{SECRET}@host", f"postgresql:user:{SECRET}@host/db", {"a": SECRET}], ids=str)
def test_database_uri_without_a_scheme_is_shown_without_its_password(uri: Any) -> None:
    with pytest.raises(SettingError) as caught:
        open_store(uri)
    assert SECRET not in text_of(caught)
