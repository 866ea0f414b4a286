# cdumay-result 0.1.12 has annotations but no py.typed, so type checkers ignore them without these stubs.
from typing import Any, Self

from cdumay_error import Error
from marshmallow import Schema, fields

def random_uuid() -> str: ...

class ResultSchema(Schema):
    class Meta:
        unknown: str

    uuid: fields.String
    retcode: fields.Integer
    stdout: fields.String
    stderr: fields.String
    retval: fields.Dict

class Result:
    retcode: int
    stdout: str
    stderr: str
    retval: dict[str, Any]
    uuid: str

    def __init__(
        self,
        retcode: int = 0,
        stdout: str = "",
        stderr: str = "",
        retval: dict[str, Any] | None = None,
        uuid: str | None = None,
    ) -> None: ...
    def print(self, data: Any) -> None: ...
    def print_err(self, data: Any) -> None: ...
    @staticmethod
    def from_exception(exc: BaseException, uuid: str | None = None) -> Result: ...
    @staticmethod
    def from_error(error: Error) -> Result: ...
    def search_value(self, xpath: str, default: Any = None, fail_if_no_match: bool | None = False) -> Any: ...

    # "+" changes the left operand and returns it, so "+=" does the same.
    def __add__(self, o: Result) -> Self: ...
