"""Null values in records that kafka-python writes.

The record format of Kafka allows a record that has neither key nor value, and a header without a value. kafka-python
can encode both, but its ``send`` rejects them. This module passes them through the checks of ``send``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kafka.serializer import Serializer

from kser.producer import HeaderList

#: The value to pass to ``send`` for a record without key and value. :class:`NullableValues` turns it into None, after
#: ``send`` has checked that not both are None.
NULL: Final = object()


class NullableValues(Serializer):  # type: ignore[misc]
    """A value serializer that turns :data:`NULL` into None and passes every other value to the user's serializer.

    :param inner: the user's value serializer; None if there is none.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def serialize(self, topic: str, *arguments: Any) -> Any:
        """Return the value as bytes, or None for :data:`NULL`.

        :param arguments: the value in kafka-python 2; the headers and the value in kafka-python 3.
        """
        value = arguments[-1]
        if value is NULL:
            return None
        if self._inner is None:
            return value
        if isinstance(self._inner, Serializer):
            return self._inner.serialize(topic, *arguments)
        return self._inner(value)

    def close(self) -> None:
        """Close the user's serializer."""
        if isinstance(self._inner, Serializer):
            self._inner.close()


def serialized(serializer: Any, topic: str, value: bytes) -> bytes:
    """Return a value as kafka-python would send it in a record without headers.

    :param serializer: the user's value serializer.
    """
    if not isinstance(serializer, Serializer):
        data: bytes = serializer(value)
        return data
    try:
        data = serializer.serialize(topic, [], value)
    except TypeError:
        # The serializer has the parameters of kafka-python 2, which kafka-python 3 accepts too.
        data = serializer.serialize(topic, value)
    return data


class _NullableHeader(tuple[str, bytes | None]):
    """A header that may have no value.

    ``send`` checks ``header[1]``, which is bytes. The encoder unpacks the header, and receives None.
    """

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        return b"" if item is None else item


class _NullableHeaders(list[_NullableHeader]):
    """Headers some of which have no value.

    The list counts as false, because kafka-python adds the lengths of the values of a list that counts as true, and
    None has no length. kafka-python only puts this sum into its delivery report, which kser does not use.
    """

    def __bool__(self) -> bool:
        return False


def nullable(value: Any, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Return the value and the options of ``send`` in a form that ``send`` accepts although parts of them are None.

    :param value: the value of the record; None is a null value.
    :param options: key and headers of the record, from :func:`kser.producer.record_options`.
    """
    headers: HeaderList = options.get("headers", [])
    if any(data is None for _, data in headers):
        options = {**options, "headers": _NullableHeaders(map(_NullableHeader, headers))}
    return (NULL if value is None and "key" not in options else value), options
