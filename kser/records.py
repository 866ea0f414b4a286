"""How entrypoints show up in logs: the texts and ``extra`` keys that 0.8.27 published.

Functions rather than methods: the classes of users share one name space with every method that an entrypoint has.
"""

from __future__ import annotations

import logging
from typing import Any

from cdumay_result import Result

from kser.results import error_of
from kser.schemas import Message, dump_result


def line(entry: Any, tag: str) -> str:
    """``Name.Tag: path[uuid]``: how each line about an object begins."""
    return f"{type(entry).__name__}.{tag}: {type(entry).path}[{entry.uuid}]"


def dump_entry(entry: Any) -> dict[str, Any]:
    """What log records show of an object: its message with a blank result."""
    return Message(uuid=entry.uuid, entrypoint=type(entry).path, params=entry.params, metadata=entry.metadata).dump()


def step(
    logger: logging.Logger, entry: Any, tag: str, text: str = "", *values: Any, level: int = logging.DEBUG
) -> None:
    """Log that an object has come to a step of its life cycle.

    :param text: what follows the beginning of the line; ``values`` are put into it, and only when somebody looks.
    """
    if logger.isEnabledFor(level):
        logger.log(level, f"{line(entry, tag)}{text % values}", extra={"kmsg": dump_entry(entry)})


def success(logger: logging.Logger, entry: Any, result: Result | None) -> None:
    """Log at INFO how an object ended."""
    if logger.isEnabledFor(logging.INFO):
        extra = {"kmsg": dump_entry(entry), "kresult": dump_result(result)}
        logger.info(f"{line(entry, 'Success')}: {result}", extra=extra)


def failure(logger: logging.Logger, entry: Any) -> None:
    """Log at ERROR how an object failed."""
    if logger.isEnabledFor(logging.ERROR):
        extra = {"kmsg": dump_entry(entry), "kresult": dump_result(entry.result)}
        error = error_of(entry.result)
        if error:
            extra["error"] = error
        logger.error(f"{line(entry, 'Failed')}: {entry.result}", extra=extra)


def retry(logger: logging.Logger, entry: Any, attempt: int, seconds: float) -> None:
    """Log at WARNING that another attempt follows the one that failed."""
    if logger.isEnabledFor(logging.WARNING):
        extra = {"kmsg": dump_entry(entry), "kresult": dump_result(entry.result)}
        text = f"{line(entry, 'Retry')}: attempt {attempt} failed, the next follows in {seconds:.3g} s: {entry.result}"
        logger.warning(text, extra=extra)


def message(logger: logging.Logger, entry: Any, tag: str, text: str, level: int, *args: Any, **kwargs: Any) -> None:
    """Log a text of the user's own behind the object's name."""
    prefix = f"{line(entry, tag)}: "
    # Only with arguments does logging look for % in the text.
    logger.log(level, f"{prefix.replace('%', '%%') if args else prefix}{text}", *args, **kwargs)
