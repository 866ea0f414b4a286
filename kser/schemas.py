"""Message and its wire format, declared once.

:data:`MESSAGE` and :data:`RESULT` declare the format. The marshmallow schemas are generated from this declaration. The
fast load and the fast dump follow the declaration too, but handle only values of the declared types. All other values
are left to the schemas, which accept, convert or reject them.

This module is a drop-in replacement for ``kser.schemas`` of 0.8.27.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from cdumay_error.types import ValidationError
from cdumay_result import Result
from marshmallow import EXCLUDE, Schema, fields
from marshmallow import ValidationError as MarshmallowError
from marshmallow.orderedset import OrderedSet


class WireField(NamedTuple):
    """A key of the wire format."""

    name: str
    kind: type
    required: bool = False
    #: True if loading accepts ``null`` and treats it like a missing key.
    nullable: bool = False
    #: Value to dump when the object has no such attribute; ``None`` omits the key.
    default: Any = None


RESULT = (
    WireField("uuid", str, nullable=True),
    WireField("retcode", int, nullable=True, default=0),
    WireField("stdout", str, nullable=True, default=""),
    WireField("stderr", str, nullable=True, default=""),
    WireField("retval", dict, nullable=True),
)

BASE = (
    WireField("uuid", str, required=True),
    WireField("entrypoint", str, required=True),
    WireField("params", dict, default={}),
)

MESSAGE = (*BASE, WireField("result", Result, nullable=True), WireField("metadata", dict))

#: Metadata key of a message: the uuid of the stored operation that the message is a step of. Keys that begin with
#: ``kser.`` are reserved.
OPERATION_KEY = "kser.operation"
#: Metadata key of a stored operation: JSON of the original message's params, if user code has changed them.
ORIGINAL_PARAMS_KEY = "kser.given"

_MISSING = object()


class _WireSchema(Schema):
    # Keep the order of the wire format here, because marshmallow before 3.20 or so does not keep it by itself.
    set_class = OrderedSet

    class Meta:
        unknown = EXCLUDE


def _marshmallow_field(field: WireField) -> fields.Field:
    options: dict[str, Any] = {"required": field.required, "allow_none": field.nullable}
    if field.default is not None:
        # Use a callable, so that no two dumps share one dict.
        options["dump_default"] = (lambda: {}) if field.default == {} else field.default
    if field.kind is Result:
        return fields.Nested(ResultSchema, load_default=None, **options)
    kinds: dict[type, type[fields.Field]] = {str: fields.String, int: fields.Integer, dict: fields.Dict}
    return kinds[field.kind](**options)


def _marshmallow_fields(declaration: tuple[WireField, ...]) -> dict[str, Any]:
    return {field.name: _marshmallow_field(field) for field in declaration}


ResultSchema = _WireSchema.from_dict(_marshmallow_fields(RESULT), name="ResultSchema")


class BaseSchema(_WireSchema.from_dict(_marshmallow_fields(BASE))):  # type: ignore[misc]  # a class made at run time
    """Schema of the keys that every message has: ``uuid``, ``entrypoint``, ``params``."""


class MessageSchema(BaseSchema.from_dict(_marshmallow_fields(MESSAGE[len(BASE) :]))):  # type: ignore[misc]
    """Schema of a :class:`Message`: :class:`BaseSchema`, ``result`` and ``metadata``."""


def _fast_load(data: Any, declaration: tuple[WireField, ...] = MESSAGE) -> dict[str, Any] | None:
    """Return the declared keys of ``data``, or None if the schema must load it."""
    if type(data) is not dict:
        return None
    values = {}
    for name, kind, required, nullable, _ in declaration:
        value = data.get(name, _MISSING)
        if type(value) is kind:
            values[name] = value
        elif kind is Result and type(value) is dict:
            values[name] = _fast_load(value, RESULT)
            if values[name] is None:
                return None
        elif not (value is _MISSING and not required) and not (value is None and nullable):
            return None
    return values


def _fast_dump(source: Any, declaration: tuple[WireField, ...] = MESSAGE) -> dict[str, Any] | None:
    """Return the declared attributes of ``source``, or None if the schema must dump it."""
    values = vars(source)
    data: dict[str, Any] = {}
    for name, kind, *_ in declaration:
        value = values.get(name)
        if type(value) is not kind:
            return None
        if kind is Result:
            value = _fast_dump(value, RESULT)
            if value is None:
                return None
        data[name] = value
    return data


class Base:
    """Message without a result: the part that :class:`Message` and messages of third parties share.

    :param uuid: identifier of the task or operation.
    :param entrypoint: path (``module.ClassName``) of the class to execute.
    :param params: parameters of the work.
    """

    MARSHMALLOW_SCHEMA: ClassVar[Schema] = BaseSchema()

    def __init__(self, uuid: str, entrypoint: str, params: Mapping[str, Any] | None = None) -> None:
        self.uuid = uuid
        self.entrypoint = entrypoint
        self.params = params or {}

    def dump(self) -> dict[str, Any]:
        """Return the message as a dict; ``params``, ``metadata`` and ``retval`` are copied one level deep.

        :raises TypeError: ``params``, ``metadata`` or ``retval`` is not a mapping.
        """
        return self.MARSHMALLOW_SCHEMA.dump(self)  # type: ignore[no-any-return]

    def dumps(self) -> str:
        """Return the message as JSON text, all ASCII.

        :raises TypeError: a value has no JSON form.
        """
        return self.MARSHMALLOW_SCHEMA.dumps(self)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return str(self.dump())


class Message(Base):
    """Message that producers send and consumers execute.

    :param uuid: identifier of the task or operation.
    :param entrypoint: path (``module.ClassName``) of the class to execute.
    :param params: parameters of the work.
    :param result: the forwarded result of a previous task: a Result, or its arguments as a mapping.
    :param metadata: context that kser passes on unchanged.
    :raises TypeError: ``result`` is neither a Result nor a mapping.
    """

    MARSHMALLOW_SCHEMA: ClassVar[Schema] = MessageSchema()

    def __init__(
        self,
        uuid: str,
        entrypoint: str,
        params: Mapping[str, Any] | None = None,
        result: Result | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(uuid, entrypoint, params)
        if not result:
            result = Result(uuid=uuid)
        elif not isinstance(result, Result):
            arguments, result = result, Result(**result)
            # A result without a uuid gets the uuid of the message.
            result.uuid = arguments.get("uuid") or uuid
        self.result = result
        self.metadata = metadata or {}

    @classmethod
    def loads(cls, json_data: str | bytes | bytearray) -> Self:
        """Load a message from JSON.

        :raises ValueError: ``json_data`` is not JSON (``json.JSONDecodeError``), or contains undecodable bytes
            (``UnicodeDecodeError``).
        :raises TypeError: ``json_data`` is neither text nor bytes.
        :raises cdumay_error.types.ValidationError: ``json_data`` is JSON, but not a message; ``extra`` contains the
            reasons for each field.
        """
        data = json.loads(json_data)
        values = _fast_load(data) if cls.MARSHMALLOW_SCHEMA is _DEFAULT_SCHEMA else None
        if values is None:
            try:
                values = cls.MARSHMALLOW_SCHEMA.load(data)
            except MarshmallowError as error:
                raise ValidationError("Failed to load message", extra=dict(error.normalized_messages())) from error  # type: ignore[no-untyped-call]
            if isinstance(values.get("result"), dict):
                values["result"] = {key: value for key, value in values["result"].items() if value is not None}
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        data = _fast_dump(self) if self.MARSHMALLOW_SCHEMA is _DEFAULT_SCHEMA else None
        if data is None:
            return super().dump()
        for holder, key in ((data, "params"), (data, "metadata"), (data["result"], "retval")):
            holder[key] = dict(holder[key])
        return data

    def dumps(self) -> str:
        data = _fast_dump(self) if self.MARSHMALLOW_SCHEMA is _DEFAULT_SCHEMA else None
        return super().dumps() if data is None else json.dumps(data)

    def __repr__(self) -> str:
        return f"Message<uuid='{self.uuid}', entrypoint='{self.entrypoint}', result={self.result}>"


#: The fast load and the fast dump replace only this schema. A class with another schema uses its own schema.
_DEFAULT_SCHEMA = Message.MARSHMALLOW_SCHEMA


def dump_result(result: Result | None) -> dict[str, Any]:
    """Return a result as a dict, with ``retval`` copied one level deep. For None, return an empty dict."""
    if not result:
        return {}
    data = _fast_dump(result, RESULT)
    if data is None:
        return ResultSchema().dump(result)  # type: ignore[no-any-return]
    data["retval"] = dict(data["retval"])
    return data
