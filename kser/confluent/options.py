"""Options of librdkafka: consumer options, producer options, defaults, and errors for unknown options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from confluent_kafka import KafkaException

from kser.config import CONFIG, Settings, nearest_name
from kser.connection import Connection
from kser.errors import SettingError

Client = TypeVar("Client")
Kind = Literal["consumer", "producer"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Options that a producer ignores with a warning.
CONSUMER_ONLY = _names(
    """
    auto.commit.enable auto.commit.interval.ms auto.offset.reset check.crcs consume.callback.max.messages
    coordinator.query.interval.ms enable.auto.commit enable.auto.offset.store enable.partition.eof
    fetch.error.backoff.ms fetch.max.bytes fetch.message.max.bytes fetch.min.bytes fetch.queue.backoff.ms
    fetch.wait.max.ms group.id group.instance.id group.protocol group.protocol.type group.remote.assignor
    heartbeat.interval.ms isolation.level max.partition.fetch.bytes max.poll.interval.ms offset.store.method
    offset.store.path offset.store.sync.interval.ms on_commit partition.assignment.strategy
    queued.max.messages.kbytes queued.min.messages session.timeout.ms
    """
)

#: Options that a consumer ignores with a warning.
PRODUCER_ONLY = _names(
    """
    acks batch.num.messages batch.size compression.codec compression.level compression.type
    delivery.report.only.error delivery.timeout.ms enable.gapless.guarantee enable.idempotence linger.ms
    message.send.max.retries message.timeout.ms on_delivery partitioner produce.offset.report
    queue.buffering.backpressure.threshold queue.buffering.max.kbytes queue.buffering.max.messages
    queue.buffering.max.ms queuing.strategy request.required.acks request.timeout.ms retries
    sticky.partitioning.linger.ms transaction.timeout.ms transactional.id
    """
)

#: Options of both clients. kser uses them only to suggest the nearest name, because librdkafka itself decides which
#: names are valid.
_COMMON = _names(
    """
    allow.auto.create.topics api.version.request bootstrap.servers broker.address.family broker.address.ttl
    client.dns.lookup client.id client.rack connections.max.idle.ms debug default.topic.config
    enable.ssl.certificate.verification error_cb log.connection.close log_level logger max.in.flight
    max.in.flight.requests.per.connection message.copy.max.bytes message.max.bytes metadata.broker.list
    metadata.max.age.ms oauth_cb plugin.library.paths receive.message.max.bytes reconnect.backoff.max.ms
    reconnect.backoff.ms retry.backoff.max.ms retry.backoff.ms sasl.kerberos.keytab sasl.kerberos.principal
    sasl.kerberos.service.name sasl.mechanism sasl.mechanisms sasl.oauthbearer.client.id
    sasl.oauthbearer.client.secret sasl.oauthbearer.config sasl.oauthbearer.method
    sasl.oauthbearer.token.endpoint.url sasl.password sasl.username security.protocol
    socket.connection.setup.timeout.ms socket.keepalive.enable socket.nagle.disable socket.receive.buffer.bytes
    socket.send.buffer.bytes socket.timeout.ms ssl.ca.location ssl.ca.pem ssl.certificate.location
    ssl.certificate.pem ssl.cipher.suites ssl.crl.location ssl.endpoint.identification.algorithm ssl.key.location
    ssl.key.password ssl.key.pem ssl.keystore.location ssl.keystore.password statistics.interval.ms stats_cb
    throttle_cb topic.metadata.propagation.max.ms topic.metadata.refresh.interval.ms
    """
)

#: The options for the time after which a client notices new topics and new permissions.
METADATA_AGE = ("topic.metadata.refresh.interval.ms", "metadata.max.age.ms")
#: kser's default of ``topic.metadata.refresh.interval.ms``, in milliseconds. librdkafka's default is five minutes.
METADATA_REFRESH_MS = 10_000

_UNKNOWN = re.compile(r'No such configuration property: "(.*)"')


def options_for(kind: Kind, config: Mapping[str, Any] | None, settings: Settings) -> dict[str, Any]:
    """Return the options of a client: a copy of ``config``, or the options in ``KSER_CONFIG`` for that kind of client.

    :param kind: ``"consumer"`` or ``"producer"``.
    :raises kser.errors.SettingError: ``KSER_CONFIG`` is invalid.
    """
    return dict(config) if config is not None else own_options(kind, settings.client or {})


def own_options(kind: Kind, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` without options of the other kind of client, about which librdkafka would log warnings."""
    foreign = PRODUCER_ONLY if kind == "consumer" else CONSUMER_ONLY
    return {key: value for key, value in options.items() if key not in foreign}


