"""Tests of the same shop with a real Kafka client and an embedded broker."""

import pytest
from test_shop import Charge, oregistry

from kser.embedded import EmbeddedBroker
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer


@pytest.fixture(scope="session")
def broker():
    with EmbeddedBroker("orders") as broker:
        yield broker


def test_a_message_goes_through_kafka(broker, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RUNNING_FILE", str(tmp_path / "running"))
    monkeypatch.setenv("LOCK_FILE", str(tmp_path / "pause"))
    caplog.set_level("INFO", "kser")
    producer = Producer(broker.producer_config)
    consumer = Consumer({**broker.config, "group_id": "shop"}, ["orders"])
    consumer.REGISTRY = oregistry.controller
    assert producer.send("orders", Charge(uuid="order-1").to_Message()).retcode == 0
    while not consumer.step():
        pass
    consumer.close()
    producer.close()
    assert f"Charge.Success: {Charge.path}[order-1]: charged" in caplog.messages
