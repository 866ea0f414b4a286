"""Limits of messages: size, headers, number of metadata keys, nesting and the length of the uuid.

A message above a limit fails before user code can see it. The limits apply where a message arrives and where it is
sent, so that the sender of a too large message gets the error.

=========================== ============== ============================================================================
setting                     default        limit
=========================== ============== ============================================================================
``KSER_MAX_VALUE_BYTES``    33554432       bytes of the value of a record, after decompression
``KSER_MAX_HEADER_BYTES``   65536          bytes of the names and values of all headers of a record
``KSER_MAX_METADATA_KEYS``  1000           keys in the metadata of a message
``KSER_MAX_JSON_DEPTH``     100            objects and lists inside one another; the message itself counts as one
``KSER_MAX_UUID_LENGTH``    255            characters of the uuid of a message
=========================== ============== ============================================================================
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, Self

from kser.config import Settings
from kser.errors import HeadersTooLarge, LimitExceeded, NestedTooDeep, TooManyMetadataKeys, UuidTooLong, ValueTooLarge

MAX_VALUE_BYTES: Final = "KSER_MAX_VALUE_BYTES"
MAX_HEADER_BYTES: Final = "KSER_MAX_HEADER_BYTES"
MAX_METADATA_KEYS: Final = "KSER_MAX_METADATA_KEYS"
MAX_JSON_DEPTH: Final = "KSER_MAX_JSON_DEPTH"
MAX_UUID_LENGTH: Final = "KSER_MAX_UUID_LENGTH"

_TEXT = (str, bytes, bytearray)
_CONTAINERS = (dict, list, tuple)


class Limits(NamedTuple):
    """The limits of messages."""

    max_value_bytes: int = 32 << 20
    max_header_bytes: int = 64 << 10
    max_metadata_keys: int = 1000
    max_json_depth: int = 100
    max_uuid_length: int = 255

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the limits from the settings.

        :raises kser.errors.SettingError: a limit is not a whole number above 0.
        """
        names = (MAX_VALUE_BYTES, MAX_HEADER_BYTES, MAX_METADATA_KEYS, MAX_JSON_DEPTH, MAX_UUID_LENGTH)
        defaults = cls._field_defaults.values()
        pairs = zip(names, defaults, strict=True)
        return cls(*(int(settings.number(name, default, whole=True)) for name, default in pairs))

    def check_value(self, value: Any) -> None:
        """Check the size of the value of a record. A value that is neither text nor bytes passes.

        :raises kser.errors.ValueTooLarge: the value is larger than ``max_value_bytes``.
        """
        if isinstance(value, _TEXT) and len(value) > self.max_value_bytes:
            raise ValueTooLarge(
                f"the value of the message has {len(value):,} bytes, and {MAX_VALUE_BYTES} allows"
                f" {self.max_value_bytes:,}: send a reference instead of the data, or raise {MAX_VALUE_BYTES}"
            )

    def check_headers(self, size: int) -> None:
        """Check the size of the headers of a record, from :func:`header_bytes`.

        :raises kser.errors.HeadersTooLarge: the headers are larger than ``max_header_bytes``.
        """
        if size > self.max_header_bytes:
            raise HeadersTooLarge(
                f"the headers of the message have {size:,} bytes, and {MAX_HEADER_BYTES} allows"
                f" {self.max_header_bytes:,}: send less data in headers, or raise {MAX_HEADER_BYTES}"
            )

    def encode_part(self, value: Any, subject: str) -> str:
        """Encode a part of a message (its params, metadata or result) as JSON text.

        :param subject: name of the value, for the error text.
        :raises kser.errors.NestedTooDeep: the value has too many levels for a message.
        :raises TypeError: the value has no JSON form.
        :raises ValueError: the value contains itself.
        """
        try:
            text = json.dumps(value)
        except RecursionError:
            raise self.too_deep(subject) from None
        if _may_exceed(text, self.max_json_depth - 1):
            self.check_depth((value,), subject)
        return text

    def encode_message(self, kmsg: Any) -> str:
        """Return the JSON text of a message.

        :raises kser.errors.NestedTooDeep: the message has too many levels.
        """
        try:
            text: str = kmsg.dumps()
        except RecursionError:
            raise self.too_deep("the message") from None
        if _may_exceed(text, self.max_json_depth):
            self.check_depth(kmsg.dump().values())
        return text

    def check_depth(self, values: Iterable[Any], subject: str = "the message") -> None:
        """Check how deep the parts of a message are nested. The message itself is the first level.

        :param subject: name of the parts, for the error text.
        :raises kser.errors.NestedTooDeep: the innermost object or list is below level ``max_json_depth``.
        """
        # Visit the values level by level, because recursion could exceed the recursion limit of Python.
        level = [value for value in values if isinstance(value, _CONTAINERS)]
        for _ in range(self.max_json_depth - 1):
            if not level:
                return
            level = [
                inner
                for outer in level
                for inner in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(inner, _CONTAINERS)
            ]
        if level:
            raise self.too_deep(subject)

    def too_deep(self, subject: str) -> NestedTooDeep:
        """Return the error for a JSON text with too many levels.

        :param subject: name of the text.
        """
        return NestedTooDeep(
            f"{subject} has more than {self.max_json_depth} levels of objects and lists, the limit of {MAX_JSON_DEPTH}:"
            f" send flatter data, or raise {MAX_JSON_DEPTH}"
        )

    def decode(self, text: Any) -> Any:
        """Decode the JSON text of a message.

        :raises kser.errors.LimitExceeded: the text or the message in it exceeds a limit.
        :raises ValueError: the text is not JSON.
        :raises TypeError: ``text`` is neither text nor bytes.
        """
        if type(text) is not str and type(text) is not bytes:
            text = _plain(text)
        if len(text) > self.max_value_bytes:
            self.check_value(text)
        try:
            data = json.loads(text)
        except RecursionError:
            raise self.too_deep("the message") from None
        if type(data) is dict:
            uuid, metadata = data.get("uuid"), data.get("metadata")
            try:
                if (type(uuid) is str and len(uuid) > self.max_uuid_length) or (
                    type(metadata) is dict and len(metadata) > self.max_metadata_keys
                ):
                    self.check_message(uuid, metadata)
                if _may_exceed(text, self.max_json_depth):
                    self.check_depth(data.values())
            except LimitExceeded as error:
                error.received = uuid, data.get("entrypoint")
                raise
        return data

    def check_message(self, uuid: Any, metadata: Any) -> None:
        """Check the length of the uuid and the number of metadata keys of a message.

        :raises kser.errors.UuidTooLong: the uuid has more than ``max_uuid_length`` characters.
        :raises kser.errors.TooManyMetadataKeys: there are more than ``max_metadata_keys`` keys.
        """
        if type(uuid) is str and len(uuid) > self.max_uuid_length:
            raise UuidTooLong(
                f"the uuid {uuid[:40]!r}… has {len(uuid):,} characters, and {MAX_UUID_LENGTH} allows"
                f" {self.max_uuid_length:,}: use a shorter uuid, or raise {MAX_UUID_LENGTH}"
            )
        if type(metadata) is dict and len(metadata) > self.max_metadata_keys:
            raise TooManyMetadataKeys(
                f"the metadata have {len(metadata):,} keys, and {MAX_METADATA_KEYS} allows"
                f" {self.max_metadata_keys:,}: put the data into params, or raise {MAX_METADATA_KEYS}"
            )


