"""Secrets in texts: passwords of client options and of addresses, which no log line and no error may contain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "***"

#: Option names whose values are secrets, and names of options with paths, addresses and methods, which are none.
_SECRET_NAME = re.compile(r"passw|secret|token|key|pem|jaas|credential|oauthbearer.config|jwt", re.IGNORECASE)
_PUBLIC_NAME = re.compile(r"(location|file|path|url|method|keytab|serializer|dir)$", re.IGNORECASE)
#: The SASL mechanisms of Kafka's brokers. Another value of the option may be a password in the wrong place.
_MECHANISMS = {"GSSAPI", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "AWS_MSK_IAM"}
_MECHANISM_NAME = re.compile(r"sasl.mechanisms?", re.IGNORECASE)
_ADDRESS_NAME = re.compile(r"bootstrap.servers|metadata.broker.list", re.IGNORECASE)
#: Words that are values of many options, and no secrets.
_WORDS = {"true", "false", "none", "null"}


def mask_address(address: str) -> str:
    """Return addresses without the user and the password before an ``@``.

    A password may contain a comma, so everything before the last ``@`` is masked.
    """
    _, at, rest = address.rpartition("@")
    return f"{MASK}{at}{rest}" if at else address


def address_text(value: Any) -> str:
    """Return an option with addresses, a str or a list, as text without passwords."""
    return mask_address(value if isinstance(value, str) else ", ".join(map(str, value)))


def is_mechanism(value: Any) -> bool:
    """Return whether a value is a SASL mechanism of Kafka's brokers."""
    return str(value).upper() in _MECHANISMS


class Secrets:
    """The secret values of a client's options.

    :param options: the options of the client.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        found = {text for name, value in (options or {}).items() for text in _secrets_of(str(name), value)}
        # Replace a long value first, because it may contain a short one.
        self._values = sorted((text for text in found if text.lower() not in _WORDS), key=len, reverse=True)

    def hide(self, text: str) -> str:
        """Return a text without the secrets."""
        for value in self._values:
            if len(value) > 3:
                text = text.replace(value, MASK)
            else:
                text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", MASK, text)
        return text

    def cause(self, error: BaseException) -> BaseException | None:
        """Return an error as the cause of another error; None if its text contains a secret."""
        texts = f"{error} {error!r}"
        return error if self.hide(texts) == texts else None


def _secrets_of(name: str, value: Any) -> Iterable[str]:
    if value is None or isinstance(value, bool | int | float):
        return []
    if _ADDRESS_NAME.fullmatch(name):
        addresses = [value] if isinstance(value, str) else map(str, value)
        return [part for address in addresses for part in _login_of(address)]
    if _MECHANISM_NAME.fullmatch(name):
        return [] if is_mechanism(value) or not value else [str(value)]
    if _SECRET_NAME.search(name) and not _PUBLIC_NAME.search(name):
        return _texts_of(value)
    return []


def _login_of(address: str) -> Iterable[str]:
    login, at, _ = address.rpartition("@")
    return [part for part in (login, login.partition("://")[2], login.rpartition(":")[2]) if part] if at else []


def _texts_of(value: Any) -> list[str]:
    """Return the texts in a value of an option, which may have a wrong type."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        lines = [line.strip() for line in value.splitlines()]
        return [text for text in (value, value.strip(), *(line for line in lines if len(line) > 3)) if text]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts_of(item)]
    if isinstance(value, list | tuple | set):
        return [text for item in value for text in _texts_of(item)]
    return []
