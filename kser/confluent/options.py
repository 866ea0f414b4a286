"""Options of librdkafka: consumer options, producer options, defaults, and errors for unknown options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import confluent_kafka
from confluent_kafka import KafkaException

from kser.config import CONFIG, PRODUCER_CONFIG, Settings, nearest_name
from kser.connection import Connection
from kser.consumer.options import default_session
from kser.errors import SettingError
from kser.masking import MASK, Secrets, address_text, is_mechanism

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

#: Level of librdkafka's log lines at which a client without an address does not log that it has no address.
_ERRORS_ONLY = 3

#: Names of the option with the addresses of the brokers.
_ADDRESSES = _names("bootstrap.servers metadata.broker.list")
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
    if config is not None:
        return dict(config)
    options = own_options(kind, settings.client or {})
    return options | producer_options(settings.producer) if kind == "producer" else options


def producer_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``producer_config`` of a consumer, or the value of ``KSER_PRODUCER_CONFIG``, after a check of its names.

    :raises kser.errors.SettingError: an option is for consumers only, or librdkafka rejects an option or its value.
    """
    if not options:
        return {}
    for key in options:
        if key in CONSUMER_ONLY:
            raise SettingError(
                f"producer_config ({PRODUCER_CONFIG}): {key!r} is an option for consumers only: remove it"
            )
    # Only librdkafka knows its options. It checks them when it creates a client, and this client connects to no broker,
    # because it has no address.
    checked = {key: value for key, value in options.items() if key not in _ADDRESSES}
    connect(
        confluent_kafka.Producer,
        {"log_level": _ERRORS_ONLY, **checked},
        source=f"{PRODUCER_CONFIG} or the 'producer_config' argument",
    )
    return dict(options)


