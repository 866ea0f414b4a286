"""Log lines of entrypoints: the texts and ``extra`` keys that 0.8.27 published.

These are functions and not methods of Entrypoint, because a new method could have the same name as an attribute of a
user's class.
"""

from __future__ import annotations

import logging
from typing import Any

from cdumay_result import Result

from kser.results import error_dict
from kser.schemas import Message, dump_result


def log_prefix(entry: Any, tag: str) -> str:
    """Return ``Name.Tag: path[uuid]``, the prefix of each log line about an entrypoint."""
    return f"{type(entry).__name__}.{tag}: {type(entry).path}[{entry.uuid}]"


def dump_entry(entry: Any) -> dict[str, Any]:
    """Return the message of an entrypoint as a dict with a blank result, for the ``extra`` of a log record."""
    uuid, path, params, metadata = entry.uuid, type(entry).path, entry.params, entry.metadata
    if uuid and type(uuid) is type(path) is str and type(params) is type(metadata) is dict:
        # The result is the same as below, in a third of the time.
        result = {"uuid": uuid, "retcode": 0, "stdout": "", "stderr": "", "retval": {}}
        return {"uuid": uuid, "entrypoint": path, "params": {**params}, "result": result, "metadata": {**metadata}}
    return Message(uuid=uuid, entrypoint=path, params=params, metadata=metadata).dump()


def log_step(
    logger: logging.Logger, entry: Any, tag: str, text: str = "", *values: Any, level: int = logging.DEBUG
) -> None:
    """Log the phase of the life cycle that an entrypoint has reached.

    :param text: text after the prefix. ``values`` are formatted into the text only if the level is enabled.
    """
    if logger.isEnabledFor(level):
        logger.log(level, f"{log_prefix(entry, tag)}{text % values}", extra={"kmsg": dump_entry(entry)})


def log_success(logger: logging.Logger, entry: Any, result: Result | None) -> None:
    """Log the success of an entrypoint at INFO."""
    if logger.isEnabledFor(logging.INFO):
        extra = {"kmsg": dump_entry(entry), "kresult": dump_result(result)}
        logger.info(f"{log_prefix(entry, 'Success')}: {result}", extra=extra)


def log_failure(logger: logging.Logger, entry: Any) -> None:
    """Log the failure of an entrypoint at ERROR."""
    if logger.isEnabledFor(logging.ERROR):
        extra = {"kmsg": dump_entry(entry), "kresult": dump_result(entry.result)}
        error = error_dict(entry.result)
        if error:
            extra["error"] = error
        logger.error(f"{log_prefix(entry, 'Failed')}: {entry.result}", extra=extra)


def log_retry(logger: logging.Logger, entry: Any, attempt: int, seconds: float) -> None:
    """Log, at WARNING, a failed attempt that will be retried."""
    if logger.isEnabledFor(logging.WARNING):
        extra = {"kmsg": dump_entry(entry), "kresult": dump_result(entry.result)}
        outcome = f"attempt {attempt} failed, the next follows in {seconds:.3g} s: {entry.result}"
        text = f"{log_prefix(entry, 'Retry')}: {outcome}"
        logger.warning(text, extra=extra)


def log_message(logger: logging.Logger, entry: Any, tag: str, text: str, level: int, *args: Any, **kwargs: Any) -> None:
    """Log a text of the user after the prefix of the entrypoint."""
    prefix = f"{log_prefix(entry, tag)}: "
    # Escape % only if there are arguments, because logging does not format a text without arguments.
    logger.log(level, f"{prefix.replace('%', '%%') if args else prefix}{text}", *args, **kwargs)
