"""Options of the kafka-python clients, and what becomes of a broker that does not answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from kafka import KafkaConsumer, KafkaProducer, errors

from kser.config import CONFIG, Settings, known_options
from kser.errors import BrokerUnavailable

Client = TypeVar("Client", KafkaConsumer, KafkaProducer)

# kafka-python 2 has an error of its own for it.
_UNREACHABLE = (errors.KafkaTimeoutError, getattr(errors, "NoBrokersAvailable", errors.KafkaTimeoutError))


def options_for(client: type[Client], config: Mapping[str, Any] | None, settings: Settings) -> dict[str, Any]:
    """The options to make ``client`` with: ``config`` as it is, or what the client knows of ``KSER_CONFIG``.

    :raises kser.errors.SettingError: ``KSER_CONFIG`` has an option that neither client knows.
    """
    if config is not None:
        return dict(config)
    return known_options(
        settings.client or {}, client.DEFAULT_CONFIG, KafkaConsumer.DEFAULT_CONFIG, KafkaProducer.DEFAULT_CONFIG
    )


def connect(client: type[Client], options: Mapping[str, Any]) -> Client:
    """Make a client.

    :raises kser.errors.BrokerUnavailable: no broker answers at the address.
    """
    networks: list[Any] = []
    make_network = options.get("kafka_client", client.DEFAULT_CONFIG["kafka_client"])

    def noted(*arguments: Any, **keywords: Any) -> Any:
        networks.append(make_network(*arguments, **keywords))
        return networks[-1]

    try:
        return client(**{**options, "kafka_client": noted})
    except _UNREACHABLE as error:
        # The client that could not be made has left its network thread running.
        for network in networks:
            network.close()
        raise BrokerUnavailable(
            f"no Kafka broker answers at {servers(options)} ({error}): start one there, or correct 'bootstrap_servers'"
            f" in {CONFIG} or in the dict that is passed"
        ) from error


def servers(options: Mapping[str, Any]) -> str:
    """Where the client looks for brokers, for error texts."""
    value = options.get("bootstrap_servers", "localhost:9092, the default")
    return value if isinstance(value, str) else ", ".join(map(str, value))
