"""The subscription of a consumer: the topics that it reads, as names and as patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Self

from kser.config import is_pattern
from kser.errors import SettingError, UsageError

#: Seconds after which a client looks for new topics that match a pattern. A topic that is created while a consumer runs
#: is consumed after this time at the latest.
PATTERN_INTERVAL = 15.0

#: A regular expression for the internal topics of Kafka, which no pattern matches.
_INTERNAL = r"__"


class Subscription:
    """The topics that a consumer reads.

    An entry that begins with ``^`` is a pattern: a regular expression of Python. A pattern matches each topic whose
    name begins with a match. A pattern matches no internal topic of Kafka (a name that begins with ``__``), and no
    dead-letter topic of the consumer. Every other entry is the name of a topic.

    :param topics: names and patterns.
    :param dead_letters: a regular expression for the dead-letter topics of the consumer, which no pattern matches;
        empty if the consumer writes no dead letters.
    :raises kser.errors.SettingError: a pattern is no valid regular expression.
    :raises kser.errors.UsageError: an entry is not a str.
    """

    def __init__(self, topics: Iterable[str], dead_letters: str = "") -> None:
        self._topics = list(topics)
        for topic in self._topics:
            if not isinstance(topic, str):
                raise UsageError(f"topics must contain names of topics as str; it contains {topic!r}")
        self.names = [topic for topic in self._topics if not is_pattern(topic)]
        self.patterns = [topic for topic in self._topics if is_pattern(topic)]
        #: The regular expression that matches all topics of the subscription; None if it has no pattern.
        self.regex: re.Pattern[str] | None = None
        if self.patterns:
            for pattern in self.patterns:
                _compile(pattern, pattern)
            excluded = rf"(?!(?:{dead_letters})\Z)" if dead_letters else ""
            named = "".join(rf"|{re.escape(name)}\Z" for name in self.names)
            patterns = "|".join(f"(?:{pattern})" for pattern in self.patterns)
            self.regex = _compile(rf"(?!{_INTERNAL}){excluded}(?:{patterns}){named}", ", ".join(self.patterns))

    @classmethod
    def of(cls, topics: Iterable[str]) -> Self:
        """Return ``topics`` if it is a subscription, otherwise a subscription to these topics."""
        return topics if isinstance(topics, cls) else cls(topics)

    def __iter__(self) -> Iterator[str]:
        return iter(self._topics)

    def matching(self, topics: Iterable[str]) -> list[str]:
        """Return the names of the subscription, and those of ``topics`` that match its patterns, sorted."""
        matched = () if self.regex is None else filter(self.regex.match, topics)
        return sorted({*self.names, *matched})

    def unmatched_text(self, servers: str) -> str:
        """Return the text of a log line about patterns that match no topic.

        :param servers: the bootstrap servers.
        """
        return (
            f"the brokers at {servers} have no topic that matches {', '.join(map(repr, self.patterns))}: the consumer"
            " waits for such a topic; patterns match neither internal topics nor the consumer's own dead-letter topics"
        )


def _compile(pattern: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SettingError(
            f"the topic {source!r} begins with '^', so it is a pattern, and it is no valid regular expression: {error};"
            " correct the pattern"
        ) from error
