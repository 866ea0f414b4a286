"""Message and its wire format, which is the JSON in the value of a record.

:data:`MESSAGE` and :data:`RESULT` declare the format once, and this module generates the marshmallow schemas from the
declaration. ``_fast_load`` and ``_fast_dump`` also follow the declaration, and are faster than marshmallow, but handle
only values of the declared types. The schemas handle all other values: they accept, convert or reject each value.

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

from kser.limits import current_limits


class WireField(NamedTuple):
    """Declaration of one key of the wire format."""

    name: str
    kind: type
    required: bool = False
    #: True if loading accepts ``null`` and treats it like a missing key.
    nullable: bool = False
    #: Value to dump if the object has no attribute of this name; with None, the dump omits the key.
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

#: Metadata key of a message that is a step of a stored operation; the value is the uuid of the operation. kser reserves
#: all metadata keys that begin with ``kser.``.
OPERATION_KEY = "kser.operation"
#: Metadata key of a stored operation whose params were changed by user code; the value is the JSON of the params in the
#: original message.
ORIGINAL_PARAMS_KEY = "kser.given"

_MISSING = object()

#: Name, type, ``required`` and ``nullable`` of each field. Python unpacks plain tuples faster than named tuples.
_FieldTuple = tuple[str, type, bool, bool]
_MESSAGE_FIELDS: tuple[_FieldTuple, ...] = tuple((*field[:4],) for field in MESSAGE)
_RESULT_FIELDS: tuple[_FieldTuple, ...] = tuple((*field[:4],) for field in RESULT)


class _WireSchema(Schema):
    # Keep the keys in the declared order, because marshmallow before about 3.20 does not keep the order by itself.
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
    """Schema of a :class:`Message`: the keys of :class:`BaseSchema`, and the keys ``result`` and ``metadata``."""


def _fast_load(data: Any, declaration: tuple[_FieldTuple, ...] = _MESSAGE_FIELDS) -> dict[str, Any] | None:
    """Return the declared keys of ``data`` with their values, or None if a value needs the marshmallow schema."""
    if type(data) is not dict:
        return None
    values = {}
    for name, kind, required, nullable in declaration:
        value = data.get(name, _MISSING)
        if type(value) is kind:
            values[name] = value
        elif kind is Result and type(value) is dict:
            values[name] = _fast_load(value, _RESULT_FIELDS)
            if values[name] is None:
                return None
        elif not (value is _MISSING and not required) and not (value is None and nullable):
            return None
    return values


def _fast_dump(source: Any, declaration: tuple[_FieldTuple, ...] = _MESSAGE_FIELDS) -> dict[str, Any] | None:
    """Return the declared attributes of ``source`` as a dict, or None if a value needs the marshmallow schema."""
    values = vars(source)
    data: dict[str, Any] = {}
    for name, kind, _, _ in declaration:
        value = values.get(name)
        if type(value) is not kind:
            return None
        if kind is Result:
            value = _fast_dump(value, _RESULT_FIELDS)
            if value is None:
                return None
        data[name] = value
    return data


class Base:
    """Message without result and metadata: the base of :class:`Message` and of message classes of third parties.

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
        """Return the message as a dict with shallow copies of ``params``, ``metadata`` and ``retval``.

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
    :param result: the forwarded result of a previous task: a Result, or a mapping of the arguments of a Result.
    :param metadata: data of the user, which kser stores in the message unchanged.
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
        :raises kser.errors.LimitExceeded: the message exceeds a limit; see :mod:`kser.limits`.
        :raises cdumay_error.types.ValidationError: ``json_data`` is JSON, but not a message; ``extra`` contains the
            reasons for each field.
        """
        data = current_limits().decode(json_data)
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


#: The only schema that ``_fast_load`` and ``_fast_dump`` can replace. A message class with another schema always uses
#: that schema.
_DEFAULT_SCHEMA = Message.MARSHMALLOW_SCHEMA


def dump_result(result: Result | None) -> dict[str, Any]:
    """Return a result as a dict with a shallow copy of ``retval``. For None, return an empty dict."""
    if not result:
        return {}
    data = _fast_dump(result, _RESULT_FIELDS)
    if data is None:
        return ResultSchema().dump(result)  # type: ignore[no-any-return]
    data["retval"] = dict(data["retval"])
    return data
