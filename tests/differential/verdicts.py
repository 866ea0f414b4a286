"""Process that reports whether a package accepts inputs, and its output. It runs with both packages.

The parent writes a line of JSON, a list of [kind, input in base64], and reads a line with the list of verdicts.
"""

from __future__ import annotations

import base64
import json
import sys
import uuid
from collections.abc import Callable
from typing import Any

# Both packages must create the same new uuids. They import the function, so replace it before that.
uuid.uuid4 = lambda: uuid.UUID("99999999-9999-4999-8999-999999999999")

from kser.schemas import Message  # noqa: E402


def load_bytes(raw: bytes) -> Message:
    """Load the input as bytes, as Kafka delivers it."""
    return Message.loads(raw)


def load_text(raw: bytes) -> Message:
    """Load the input as text, as the consumer passes it; invalid UTF-8 becomes lone surrogates."""
    return Message.loads(raw.decode("utf-8", "surrogateescape"))


def build(raw: bytes) -> Message:
    """Construct a message; the input is a JSON list of the arguments."""
    return Message(*json.loads(raw))


KINDS: dict[str, Callable[[bytes], Message]] = {"load_bytes": load_bytes, "load_text": load_text, "build": build}


def verdict(kind: str, raw: bytes) -> dict[str, Any]:
    """Return the dumped message for an input, or the type, ``extra`` and text of the error."""
    try:
        message = KINDS[kind](raw)
    except Exception as error:
        return {"refused": type(error).__name__, "extra": getattr(error, "extra", None), "text": str(error)}
    try:
        dumped = message.dumps()
    except Exception as error:
        return {"unwritable": type(error).__name__, "text": str(error)}
    return {"accepted": dumped, "again": _loads_again(dumped)}


def _loads_again(dumped: str) -> bool | str:
    """Return whether a dumped message is loaded and dumped to the same text, or the type of the error."""
    try:
        return Message.loads(dumped).dumps() == dumped
    except Exception as error:
        return type(error).__name__


def main() -> None:
    """Report verdicts until standard input ends."""
    for line in sys.stdin:
        verdicts = [verdict(kind, base64.b64decode(raw)) for kind, raw in json.loads(line)]
        sys.stdout.write(json.dumps(verdicts) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