def own_options(kind: Kind, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` without options of the other kind of client, about which librdkafka would log warnings."""
    foreign = PRODUCER_ONLY if kind == "consumer" else CONSUMER_ONLY
    return {key: value for key, value in options.items() if key not in foreign}


def required_acks(options: Mapping[str, Any]) -> str:
    """Return the option ``acks`` of a producer as text; empty if it is not set."""
    return str(_option(options, "acks", "request.required.acks", default=""))


def _option(options: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """Return an option that has several names, from ``options`` or from the ``default.topic.config`` in them."""
    merged = {**(options.get("default.topic.config") or {}), **options}
    return next((merged[name] for name in names if name in merged), default)


#: Options that librdkafka does not accept with the group protocol ``consumer`` (KIP-848), with what replaces each.
_CLASSIC_ONLY = {
    "session.timeout.ms": "the group's option consumer.session.timeout.ms at the broker",
    "heartbeat.interval.ms": "the group's option consumer.heartbeat.interval.ms at the broker",
    "partition.assignment.strategy": "the option group.remote.assignor",
    "group.protocol.type": "nothing",
}

#: The request timeout of a consumer in milliseconds, if the options do not set one; the default of other clients.
REQUEST_TIMEOUT_MS = 30_000

#: The first version of librdkafka whose group protocol ``consumer`` is no preview: 2.12.
_NEXT_PROTOCOL_LIBRARY = 0x020C0000

#: The session timeout of the group protocol ``consumer`` in milliseconds: the default of Kafka, where it is set.
NEXT_PROTOCOL_SESSION_MS = 45_000


def is_next_protocol(options: Mapping[str, Any]) -> bool:
    """Return whether the options choose the group protocol ``consumer`` (KIP-848) instead of ``classic``."""
    return str(options.get("group.protocol", "")).lower() == "consumer"


def with_group_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a consumer, with the session timeout and the request timeout of kser if they set none.

    :raises kser.errors.SettingError: the group protocol does not allow an option, or the installed librdkafka is too
        old for the group protocol.
    """
    options = dict(options)
    if "fetch.wait.max.ms" not in options:
        # The commit before a revocation takes as long as a request to a broker that does not respond. This time must be
        # less than the time limit of the client thread.
        options.setdefault("socket.timeout.ms", REQUEST_TIMEOUT_MS)
    if not is_next_protocol(options):
        options.setdefault("session.timeout.ms", default_session(options.get("heartbeat.interval.ms")))
        return options
    version, number = confluent_kafka.libversion()
    if number < _NEXT_PROTOCOL_LIBRARY:
        raise SettingError(
            f"group.protocol=consumer (KIP-848) needs librdkafka 2.12 or newer, and {version} is installed: upgrade"
            f" confluent-kafka, or remove the option from {CONFIG} or the 'config' argument"
        )
    for name, instead in _CLASSIC_ONLY.items():
        if name in options:
            raise SettingError(
                f"{name!r} cannot be set together with group.protocol=consumer (KIP-848): remove it from {CONFIG} or"
                f" the 'config' argument; {instead} replaces it"
            )
    return options


def with_metadata_age(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a consumer, with a default for the time after which it notices new topics."""
    if any(name in options for name in METADATA_AGE):
        return dict(options)
    return {METADATA_AGE[0]: METADATA_REFRESH_MS, **options}


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a producer, with safe and fast defaults for options that are not set."""
    options = dict(options)
    option = partial(_option, options)
    acks = option("acks", "request.required.acks")
    if acks is None:
        options["acks"] = "all"
    retries = option("retries", "message.send.max.retries")
    in_flight = option("max.in.flight", "max.in.flight.requests.per.connection")
    # librdkafka rejects ``enable.idempotence`` together with these options.
    opposed = (
        str("all" if acks is None else acks) not in ("all", "-1")
        or (retries is not None and int(retries) < 1)
        or (in_flight is not None and int(in_flight) > 5)
        or option("queuing.strategy") == "lifo"
    )
    if not opposed:
        options.setdefault("enable.idempotence", True)
    if in_flight is None:
        # A broker that has no messages of the producer in a partition yet accepts any sequence number. If it rejects
        # the first request, for example because it is not the leader yet, and accepts the second, then librdkafka
        # reports the messages of the first request as delivered, although they are lost. So send one request at a time.
        options["max.in.flight.requests.per.connection"] = 1
    if option("linger.ms", "queue.buffering.max.ms") is None:
        options["linger.ms"] = 0
    if option("partitioner") is None:
        options["partitioner"] = "murmur2_random"
    # Remove this option, because every message needs a delivery report. With the option, librdkafka would not report
    # successful deliveries.
    options.pop("delivery.report.only.error", None)
    return options


def connect(
    client: Callable[..., Client],
    options: Mapping[str, Any],
    *,
    source: str = f"{CONFIG} or the 'config' argument",
    **keywords: Any,
) -> Client:
    """Create a client.

    :param source: where the user set the options, for the error text.
    :param keywords: further arguments of the client's class.
    :raises kser.errors.SettingError: librdkafka rejects an option or its value.
    """
    try:
        return client(dict(options), **keywords)
    except KafkaException as error:
        secrets = Secrets(options)
        reason = str(error.args[0].str() if hasattr(error.args[0], "str") else error).rstrip()
        unknown = _UNKNOWN.search(reason)
        if unknown is None:
            text = f"the Kafka client cannot be created: {secrets.hide(reason)}; correct {source}"
            raise SettingError(text) from secrets.cause(error)
        key = unknown[1]
        raise SettingError(
            f"librdkafka knows no option {key!r}, which is set in {source}: did you mean {_nearest(key)!r}?"
        ) from error
    except (TypeError, ValueError) as error:
        # confluent-kafka rejects a value of a wrong type.
        secrets = Secrets(options)
        text = f"the Kafka client cannot be created: {secrets.hide(str(error))}; correct {source}"
        raise SettingError(text) from secrets.cause(error)


def _nearest(key: str) -> str:
    # kafka-python spells the same options with underscores, so a wrong name may come from a kafka-python configuration.
    return nearest_name(key.replace("_", "."), sorted(CONSUMER_ONLY | PRODUCER_ONLY | _COMMON))


def connection_of(options: Mapping[str, Any]) -> Connection:
    """Return how a client with these options connects."""
    protocol = str(options.get("security.protocol") or "PLAINTEXT").upper()
    mechanism = user = ""
    if protocol.startswith("SASL"):
        mechanism = str(options.get("sasl.mechanism") or options.get("sasl.mechanisms") or "GSSAPI")
        mechanism = mechanism if is_mechanism(mechanism) else MASK
        user = str(options.get("sasl.username") or "")
    return Connection(servers(options), "bootstrap.servers", protocol, mechanism, user, Secrets(options))


def servers(options: Mapping[str, Any]) -> str:
    """Return the bootstrap servers as text, for error texts."""
    value = options.get("bootstrap.servers") or options.get("metadata.broker.list") or "no 'bootstrap.servers'"
    return address_text(value if isinstance(value, str | list) else str(value))
