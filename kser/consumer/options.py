"""Options of a consumer: arguments, each with a setting of its name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict

from kser.config import Settings
from kser.consumer.dispatch import ORDERINGS
from kser.errors import SettingError, UsageError
from kser.retry import Retry

AFTER, BEFORE, NEVER = COMMIT_MODES = ("after", "before", "never")

#: Words for where a group begins that has committed nothing, in Kafka's clients.
_RESETS = {
    **dict.fromkeys(("earliest", "smallest", "beginning"), "earliest"),
    **dict.fromkeys(("latest", "largest", "end"), "latest"),
    **dict.fromkeys(("none", "error"), "none"),
}

_CHOICES = {"ordering": ORDERINGS, "commit": COMMIT_MODES}
_LOWEST: Mapping[str, float] = {"workers": 1, "max_in_flight": 1, "max_buffered_bytes": 1}


class Given(TypedDict, total=False):
    """The options as arguments; None is as if not given."""

    workers: int | None
    ordering: str | None
    commit: str | None
    retry: Retry | None
    dead_letter: bool | str | None
    shutdown_timeout: float | None
    revoke_timeout: float | None
    max_in_flight: int | None
    max_buffered_bytes: int | None
    stall_timeout: float | None


@dataclass(frozen=True)
class ConsumerOptions:
    """How a consumer works. Each option is an argument of it, or the setting ``KSER_<NAME>``.

    :param workers: how many messages are handled at once: 1 in the main thread, more in a thread each.
    :param ordering: ``"key"``: messages of a partition with the same key neither overlap nor overtake each other;
        ``"partition"``: no messages of a partition do; ``"none"``: any may.
    :param commit: ``"after"`` a message is done, ``"before"`` it is handled, as kser 0.8 did, or ``"never"``.
    :param retry: the retry policy for classes that declare none.
    :param dead_letter: the topic for messages that failed for good; True for ``<their topic>.dlq``.
    :param shutdown_timeout: seconds that running messages are given when the consumer ends.
    :param revoke_timeout: seconds that they are given when their partition goes to another consumer, at most a third
        of the client's longest time between polls.
    :param max_in_flight: messages that are held here unfinished.
    :param max_buffered_bytes: bytes of their keys and values.
    :param stall_timeout: seconds without progress after which a consumer that lags behind says so.
    """

    workers: int = 1
    ordering: str = "key"
    commit: str = AFTER
    retry: Retry | None = None
    dead_letter: str | bool = False
    shutdown_timeout: float = 30
    revoke_timeout: float = 10
    max_in_flight: int = 1000
    max_buffered_bytes: int = 16 << 20
    stall_timeout: float = 300

    @classmethod
    def of(cls, settings: Settings, given: Given) -> Self:
        """The options of ``given``, completed from the settings.

        :raises kser.errors.UsageError: there is no option of that name.
        :raises kser.errors.SettingError: a value makes no sense.
        """
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                nearest = difflib.get_close_matches(name, [*names, "config", "topics", "app"], n=1, cutoff=0)[0]
                raise UsageError(f"a consumer has no option {name!r}; the nearest is {nearest!r}")
        found = {name: _found(name, given.get(name), settings) for name in names}
        return cls(**{name: value for name, value in found.items() if value is not None})

    def dead_letter_topic(self, topic: str) -> str | None:
        """Where messages of ``topic`` go that failed for good; None when they go nowhere."""
        if isinstance(self.dead_letter, str):
            return self.dead_letter
        return f"{topic}.dlq" if self.dead_letter else None

    def describe(self, mode: str, group: str | None, topics: Iterable[str]) -> str:
        """How a consumer with these options works, for its log.

        :param mode: the commit mode in force.
        """
        return (
            f"commit={mode}, workers={self.workers}, ordering={self.ordering}, group={group},"
            f" topics={','.join(topics)}, retry={self.retry},"
            f" dead letters={self.dead_letter_topic('<topic>')}"
        )


def reset_policy(option: str, value: Any, default: str) -> str:
    """Where a group begins that has committed nothing: ``earliest``, ``latest``, or ``none``, which is an error.

    :param option: the client's name for it.
    :param value: what was given, None for nothing.
    :raises kser.errors.SettingError: it is no such word.
    """
    if value is None:
        return default
    if value not in _RESETS:
        raise SettingError(f"{option} must be one of {', '.join(map(repr, _RESETS))}; it is {value!r}")
    return _RESETS[value]


def _found(name: str, given: Any, settings: Settings) -> Any:
    setting = f"KSER_{name.upper()}"
    source = name if given is not None else setting
    value = given if given is not None else settings.get(setting)
    if value is None:
        return None
    if name == "retry":
        return Retry.from_setting(source, _from_json(source, value))
    if name == "dead_letter":
        return _dead_letter(source, value)
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise SettingError(f"{source} must be one of {', '.join(map(repr, _CHOICES[name]))}; it is {value!r}")
        return value
    return _number(source, value, _LOWEST.get(name))


def _number(source: str, value: Any, lowest: float | None) -> float:
    """A number: a whole one from ``lowest`` on, or seconds."""
    kind, least = ("a number of seconds", 0) if lowest is None else ("a whole number", lowest)
    try:
        number = float(value) if lowest is None else int(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not least <= number < float("inf") or (lowest is not None and number != float(value)):
        raise SettingError(f"{source} must be {kind}, {least:g} or more; it is {value!r}")
    return number


def _dead_letter(source: str, value: Any) -> bool | str:
    if isinstance(value, str):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        value = words.get(value.lower(), value)
    if isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise SettingError(f"{source} must be True or the name of a topic; it is {value!r}")


def _from_json(source: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SettingError(f"{source} is not JSON: {error}; it is {value!r}") from error
