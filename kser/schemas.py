"""Message: the wire format, declared once.

:data:`MESSAGE` and :data:`RESULT` are the declaration. The marshmallow schemas are made from it, and so are the direct
reader and writer, which handle what is already of the declared types; everything else is for the schemas to accept,
convert or refuse. Drop-in for ``kser.schemas`` of 0.8.27.
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
    """One key of the wire format."""

    name: str
    kind: type
    required: bool = False
    #: ``null`` is accepted when reading, and means that the key is absent.
    nullable: bool = False
    #: Written when the object has no such attribute; ``None`` leaves the key out.
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

#: In a message's metadata: the uuid of the stored operation that it is a step of. Keys that begin with ``kser.`` are
#: reserved.
OPERATION = "kser.operation"
#: In a stored operation's metadata: JSON of the params that its message came with, if its code has changed them.
GIVEN = "kser.given"

_MISSING = object()


class _WireSchema(Schema):
    # The order of the wire; marshmallow before 3.20 or so has none by itself.
    set_class = OrderedSet

    class Meta:
        unknown = EXCLUDE


def _marshmallow_field(field: WireField) -> fields.Field:
    options: dict[str, Any] = {"required": field.required, "allow_none": field.nullable}
    if field.default is not None:
        # A callable, so that no two dumps share one dict.
        options["dump_default"] = (lambda: {}) if field.default == {} else field.default
    if field.kind is Result:
        return fields.Nested(ResultSchema, load_default=None, **options)
    kinds: dict[type, type[fields.Field]] = {str: fields.String, int: fields.Integer, dict: fields.Dict}
    return kinds[field.kind](**options)


def _marshmallow_fields(declaration: tuple[WireField, ...]) -> dict[str, Any]:
    return {field.name: _marshmallow_field(field) for field in declaration}


ResultSchema = _WireSchema.from_dict(_marshmallow_fields(RESULT), name="ResultSchema")


class BaseSchema(_WireSchema.from_dict(_marshmallow_fields(BASE))):  # type: ignore[misc]  # a class made at run time
    """What every message has: ``uuid``, ``entrypoint``, ``params``."""


class MessageSchema(BaseSchema.from_dict(_marshmallow_fields(MESSAGE[len(BASE) :]))):  # type: ignore[misc]
    """A :class:`Message`: :class:`BaseSchema`, ``result`` and ``metadata``."""


def _read(data: Any, declaration: tuple[WireField, ...] = MESSAGE) -> dict[str, Any] | None:
    """The declared keys of ``data``, or None when the schema has to look at it."""
    if type(data) is not dict:
        return None
    values = {}
    for name, kind, required, nullable, _ in declaration:
        value = data.get(name, _MISSING)
        if type(value) is kind:
            values[name] = value
        elif kind is Result and type(value) is dict:
            values[name] = _read(value, RESULT)
            if values[name] is None:
                return None
        elif not (value is _MISSING and not required) and not (value is None and nullable):
            return None
    return values


def _write(source: Any, declaration: tuple[WireField, ...] = MESSAGE) -> dict[str, Any] | None:
    """What to dump of ``source``, or None when the schema has to look at it."""
    values = vars(source)
    data: dict[str, Any] = {}
    for name, kind, *_ in declaration:
        value = values.get(name)
        if type(value) is not kind:
            return None
        if kind is Result:
            value = _write(value, RESULT)
            if value is None:
                return None
        data[name] = value
    return data


class Base:
    """A message without result: the part that :class:`Message` and messages of third parties share.

    :param uuid: identifier of the work that is asked for.
    :param entrypoint: path (``module.ClassName``) of the class that does it.
    :param params: its parameters.
    """

    MARSHMALLOW_SCHEMA: ClassVar[Schema] = BaseSchema()

    def __init__(self, uuid: str, entrypoint: str, params: Mapping[str, Any] | None = None) -> None:
        self.uuid = uuid
        self.entrypoint = entrypoint
        self.params = params or {}

    def dump(self) -> dict[str, Any]:
        """The message as a dict; ``params``, ``metadata`` and ``retval`` are copied one level deep.

        :raises TypeError: a mapping is expected and something else found.
        """
        return self.MARSHMALLOW_SCHEMA.dump(self)  # type: ignore[no-any-return]

    def dumps(self) -> str:
        """The message as JSON text, all ASCII.

        :raises TypeError: a value has no JSON form.
        """
        return self.MARSHMALLOW_SCHEMA.dumps(self)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return str(self.dump())


class Message(Base):
    """What producers send and consumers execute.

    :param uuid: identifier of the task or operation.
    :param entrypoint: path (``module.ClassName``) of the class to execute.
    :param params: its parameters.
    :param result: the forwarded result of a previous task: a Result, or its arguments as a mapping.
    :param metadata: context that is carried through.
    :raises TypeError: ``result`` is neither.
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
            # A result that says nothing of its identity is the message's own.
            result.uuid = arguments.get("uuid") or uuid
        self.result = result
        self.metadata = metadata or {}

    @classmethod
    def loads(cls, json_data: str | bytes | bytearray) -> Self:
        """Read a message from JSON.

        :raises ValueError: not JSON (``json.JSONDecodeError``), or undecodable bytes (``UnicodeDecodeError``).
        :raises TypeError: neither text nor bytes.
        :raises cdumay_error.types.ValidationError: JSON, but no message; ``extra`` has the reasons by field.
        """
        data = json.loads(json_data)
        values = _read(data) if cls.MARSHMALLOW_SCHEMA is _OWN_SCHEMA else None
        if values is None:
            try:
                values = cls.MARSHMALLOW_SCHEMA.load(data)
            except MarshmallowError as error:
                raise ValidationError("Failed to load message", extra=dict(error.normalized_messages())) from error  # type: ignore[no-untyped-call]
            if isinstance(values.get("result"), dict):
                values["result"] = {key: value for key, value in values["result"].items() if value is not None}
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        data = _write(self) if self.MARSHMALLOW_SCHEMA is _OWN_SCHEMA else None
        if data is None:
            return super().dump()
        for holder, key in ((data, "params"), (data, "metadata"), (data["result"], "retval")):
            holder[key] = dict(holder[key])
        return data

    def dumps(self) -> str:
        data = _write(self) if self.MARSHMALLOW_SCHEMA is _OWN_SCHEMA else None
        return super().dumps() if data is None else json.dumps(data)

    def __repr__(self) -> str:
        return f"Message<uuid='{self.uuid}', entrypoint='{self.entrypoint}', result={self.result}>"


#: The direct reader and writer stand in for this schema alone; a class with another one goes through its own.
_OWN_SCHEMA = Message.MARSHMALLOW_SCHEMA


def dump_result(result: Result | None) -> dict[str, Any]:
    """A result as a dict, ``retval`` copied one level deep; empty without one."""
    if not result:
        return {}
    data = _write(result, RESULT)
    if data is None:
        return ResultSchema().dump(result)  # type: ignore[no-any-return]
    data["retval"] = dict(data["retval"])
    return data
