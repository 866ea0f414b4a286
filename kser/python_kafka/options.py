"""Options of the kafka-python clients, and the connection of a client to the brokers."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

from kafka import KafkaConsumer, KafkaProducer, errors

from kser.config import Settings, known_options
from kser.connection import Connection, unavailable_text
from kser.errors import BrokerUnavailable
from kser.python_kafka.logs import ClientLines

logger = logging.getLogger(__name__)

#: kser's default of a consumer's ``metadata_max_age_ms``, the time in milliseconds after which it notices new topics
#: and new permissions. kafka-python's default is five minutes.
METADATA_MAX_AGE_MS = 10_000
#: Seconds after which a client that is still connecting logs the reason.
REPORT_AFTER = 1.0

Client = TypeVar("Client", KafkaConsumer, KafkaProducer)

# If no broker responds, kafka-python 2 raises NoBrokersAvailable, and kafka-python 3 raises KafkaTimeoutError.
# kafka-python 2 also raises the error of a TLS handshake.
_UNREACHABLE = (errors.KafkaTimeoutError, getattr(errors, "NoBrokersAvailable", errors.KafkaTimeoutError), ssl.SSLError)


def options_for(client: type[Client], config: Mapping[str, Any] | None, settings: Settings) -> dict[str, Any]:
    """Return the options of ``client``: a copy of ``config``, or the client's options in ``KSER_CONFIG``.

    :raises kser.errors.SettingError: ``KSER_CONFIG`` has an option that neither KafkaConsumer nor KafkaProducer knows.
    """
    if config is not None:
        return dict(config)
    return known_options(
        settings.client or {}, client.DEFAULT_CONFIG, KafkaConsumer.DEFAULT_CONFIG, KafkaProducer.DEFAULT_CONFIG
    )


def connect(client: type[Client], options: Mapping[str, Any]) -> Client:
    """Create a client. If no broker has responded after ``REPORT_AFTER`` seconds, log the reason, and wait further.

    :raises kser.errors.BrokerUnavailable: the client cannot connect to the brokers.
    """
    lines = ClientLines()
    network: list[Any] = []
    make_network = options.get("kafka_client", client.DEFAULT_CONFIG["kafka_client"])

    def make_recorded_network(*arguments: Any, **keywords: Any) -> Any:
        network.append(make_network(*arguments, **keywords))
        lines.set_network(network[-1])
        return network[-1]

    report = threading.Timer(REPORT_AFTER, _report_wait, (connection_of(options), lines))
    report.daemon = True
    report.start()
    try:
        with lines.calling():
            connected = client(**{**options, "kafka_client": make_recorded_network})
    except _UNREACHABLE as error:
        # The failed constructor leaves its network thread running, so close the network.
        for opened in network:
            opened.close()
        reason = lines.failure.reason() or error
        raise BrokerUnavailable(unavailable_text(reason, connection_of(options))) from error
    finally:
        report.cancel()
    lines.set_client(connected)
    return connected


def _report_wait(connection: Connection, lines: ClientLines) -> None:
    text = unavailable_text(lines.failure.reason() or "no response", connection)
    logger.error(f"{text}; trying again")


def connection_of(options: Mapping[str, Any]) -> Connection:
    """Return how a client with these options connects."""
    protocol = str(options.get("security_protocol") or "PLAINTEXT")
    mechanism = options.get("sasl_mechanism") if protocol.startswith("SASL") else None
    user = options.get("sasl_plain_username") if mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512") else None
    return Connection(servers(options), "bootstrap_servers", protocol, mechanism or "", user or "")


def servers(options: Mapping[str, Any]) -> str:
    """Return the bootstrap servers as text, for error texts."""
    value = options.get("bootstrap_servers", "localhost:9092, the default")
    return value if isinstance(value, str) else ", ".join(map(str, value))
