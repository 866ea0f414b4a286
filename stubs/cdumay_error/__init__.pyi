# cdumay-error 0.2 has annotations but no py.typed, so type checkers ignore them without these stubs. Where an
# annotation is wrong, these stubs describe the behaviour at run time.
from collections.abc import Mapping
from typing import Any, ClassVar

from marshmallow import Schema, fields

class Error(Exception):
    MSGID: ClassVar[str]
    CODE: ClassVar[int]
    MESSAGE: ClassVar[str | None]

    message: str
    code: int
    extra: dict[str, Any]
    stack: str | None
    msgid: str
    name: str

    def __init__(
        self,
        message: str | None = None,
        extra: dict[str, Any] | None = None,
        msgid: str | None = None,
        stack: str | None = None,
        name: str | None = None,
        code: int | None = None,
        **kwargs: Any,
    ) -> None: ...
    def to_json(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...
    # The package annotates this as returning an Error, but it returns the dict that the schema loads.
    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> dict[str, Any]: ...

class ErrorSchema(Schema):
    class Meta:
        unknown: str

    code: fields.Integer
    name: fields.String
    message: fields.String
    msgid: fields.String
    extra: fields.Dict
    stack: fields.String

    @staticmethod
    def class_name(data: Error) -> str: ...

def from_exc(exc: BaseException, extra: dict[str, Any] | None = None) -> Error: ...
