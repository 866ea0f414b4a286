"""Functions for ``cdumay_result.Result`` that the class itself does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdumay_result import Result


def merge(result: Result, other: Result | None) -> Result:
    """Merge ``other`` into ``result`` with the operator ``+`` of ``cdumay_result.Result``.

    The operator changes ``result`` in place. If ``other`` is None, change nothing.

    :return: ``result``.
    """
    return result + other if other else result


def copy_result(result: Result, uuid: str | None = None) -> Result:
    """Copy a Result, so that a merge into the copy leaves ``result`` unchanged; values inside ``retval`` are shared.

    :param uuid: uuid of the copy; by default, the uuid of ``result``.
    """
    return Result(
        uuid=uuid or result.uuid,
        retcode=result.retcode,
        stdout=result.stdout,
        stderr=result.stderr,
        retval=dict(result.retval),
    )


def failed_result(exc: BaseException, uuid: str) -> Result:
    """Return a failed Result for ``exc``.

    :param uuid: uuid of the Result. This function sets it even if ``exc.extra`` contains another uuid, which cdumay
        would use.
    """
    result = Result.from_exception(exc, uuid=uuid)
    result.uuid = uuid
    return result


def error_dict(result: Result) -> Any:
    """Return the error in a Result, as ``search_value("error")`` does.

    This function exists because ``search_value`` takes 25 ms: it builds a parser at each call.
    """
    return result.retval.get("error") if isinstance(result.retval, Mapping) else None
