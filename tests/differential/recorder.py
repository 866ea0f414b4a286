"""Recorder of a scenario: it prints calls, values, log records and files, each as one normalised line.

It runs with the published package and with ours, so it imports only the standard library, and uses only names that
both packages have.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

CASE_MARK = "# "

_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n.*\n(?=\S)", re.DOTALL)
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?")
_PORT = re.compile(r"(127\.0\.0\.1|localhost):\d+")
_DURATION = re.compile(r"\b\d+\.\d+ ?(secs|seconds|ms|s)\b")

# The attributes of every LogRecord; other attributes come from `extra`. taskName exists since Python 3.12.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_cases: list[tuple[Callable[[], None], tuple[str, ...]]] = []
_uuids: dict[str, str] = {}


def case(*rows: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function as a case of the scenario that covers rows of rows.txt."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        _cases.append((function, rows))
        return function

    return register


def normalise(text: str) -> str:
    """Replace only the values that vary between two runs of one package.

    Equal uuids stay equal: the first uuid of a case is `<uuid-1>` wherever it occurs.
    """
    text = _TRACEBACK.sub("Traceback (most recent call last):\n<body>\n", text)
    text = _UUID.sub(lambda found: _uuids.setdefault(found.group(), f"<uuid-{len(_uuids) + 1}>"), text)
    for folder in sorted({os.getcwd(), os.environ.get("DIFFERENTIAL_TMP", os.getcwd())}, key=len, reverse=True):
        text = text.replace(folder, "<tmp>")
    text = _TIME.sub("<time>", text)
    text = _PORT.sub(r"\1:<port>", text)
    return _DURATION.sub(r"<duration> \1", text)


def plain(value: Any) -> Any:
    """Return a value for json.dumps, with its strings normalised and other objects described."""
    if isinstance(value, str):
        return normalise(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {k if isinstance(k, int | float | None) else normalise(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return describe(value)


def describe(value: Any) -> str:
    """Return one line for a value, without memory addresses and in a fixed order."""
    if value is None or isinstance(value, str | bytes | bytearray | int | float):
        return repr(normalise(value)) if isinstance(value, str) else normalise(repr(value))
    if isinstance(value, type):
        return f"<class {value.__name__}>"
    if isinstance(value, BaseException):
        return error_text(value)
    if all(hasattr(value, name) for name in ("retcode", "stdout", "stderr", "retval", "uuid")):
        fields = ", ".join(f"{n}={describe(getattr(value, n))}" for n in ("retcode", "stdout", "stderr", "uuid"))
        return f"{type(value).__name__}({fields}, retval={describe(value.retval)})"
    if isinstance(value, Mapping):
        return json.dumps(plain(value), ensure_ascii=True)
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({describe(sorted(value, key=repr))})"
    if isinstance(value, list | tuple):
        inner = ", ".join(describe(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if hasattr(value, "MARSHMALLOW_SCHEMA"):
        return f"{type(value).__name__}({', '.join(f'{k}={describe(v)}' for k, v in vars(value).items())})"
    return f"<{type(value).__name__}>"


def error_text(error: BaseException) -> str:
    """Return type and text of an exception; for an error of cdumay also code, extra and stack."""
    kind = type(error)
    text = f"{kind.__module__}.{kind.__qualname__}: {normalise(str(error))}"
    if hasattr(error, "msgid"):
        stack = getattr(error, "stack", None)
        text += f" (code={error.code} extra={describe(error.extra)} stack={describe(stack)})"
    return text.replace("\n", "\\n")


def emit(line: str) -> None:
    """Print one line of the trace."""
    sys.stdout.write(line.replace("\n", "\\n") + "\n")
    sys.stdout.flush()


def show(label: str, value: Any) -> None:
    """Print a value under a label."""
    if hasattr(value, "retcode") and hasattr(value, "retval") and value.retval:
        described = describe(value)
        emit(f"{label} -> {described.partition(', retval=')[0]})")
        emit(f"    retval {describe(value.retval)}")
        return
    emit(f"{label} -> {describe(value)}")


def call(label: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function and print its value or the exception that it raised; return the value or None."""
    with warned():
        try:
            value = function(*args, **kwargs)
        except BaseException as error:  # Tests compare SystemExit and KeyboardInterrupt too.
            emit(f"{label} !! {error_text(error)}")
            return None
    show(label, value)
    return value


@contextlib.contextmanager
def warned() -> Iterator[None]:
    """Print the deprecation warnings of the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for item in caught:
        source = Path(item.filename)
        # A warning with a stack level names the caller of the package: the scenario or this module.
        if issubclass(item.category, DeprecationWarning) and (
            "kser" in source.parts or source in (Path(__file__), Path(sys.argv[0]))
        ):
            emit(f"warning {item.category.__name__}")


def printed(label: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function, and print the lines that it wrote to standard output and the value that it returned."""
    target = io.StringIO()
    with contextlib.redirect_stdout(target):
        value = function(*args, **kwargs)
    for line in target.getvalue().splitlines():
        emit(f"stdout {describe(line)}")
    show(label, value)


def file(label: str, path: str | os.PathLike[str]) -> None:
    """Print the content of a file, or `absent`."""
    target = Path(path)
    emit(f"file {label}: {describe(target.read_bytes()) if target.exists() else 'absent'}")


class TraceHandler(logging.Handler):
    """A handler that prints every log record of the package: logger, level, text, then one line for each extra key."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record when it is logged, so that the trace shows its order among the calls."""
        emit(f"log {record.name} {record.levelname} {describe(record.getMessage())}")
        for key, value in vars(record).items():
            if key not in _RECORD_FIELDS:
                emit(f"    {key} {describe(value)}")
        if record.exc_info and record.exc_info[1] is not None:
            emit(f"    exc_info {error_text(record.exc_info[1])}")


def main() -> None:
    """Run the cases in their order in the file. A case that raises ends the run, because the scenario is broken."""
    logger = logging.getLogger("kser")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(TraceHandler())
    logger.propagate = False
    for function, _rows in _cases:
        _uuids.clear()
        # Delete the control files of the case before.
        for path in Path(os.environ["LOCK_PATH"]).iterdir():
            path.unlink()
        emit(CASE_MARK + function.__name__)
        function()