def with_metadata_age(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a consumer, with a default for the time after which it notices new topics."""
    if any(name in options for name in METADATA_AGE):
        return dict(options)
    return {METADATA_AGE[0]: METADATA_REFRESH_MS, **options}


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a producer, with safe and fast defaults for options that are not set."""
    options = dict(options)
    merged = {**(options.get("default.topic.config") or {}), **options}

    def option(*names: str) -> Any:
        return next((merged[name] for name in names if name in merged), None)

    acks = option("acks", "request.required.acks")
    if acks is None:
        options["acks"] = "all"
    retries = option("retries", "message.send.max.retries")
    in_flight = option("max.in.flight", "max.in.flight.requests.per.connection")
    # librdkafka rejects ``enable.idempotence`` together with these options.
    opposed = (
        str(acks or "all") not in ("all", "-1")
        or (retries is not None and int(retries) < 1)
        or (in_flight is not None and int(in_flight) > 5)
        or option("queuing.strategy") == "lifo"
    )
    if not opposed:
        options.setdefault("enable.idempotence", True)
    if option("linger.ms", "queue.buffering.max.ms") is None:
        options["linger.ms"] = 0
    if option("partitioner") is None:
        options["partitioner"] = "murmur2_random"
    # Remove this option, because every message needs a delivery report. With the option, librdkafka would not report
    # successful deliveries.
    options.pop("delivery.report.only.error", None)
    return options


def connect(client: Callable[..., Client], options: Mapping[str, Any], **keywords: Any) -> Client:
    """Create a client.

    :param keywords: further arguments of the client's class.
    :raises kser.errors.SettingError: librdkafka rejects an option or its value.
    """
    try:
        return client(dict(options), **keywords)
    except KafkaException as error:
        reason = str(error.args[0].str() if hasattr(error.args[0], "str") else error).rstrip()
        unknown = _UNKNOWN.search(reason)
        if unknown is None:
            raise SettingError(
                f"the Kafka client cannot be created: {reason}; correct {CONFIG} or the 'config' argument"
            ) from error
        key = unknown[1]
        raise SettingError(
            f"librdkafka knows no option {key!r}, which is set in {CONFIG} or the 'config' argument: did you mean"
            f" {_nearest(key)!r}?"
        ) from error


def _nearest(key: str) -> str:
    # kafka-python spells the same options with underscores, so a wrong name may come from a kafka-python configuration.
    return nearest_name(key.replace("_", "."), sorted(CONSUMER_ONLY | PRODUCER_ONLY | _COMMON))


def connection_of(options: Mapping[str, Any]) -> Connection:
    """Return how a client with these options connects."""
    protocol = str(options.get("security.protocol") or "PLAINTEXT").upper()
    mechanism = user = ""
    if protocol.startswith("SASL"):
        mechanism = str(options.get("sasl.mechanism") or options.get("sasl.mechanisms") or "GSSAPI")
        user = str(options.get("sasl.username") or "")
    return Connection(servers(options), "bootstrap.servers", protocol, mechanism, user)


def servers(options: Mapping[str, Any]) -> str:
    """Return the bootstrap servers as text, for error texts."""
    return str(options.get("bootstrap.servers") or options.get("metadata.broker.list") or "no 'bootstrap.servers'")