#: The limits of the consumer that runs in this context; None stands for the limits of the environment.
_current: ContextVar[Limits | None] = ContextVar("kser_limits", default=None)


@functools.cache
def environment_limits() -> Limits:
    """Return the limits of the environment, which is read at the first call."""
    return Limits.from_settings(Settings())


def limits_of(app: Any) -> Limits | None:
    """Return the limits in the config of a Flask application; None if there is no app, so that other limits may apply.

    :raises kser.errors.SettingError: a limit in the config or in the environment is not a whole number above 0.
    """
    return Limits.from_settings(Settings.of(app)) if app is not None else environment_limits() and None


def current_limits() -> Limits:
    """Return the limits that apply in this context: those of the consumer that runs here, else of the environment."""
    return _current.get() or environment_limits()


@contextmanager
def applied(limits: Limits) -> Iterator[None]:
    """Return a context manager inside which ``limits`` apply."""
    token = _current.set(limits)
    try:
        yield
    finally:
        _current.reset(token)


def header_bytes(headers: Collection[tuple[str, bytes | None]]) -> int:
    """Return the size of the names and values of headers in bytes; a character of a name counts as one byte."""
    size = 0
    for name, value in headers:
        size += len(name) + len(value) if value else len(name)
    return size


def _may_exceed(text: str | bytes, depth: int) -> bool:
    """Return whether a JSON text of an object may have more than ``depth`` levels. False is certain, and found fast."""
    # Count the opening brackets and braces, those in strings included, because each level has one of them. Most short
    # texts need no count: without a bracket, each level is an object of at least 5 characters, such as {"":1}.
    if type(text) is str:
        return ("[" in text or len(text) > 5 * depth) and text.count("{") + text.count("[") > depth
    return (b"[" in text or len(text) > 5 * depth) and text.count(b"{") + text.count(b"[") > depth  # type: ignore[arg-type]


def _plain(text: Any) -> str | bytes:
    """Return text or bytes of another class as a str or bytes.

    :raises TypeError: ``text`` is neither text nor bytes.
    """
    if not isinstance(text, _TEXT):
        raise TypeError(f"the JSON object must be str, bytes or bytearray, not {type(text).__name__}")
    return str(text) if isinstance(text, str) else bytes(text)
