"""Options of the kafka-python clients, and the connection of a client to the brokers."""

from __future__ import annotations

import logging
import math
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

from kafka import KafkaConsumer, KafkaProducer, errors

from kser.config import CONFIG, PRODUCER_CONFIG, Settings, known_options, nearest_name
from kser.connection import Connection, unavailable_text
from kser.consumer.options import default_session
from kser.errors import BrokerUnavailable, SettingError
from kser.escaping import escape_lines
from kser.masking import MASK, Secrets, address_text, is_mechanism
from kser.python_kafka.logs import ClientLines

logger = escape_lines(logging.getLogger(__name__))

#: Seconds to wait until kafka-python has closed its connections.
CLOSE_TIMEOUT = 1.0
#: kser's default of a consumer's ``metadata_max_age_ms``, the time in milliseconds after which it notices new topics
#: and new permissions. kafka-python's default is five minutes.
METADATA_MAX_AGE_MS = 10_000
#: Milliseconds that a client which replaces another one waits for a broker.
RECONNECT_TIMEOUT_MS = 5000
#: Seconds after which a client that is still connecting logs the reason.
REPORT_AFTER = 1.0

Client = TypeVar("Client", KafkaConsumer, KafkaProducer)

# If no broker responds, kafka-python 2 raises NoBrokersAvailable, and kafka-python 3 raises KafkaTimeoutError.
# kafka-python 2 also raises the error of a TLS handshake.
_UNREACHABLE = (errors.KafkaTimeoutError, getattr(errors, "NoBrokersAvailable", errors.KafkaTimeoutError), ssl.SSLError)


def options_for(
    client: type[Client], config: Mapping[str, Any] | None, settings: Settings, *, checked: bool = True
) -> dict[str, Any]:
    """Return the options of ``client``: a copy of ``config``, or the client's options in the settings.

    :param checked: whether ``config`` must contain only options that the client knows. The client itself would raise an
        error with the values, which may be passwords.
    :raises kser.errors.SettingError: ``KSER_CONFIG`` has an option that neither KafkaConsumer nor KafkaProducer knows,
        or ``KSER_PRODUCER_CONFIG`` has an option that KafkaProducer does not know, or the options choose a group
        protocol that kafka-python does not have.
    """
    if config is not None:
        options = _without_group_protocol(config)
        if checked:
            _check_names(client, options)
        return options
    options = known_options(
        _without_group_protocol(settings.client or {}),
        client.DEFAULT_CONFIG,
        KafkaConsumer.DEFAULT_CONFIG,
        KafkaProducer.DEFAULT_CONFIG,
    )
    return options | producer_options(settings.producer) if client is KafkaProducer else options


def _check_names(client: Any, options: Mapping[str, Any]) -> None:
    known = sorted({*client.DEFAULT_CONFIG, *getattr(client, "DEPRECATED_CONFIGS", ())})
    for key in options:
        if key not in known:
            nearest = nearest_name(str(key), known)
            raise SettingError(f"{client.__name__} knows no option {key!r}; the nearest is {nearest!r}: correct it")


def producer_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``producer_config`` of a consumer, or the value of ``KSER_PRODUCER_CONFIG``, after a check of its names.

    :raises kser.errors.SettingError: KafkaProducer does not know an option.
    """
    known = sorted(KafkaProducer.DEFAULT_CONFIG)
    for key in options or ():
        if key not in known:
            raise SettingError(
                f"producer_config ({PRODUCER_CONFIG}): KafkaProducer knows no option {key!r}; the nearest is"
                f" {nearest_name(key, known)!r}"
            )
    return dict(options or {})


def with_group_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a consumer, with the session timeout of kser if they set none."""
    options = dict(options)
    session = default_session(options.get("heartbeat_interval_ms"))
    # kafka-python 2 requires that a request may take longer than a session.
    if options.get("request_timeout_ms", math.inf) > session:
        options.setdefault("session_timeout_ms", session)
    return options


def with_short_bootstrap(options: Mapping[str, Any], client: type[Client] = KafkaProducer) -> dict[str, Any]:
    """Return the options of a client that replaces another one, and so waits only briefly for a broker."""
    default = client.DEFAULT_CONFIG.get("bootstrap_timeout_ms")
    if default is None:
        return dict(options)
    return {**options, "bootstrap_timeout_ms": min(options.get("bootstrap_timeout_ms", default), RECONNECT_TIMEOUT_MS)}


def _without_group_protocol(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without the group protocol, which kafka-python does not know: it always uses ``classic``.

    :raises kser.errors.SettingError: the options choose another protocol.
    """
    for name in ("group_protocol", "group.protocol"):
        if str(options.get(name, "classic")).lower() != "classic":
            raise SettingError(
                f"kafka-python has only the group protocol 'classic'; {name!r} is {options[name]!r}: use kser.confluent"
                f" for 'consumer' (KIP-848), or remove the option from {CONFIG} or the 'config' argument"
            )
    return {key: value for key, value in options.items() if key not in ("group_protocol", "group.protocol")}


def connect(client: type[Client], options: Mapping[str, Any]) -> Client:
    """Create a client. If no broker has responded after ``REPORT_AFTER`` seconds, log the reason, and wait further.

    :raises kser.errors.BrokerUnavailable: the client cannot connect to the brokers.
    """
    lines = ClientLines()
    network: list[Any] = []
    make_network = options.get("kafka_client", client.DEFAULT_CONFIG["kafka_client"])

    def make_recorded_network(*arguments: Any, **keywords: Any) -> Any:
        network.append(make_network(*arguments, **keywords))
        _close_in_own_thread(network[-1])
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
        connection = connection_of(options)
        raise BrokerUnavailable(unavailable_text(reason, connection)) from connection.secrets.cause(error)
    except (AssertionError, TypeError, ValueError, errors.KafkaConfigurationError) as error:
        for opened in network:
            opened.close()
        secrets = Secrets(options)
        if secrets.cause(error) is not None:
            raise
        reason = secrets.hide(str(error))
        raise SettingError(
            f"the Kafka client cannot be created: {reason}; correct {CONFIG} or the 'config' argument"
        ) from None
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
    if mechanism and not is_mechanism(mechanism):
        mechanism = MASK
    return Connection(servers(options), "bootstrap_servers", protocol, mechanism or "", user or "", Secrets(options))


def _close_in_own_thread(network: Any) -> None:
    """Make kafka-python 3 close its connections in the thread that reads from them.

    If another thread closes a connection while this thread reads, kafka-python logs an error with a traceback.
    """
    loop = getattr(network, "_net", None)
    if loop is None:
        return
    close = network.close

    def close_connections(node_id: Any = None) -> None:
        thread = loop._io_thread
        if node_id is None and thread is not None and thread is not threading.current_thread():
            closed = threading.Event()
            # The loop may have ended already, and then refuses the call.
            with suppress(errors.KafkaError, RuntimeError):
                loop.call_soon_with_future(network._manager.close).add_both(lambda _: closed.set())
                closed.wait(CLOSE_TIMEOUT)
        close(node_id)

    network.close = close_connections


def servers(options: Mapping[str, Any]) -> str:
    """Return the bootstrap servers as text, for error texts."""
    return address_text(options.get("bootstrap_servers", "localhost:9092, the default"))
