"""What kser does with ``cdumay_result.Result`` beyond what that class does by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdumay_result import Result


def merge(result: Result, other: Result | None) -> Result:
    """Merge ``other``, if there is one, into ``result`` as cdumay does (``result`` is changed), and return it."""
    return result + other if other else result


def copy_result(result: Result, uuid: str | None = None) -> Result:
    """A Result that can be merged into without touching ``result``; values inside ``retval`` are shared.

    :param uuid: identity of the copy, ``result``'s by default.
    """
    return Result(
        uuid=uuid or result.uuid,
        retcode=result.retcode,
        stdout=result.stdout,
        stderr=result.stderr,
        retval=dict(result.retval),
    )


def failure(exc: BaseException, uuid: str) -> Result:
    """A failed Result of ``exc``; its uuid is ``uuid``, also where cdumay would take another one."""
    result = Result.from_exception(exc, uuid=uuid)
    result.uuid = uuid
    return result


def error_of(result: Result) -> Any:
    """What ``search_value("error")`` of a Result finds; that one makes a parser each time, in 25 ms."""
    return result.retval.get("error") if isinstance(result.retval, Mapping) else None
