"""The logger of a consumer."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from kser.escaping import escape_lines


class ConsumerLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose lines begin with the name of the consumer's class. Control characters in the lines are escaped.

    :param logger: the logger of the transport's module.
    :param consumer: the name of the consumer's class.
    """

    def __init__(self, logger: logging.Logger, consumer: str) -> None:
        super().__init__(escape_lines(logger))
        self._consumer = consumer

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{self._consumer}: {msg}", kwargs
