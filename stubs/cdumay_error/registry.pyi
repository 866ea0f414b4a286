from collections import OrderedDict
from typing import Any, TypeVar

from cdumay_error import Error

_ErrorType = TypeVar("_ErrorType", bound=type[Error])

class Registry:
    @classmethod
    def register(cls, clazz: _ErrorType) -> _ErrorType: ...
    @classmethod
    def filter_by_status(cls, code: int) -> list[type[Error]]: ...
    @staticmethod
    def error_to_dict(clazz: type[Error]) -> dict[str, Any]: ...
    @classmethod
    def to_list(cls) -> list[dict[str, Any]]: ...
    @classmethod
    def to_dict(cls) -> OrderedDict[str, type[Error]]: ...
    @classmethod
    def craft_error(cls, msgid: str, **kwargs: Any) -> Error: ...
