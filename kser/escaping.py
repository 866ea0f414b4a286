"""Escaping of control characters in log lines and in the running file.

Messages and tasks choose parts of the text of a log line, for example the uuid or ``stdout``. With a line feed in such
a part, a message could forge a log line. With an escape character, a message could control the terminal that shows the
line.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from typing import Final

#: The characters to escape: C0 and C1 controls, DEL, line and paragraph separator, the controls of the writing
#: direction, and lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

#: Maximum number of characters of a log line. A longer line is shortened in its middle.
MAX_LINE_LENGTH: Final = 20_000

#: Number of characters that are reserved for the mark in the middle of a shortened line.
_MARK_LENGTH = 50

#: Variable that switches the escaping of log lines off.
RAW_VARIABLE: Final = "KSER_LOG_RAW"


def escape(text: str, max_length: int = MAX_LINE_LENGTH) -> str:
    r"""Return ``text`` as one line: control characters are shown as ``\n``, ``\r``, ``\t``, ``\x1b`` or ``\u2028``.

    :param max_length: maximum number of characters. A longer text is shortened in its middle, which then shows the
        number of left out characters.
    """
    # A printable text has no control characters, and this check is faster than a search with the pattern.
    if text.isprintable() and len(text) <= max_length:
        return text
    # Shorten the text before the escaping, which takes time, and after the escaping, which makes the text longer.
    return _shorten(_CONTROLS.sub(_escape_character, _shorten(text, max_length)), max_length)


def escape_lines(logger: logging.Logger) -> logging.Logger:
    """Make a logger escape the texts and the tracebacks of its records, and return the logger.

    Attributes that ``extra`` adds to a record stay unchanged, because they are data and not text. The environment
    variable ``KSER_LOG_RAW=yes`` switches the escaping off.
    """
    # ``addFilter`` adds the same filter only once.
    logger.addFilter(_LINE_FILTER)
    return logger


def _shorten(text: str, max_length: int) -> str:
    if len(text) <= max_length:
        return text
    tail = max_length // 4
    head = max_length - tail - _MARK_LENGTH
    return f"{text[:head]}[{len(text) - head - tail:,} characters left out]{text[-tail:]}"


def _escape_character(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _is_raw() -> bool:
    return os.environ.get(RAW_VARIABLE, "").lower() in ("yes", "true", "1")


class _LineFilter(logging.Filter):
    """Filter that lets every record pass, after escaping its text and its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.msg
        if record.args or type(text) is not str:
            try:
                text = record.getMessage()
            except Exception:
                # The handlers report a text that does not fit its arguments.
                return True
        if not (text.isprintable() and len(text) <= MAX_LINE_LENGTH) and not _is_raw():
            record.msg, record.args = escape(text), None
        if record.exc_info and not record.exc_text and not _is_raw():
            record.exc_text = _escaped_traceback(record)
        return True


_LINE_FILTER: Final = _LineFilter()


def _escaped_traceback(record: logging.LogRecord) -> str | None:
    """Return the traceback of a record with escaped exception texts; None if no text needs escaping."""
    kind, exc, trace = record.exc_info or (None, None, None)
    if kind is None or exc is None:
        return None
    pending = [traceback.TracebackException(kind, exc, trace, compact=True)]
    outermost, changed = pending[0], False
    while pending:
        shown = pending.pop()
        pending += [inner for inner in (shown.__cause__, shown.__context__) if inner is not None]
        pending += getattr(shown, "exceptions", None) or []
        # The class has no public attribute for the text of the exception.
        for name in ("_str", "__notes__"):
            text = getattr(shown, name, None)
            escaped = [escape(str(note)) for note in text] if isinstance(text, list) else text and escape(str(text))
            if escaped != text:
                setattr(shown, name, escaped)
                changed = True
    return "".join(outermost.format()).rstrip("\n") if changed else None
