"""Connection errors: what an error of a Kafka client means, and how often it is logged.

The client libraries describe one cause with many texts, which contain changing numbers, and some texts hide the cause:
"1/1 brokers are down" also stands for a wrong password. The functions here turn such a text into a
``ConnectionFailure``, whose kind is the same for each repetition, and whose text names what to correct.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple

from kser.config import CONFIG
from kser.masking import Secrets

#: Seconds after which a failure that persists is logged again.
REPEAT_INTERVAL = 600.0

#: Seconds for which the last reason of a failed connection is the reason of an error that does not name one.
REASON_AGE = 30.0
#: Seconds for which connections to a broker must fail before this is logged although the other brokers respond.
PERSISTENCE = 10.0

_NUMBERS = re.compile(r"\d+")
#: A text of kafka-python for a request that had too little time left.
_OUT_OF_TIME = re.compile(r"Request timed out after \d+ ms")
#: Details of one attempt at the end of a text of librdkafka, and the place at its begin.
_ATTEMPT = re.compile(
    r" \(after \d+ms in state \w+.*?\)|^(?:[a-z_]+://)?[^\s/]+:\d+/\w+: |, \d+ identical error\(s\).*"
)


class Connection(NamedTuple):
    """How a client connects: its addresses and its login, without the password.

    :param servers: the bootstrap servers.
    :param option: the name of the client's option for ``servers``.
    :param protocol: the security protocol, such as ``SASL_SSL``.
    :param mechanism: the SASL mechanism; empty if the protocol has no login.
    :param user: the user name; empty if the mechanism has none.
    :param secrets: the secret values of the client's options, which no text may contain.
    """

    servers: str
    option: str = "bootstrap.servers"
    protocol: str = "PLAINTEXT"
    mechanism: str = ""
    user: str = ""
    secrets: Secrets = Secrets()

    @property
    def login(self) -> str:
        """The user and the mechanism, for error texts."""
        user = f"user {self.user!r}" if self.user else "this client"
        return f"{user} with mechanism {self.mechanism or 'none'}"


class ConnectionFailure(NamedTuple):
    """The meaning of an error of the client library.

    :param kind: the same for each repetition of the failure.
    :param text: what happened, to which value, and what to do.
    """

    kind: str
    text: str


class _Meaning(NamedTuple):
    """One kind of failure: the words that identify it in an error of a client library, as patterns, and its text."""

    kind: str
    words: tuple[str, ...]
    text: str


# The first meaning whose words the error contains applies, so the order matters: a text about a rejected login may also
# say that the connection was closed.
_MEANINGS = (
    _Meaning(
        "mechanism",
        ("unsupported sasl mechanism", "unsupportedsaslmechanism", r"does not support .*mechanism",
         "unsupported_sasl_mechanism"),
        "the brokers do not accept the mechanism {mechanism} ({reason}): set a mechanism that they accept",
    ),
    _Meaning(
        "login",
        ("authentication failed", "saslauthenticationfailed", "authenticationfailed", "invalid credentials"),
        "the brokers refused the login of {login}: check the user, the password and the mechanism",
    ),
    _Meaning(
        "certificate",
        ("certificate verify failed", "certificate_verify_failed", "certificate has expired", "hostname mismatch",
         "unknown ca", "bad certificate", "alert certificate", "certificate required", "ssl.ca.location"),
        "the certificates do not match ({reason}): check the client's CA file, the host name in the broker's"
        " certificate and its expiry, and the client's own certificate if the brokers require one",
    ),
    _Meaning(
        "no tls",
        ("plaintext broker listener", "wrong version number", "wrong_version_number", "unexpected_eof",
         "record layer failure", "ssl handshake failed", "ssl connection closed",
         "handshake failed", "eof occurred in violation"),
        "the port does not answer the TLS handshake ({reason}): correct the port, or the security protocol {protocol}",
    ),
    _Meaning(
        "host name",
        ("failed to resolve", "dns lookup", "dns resolution", "via dns", "gaierror",
         "name or service not known", "nodename nor servname", "name resolution",
         "host resolution"),
        "the host name cannot be resolved: correct {option!r}, or the name server of this machine",
    ),
    _Meaning(
        "refused",
        ("refused", "unreachable", "no route to host", "connect to "),
        "no Kafka broker listens there ({reason}): start one there, or correct {option!r}",
    ),
    # A client without TLS takes the first bytes of a TLS alert, or of an HTTP answer, for the length of a response.
    _Meaning(
        "tls",
        ("invalid frame length: 352518", "invalid response size 352518"),
        "the port expects TLS: set the security protocol to SSL, or to SASL_SSL if it also expects a login",
    ),
    _Meaning(
        "http",
        ("invalid frame length: 1213486160", "invalid response size 1213486160"),
        "an HTTP server answers there: correct {option!r}",
    ),
    _Meaning(
        "no kafka",
        ("invalid response size", "invalid frame length", "invalidreceive", "invalid response", "unrecognized",
         "no in-flight", "receive.message.max.bytes", "bufferunderflow", "unpack requires"),
        "the port does not speak the protocol of Kafka ({reason}): correct the port, or set the security protocol if"
        " the port expects TLS",
    ),
    _Meaning(
        "closed",
        ("socket disconnected", "disconnected", "closed by peer", "connection reset", "econnreset", "broken pipe"),
        "the connection is closed as soon as it is used: the port does not speak the protocol of Kafka, or its"
        " listener expects another security protocol than {protocol}",
    ),
    _Meaning(
        "topic denied",
        ("topicauthorization", "topic authorization"),
        "not authorized to read the topic ({reason}): grant {reader} Read and Describe on the topic",
    ),
    _Meaning(
        "group denied",
        ("groupauthorization", "group authorization"),
        "not authorized to use the consumer group ({reason}): grant {reader} Read on the group",
    ),
    _Meaning(
        "denied",
        ("authorization",),
        "not authorized ({reason}): grant {reader} the operation",
    ),
    _Meaning(
        "session timeout",
        ("invalid session timeout", "invalidsessiontimeout", "invalid_session_timeout"),
        "the brokers do not accept the session timeout ({reason}): set one between 'group.min.session.timeout.ms' and"
        " 'group.max.session.timeout.ms' of the brokers",
    ),
    _Meaning(
        "transaction timeout",
        ("transaction timeout", "invalidtransactiontimeout"),
        "the brokers do not accept the transaction timeout ({reason}): set one below 'transaction.max.timeout.ms' of"
        " the brokers",
    ),
    # A broker itself reports that it could not finish a request, for example because a replica is slow.
    _Meaning(
        "slow broker",
        ("broker: request timed out", "requesttimedout", r"\[error 7\]"),
        "a broker did not finish the request in time ({reason}): check the load of the brokers and their replicas",
    ),
    _Meaning(
        "silent",
        ("no response", "unable to bootstrap", "nobrokersavailable", "brokers are down", "transport failure",
         "not ready", "setup timed out"),
        "no Kafka broker responds ({reason}): start one there, or correct {option!r}",
    ),
    _Meaning(
        "slow",
        ("timed out", "timeout"),
        "the brokers did not answer the request in time ({reason}): check that they run and their load, or correct"
        " {option!r}",
    ),
)  # fmt: skip

#: The kinds of failures of a client that cannot reach any broker, if the client could not connect at all.
UNREACHABLE = ("refused", "silent", "slow")

#: The addresses in an error. A host name may contain words that identify a failure, such as "dns" or "timeout".
_ADDRESS = re.compile(r"\bhost=[^\s>,]+|[^\s'\"(\[,]*[a-z][^\s'\"(\[,]*:\d+(?![\w:])")

_CLOSED_IN_LOGIN = (
    "the brokers close the connection during the login of {login}: check the user, the password, the mechanism and the"
    " security protocol"
)


def stable_text(reason: str) -> str:
    """Return an error of a client library without the details that differ from one attempt to the next."""
    return _ATTEMPT.sub("", reason).strip()


def explain(reason: object, connection: Connection) -> ConnectionFailure:
    """Return the meaning of an error of a client library.

    An error that no meaning matches keeps its text, and its kind is the text without numbers.
    """
    lower = _ADDRESS.sub("", stable_text(str(reason)).lower())
    text = connection.secrets.hide(stable_text(str(reason)))
    found = next((meaning for meaning in _MEANINGS if re.search("|".join(meaning.words), lower)), None)
    if found is None:
        return ConnectionFailure(_NUMBERS.sub("#", text), text)
    template = _CLOSED_IN_LOGIN if found.kind == "closed" and connection.protocol.startswith("SASL") else found.text
    values = {
        **connection._asdict(),
        "login": connection.login,
        "reader": f"user {connection.user!r}" if connection.user else "the user of this client",
        "reason": text,
    }
    return ConnectionFailure(found.kind, template.format(**values))


def unavailable_text(reason: object, connection: Connection) -> str:
    """Return the text of an error about a client that cannot connect to any broker."""
    failure = explain(reason, connection)
    if failure.kind not in UNREACHABLE:
        return f"cannot connect to Kafka at {connection.servers}: {failure.text}"
    text = connection.secrets.hide(stable_text(str(reason)))
    return (
        f"no Kafka broker responds at {connection.servers} ({text}): start one there, or correct"
        f" {connection.option!r} in {CONFIG} or in the 'config' argument"
    )


class LastFailure:
    """The reason of the last failed connection of a client, taken from the client's log lines.

    :param clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reason = ""
        self._first_at = self._last_at = -REASON_AGE
        self._count = 0

    def note(self, reason: str) -> None:
        """Record a failed connection."""
        now = self._clock()
        if now - self._last_at >= REASON_AGE:
            self._first_at, self._count, self._reason = now, 0, ""
        # A try that ran out of time names no cause, so keep the reason of an earlier try.
        if not (self._reason and _OUT_OF_TIME.search(reason)):
            self._reason = reason
        self._last_at = now
        self._count += 1

    def reason(self) -> str:
        """Return the last reason; empty if no connection failed within the last ``REASON_AGE`` seconds."""
        return self._reason if self._clock() - self._last_at < REASON_AGE else ""

    def persistent_reason(self) -> str:
        """Return the last reason if connections have failed for ``PERSISTENCE`` seconds, otherwise an empty text."""
        return self.reason() if self._count > 2 and self._last_at - self._first_at >= PERSISTENCE else ""

    def clear(self) -> None:
        """Forget the failures, because a broker has responded."""
        self._last_at = -REASON_AGE


def partial_failure_text(reason: str, connection: Connection) -> str:
    """Return the text of a log line about a broker that a client cannot connect to, while it uses the other brokers."""
    text = explain(reason, connection).text
    return f"connections to a broker of {connection.servers} fail: {text}; the client uses the other brokers meanwhile"


class FailureLog:
    """A record of the failures that were logged, so that each kind is logged once and then at a slow pace.

    :param clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: dict[str, float] = {}

    def is_due(self, kind: str) -> bool:
        """Return whether to log a failure of this kind now, and record that it is logged.

        A failure is due if its kind was not logged within ``REPEAT_INTERVAL`` seconds since the last success.
        """
        now = self._clock()
        if now - self._logged.get(kind, -REPEAT_INTERVAL) < REPEAT_INTERVAL:
            return False
        self._logged[kind] = now
        return True

    @property
    def is_failing(self) -> bool:
        """True if a failure was logged since the last success."""
        return bool(self._logged)

    def succeed(self) -> bool:
        """Record a success; return whether a failure was logged before it."""
        failed = bool(self._logged)
        self._logged.clear()
        return failed
