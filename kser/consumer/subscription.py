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

#: A reference of a regular expression to a group by its number: \\1, or (?(1)...).
_NUMBERED_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*(?:\\[1-9]|\(\?\([0-9])")


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
        self._compiled = [_compile(pattern, pattern) for pattern in self.patterns]
        self._excluded = rf"(?!{_INTERNAL})" + (rf"(?!(?:{dead_letters})\Z)" if dead_letters else "")
        self._allowed = re.compile(self._excluded)

    @property
    def regex(self) -> re.Pattern[str] | None:
        """One regular expression that matches all topics of the subscription; None if it has no pattern.

        :raises kser.errors.SettingError: the patterns cannot be joined, because they have groups of the same name, or
            because a pattern refers to a group by its number, which the groups of the patterns before it change.
        """
        if not self.patterns:
            return None
        groups = 0
        for pattern, compiled in zip(self.patterns, self._compiled, strict=True):
            if groups and _NUMBERED_REFERENCE.search(pattern):
                raise SettingError(
                    f"the pattern {pattern!r} refers to a group by its number, and another pattern before it has"
                    " groups: name the group, as in (?P<name>...) and (?P=name), or put this pattern first"
                )
            groups += compiled.groups
        named = "".join(rf"|{re.escape(name)}\Z" for name in self.names)
        patterns = "|".join(f"(?:{pattern})" for pattern in self.patterns)
        return _compile(rf"{self._excluded}(?:{patterns}){named}", ", ".join(self.patterns))

    @classmethod
    def of(cls, topics: Iterable[str]) -> Self:
        """Return ``topics`` if it is a subscription, otherwise a subscription to these topics."""
        return topics if isinstance(topics, cls) else cls(topics)

    def __iter__(self) -> Iterator[str]:
        return iter(self._topics)

    def matching(self, topics: Iterable[str]) -> list[str]:
        """Return the names of the subscription, and those of ``topics`` that match its patterns, sorted."""
        return sorted({*self.names, *filter(self._is_matched, topics)})

    def _is_matched(self, topic: str) -> bool:
        return bool(self._allowed.match(topic)) and any(pattern.match(topic) for pattern in self._compiled)

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
