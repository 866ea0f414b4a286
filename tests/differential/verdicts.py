"""Server of verdicts: whether a package accepts an input, and the output. Runs under both packages.

The parent writes a line of JSON, a list of [kind, input in base64], and gets a line with the list of verdicts.
"""

from __future__ import annotations

import base64
import json
import sys
import uuid
from collections.abc import Callable
from typing import Any

# New uuids are the same on both sides. Done before anybody imports the function.
uuid.uuid4 = lambda: uuid.UUID("99999999-9999-4999-8999-999999999999")

from kser.schemas import Message  # noqa: E402


def load_bytes(raw: bytes) -> Message:
    """The input as it comes from Kafka."""
    return Message.loads(raw)


def load_text(raw: bytes) -> Message:
    """The input as the consumer hands it on; what is not UTF-8 becomes lone surrogates."""
    return Message.loads(raw.decode("utf-8", "surrogateescape"))


def build(raw: bytes) -> Message:
    """The input is a JSON list of the arguments of the constructor."""
    return Message(*json.loads(raw))


KINDS: dict[str, Callable[[bytes], Message]] = {"load_bytes": load_bytes, "load_text": load_text, "build": build}


def verdict(kind: str, raw: bytes) -> dict[str, Any]:
    """What came of an input: the dumped message, or the type of the error and what it carries."""
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
    """Whether what was written is read to the same: what one consumer sends, another one takes."""
    try:
        return Message.loads(dumped).dumps() == dumped
    except Exception as error:
        return type(error).__name__


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        answers = [verdict(kind, base64.b64decode(raw)) for kind, raw in json.loads(line)]
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
