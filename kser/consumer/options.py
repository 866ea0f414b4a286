"""Options of a consumer. Each option is a constructor argument, and also a setting with the name ``KSER_<NAME>``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypedDict

from kser.config import Settings, check_number, is_topic_name, nearest_name, parse_json, parse_object
from kser.consumer.dead_letters import SUFFIX
from kser.consumer.subscription import Subscription
from kser.consumer.work_queue import ORDERINGS
from kser.errors import SettingError, UsageError
from kser.limits import Limits
from kser.retry import Retry

AFTER, BEFORE, NEVER = COMMIT_MODES = ("after", "before", "never")

#: The reset policies (``auto.offset.reset``) of a group without committed offsets, by their names in Kafka's clients.
_RESETS = {
    **dict.fromkeys(("earliest", "smallest", "beginning"), "earliest"),
    **dict.fromkeys(("latest", "largest", "end"), "latest"),
    **dict.fromkeys(("none", "error"), "none"),
}

#: Seconds that a call of the Kafka client may take in addition to ``revoke_timeout``, if ``client_timeout`` is not set.
CLIENT_RESERVE = 30.0

#: The session timeout of a consumer in milliseconds, if the client's options do not set one.
SESSION_TIMEOUT_MS = 15_000

_CHOICES = {"ordering": ORDERINGS, "commit": COMMIT_MODES}
_COUNTS = ("workers", "max_in_flight", "max_buffered_bytes", "max_starts")


class ConsumerKwargs(TypedDict, total=False):
    """The options as keyword arguments. An argument that is None has the same effect as a missing argument."""

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
    producer_config: Mapping[str, Any] | None
    max_starts: int | None
    client_timeout: float | None


@dataclass(frozen=True)
class ConsumerOptions:
    """The options of a consumer.

    Each option is an argument of the consumer's constructor, or a setting with the name ``KSER_<NAME>``.

    :param workers: the number of messages that run at the same time. If the number is 1, messages run in the main
        thread. Otherwise, each worker has a thread of its own.
    :param ordering: ``"key"``: messages of a partition with the same key run one after another, in order;
        ``"partition"``: all messages of a partition run one after another, in order; ``"none"``: messages run in any
        order.
    :param commit: ``"after"`` commits a message when it is finished; ``"before"`` commits it before it runs, as kser
        0.8 did; ``"never"`` commits nothing.
    :param retry: the retry policy for classes that declare no policy.
    :param dead_letter: the topic for permanently failed messages. True means the name of the message's topic with the
        suffix ``.dlq``; False disables dead letters.
    :param shutdown_timeout: seconds that running messages have to finish when the consumer shuts down.
    :param revoke_timeout: seconds that running messages have to finish when their partition is revoked. The consumer
        reduces a value above a third of ``max.poll.interval.ms`` to that third.
    :param max_in_flight: the maximum number of unfinished messages in the consumer.
    :param max_buffered_bytes: the maximum total size of these unfinished messages: keys, values and headers, in bytes.
    :param stall_timeout: a consumer with lag logs an error if it has finished no message for this number of seconds.
    :param producer_config: client options of the producer with which the consumer writes dead letters and with which
        its tasks send messages. Each option has precedence over the same option of the consumer's client.
    :param max_starts: the number of times that a message starts if its process dies each time, before the consumer
        gives the message up. Counted with ``commit="after"`` only.
    :param client_timeout: the consumer ends if the Kafka client does not return from a call within this number of
        seconds. None means ``revoke_timeout`` plus 30 seconds.
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
    # The options may contain passwords, which must not be part of a printed object.
    producer_config: Mapping[str, Any] | None = field(default=None, repr=False)

    max_starts: int = 20
    client_timeout: float | None = None

    # No option of the constructor and therefore no field: without an annotation, the dataclass ignores this attribute.
    #: The limits of messages, from the settings.
    limits = Limits()

    @classmethod
    def from_settings(cls, settings: Settings, given: ConsumerKwargs) -> Self:
        """Create the options from ``given``; an option that ``given`` does not contain comes from the settings.

        :raises kser.errors.UsageError: ``given`` has an unknown option.
        :raises kser.errors.SettingError: a value is invalid.
        """
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                nearest = nearest_name(name, [*names, "config", "topics", "app"])
                raise UsageError(f"a consumer has no option {name!r}; the nearest is {nearest!r}")
        values = {name: _resolve(name, given.get(name), settings) for name in names}
        options = cls(**{name: value for name, value in values.items() if value is not None})
        if options.client_limit <= options.revoke_timeout:
            raise SettingError(
                f"client_timeout must be longer than revoke_timeout ({options.revoke_timeout:g} s), because the client"
                f" waits for running messages during a rebalance; it is {options.client_limit:g} s"
            )
        object.__setattr__(options, "limits", Limits.from_settings(settings))
        return options

    @property
    def client_limit(self) -> float:
        """The longest duration of one call of the Kafka client, in seconds."""
        return self.revoke_timeout + CLIENT_RESERVE if self.client_timeout is None else self.client_timeout

    def dead_letter_topic(self, topic: str) -> str | None:
        """Return the dead-letter topic for messages of ``topic``; None if dead letters are disabled."""
        if isinstance(self.dead_letter, str):
            return self.dead_letter
        return f"{topic}{SUFFIX}" if self.dead_letter else None

    def subscription(self, topics: Iterable[str]) -> Subscription:
        """Return the subscription to the consumed topics. Its patterns match no dead-letter topic of this consumer.

        :param topics: the consumed topics: names and patterns.
        :raises kser.errors.SettingError: a pattern is invalid, a consumed topic is the dead-letter topic of a consumed
            topic, or the dead-letter topic of a consumed topic has an illegal name.
        """
        own = {True: rf".*{re.escape(SUFFIX)}", False: ""}
        excluded = re.escape(self.dead_letter) if isinstance(self.dead_letter, str) else own[self.dead_letter]
        subscription = Subscription(topics, excluded)
        for name in subscription.names:
            self._check_dead_letter_topic(name, subscription.names)
        return subscription

    def _check_dead_letter_topic(self, topic: str, consumed: Iterable[str]) -> None:
        dead_letter_topic = self.dead_letter_topic(topic)
        if dead_letter_topic is None:
            return
        if dead_letter_topic in consumed:
            raise SettingError(
                f"dead_letter is {self.dead_letter!r}, and {dead_letter_topic!r} is a topic that this consumer reads:"
                " failed messages would loop endlessly; choose another topic"
            )
        if is_topic_name(topic) and not is_topic_name(dead_letter_topic):
            raise SettingError(
                f"the dead-letter topic of {topic!r} would be {dead_letter_topic!r}, which is no legal name of a topic:"
                " set dead_letter to the name of a topic"
            )

    def describe(self, mode: str, group: str | None, topics: Iterable[str]) -> str:
        """Return a summary of the options for the log.

        :param mode: the effective commit mode.
        :param group: the consumer group.
        :param topics: the consumed topics.
        """
        return (
            f"commit={mode}, workers={self.workers}, ordering={self.ordering}, group={group},"
            f" topics={','.join(topics)}, retry={self.retry},"
            f" dead letters={self.dead_letter_topic('<topic>')}"
        )


def default_session(heartbeat_interval: float | None) -> int:
    """Return the session timeout of a client whose options do not set one, in milliseconds.

    :param heartbeat_interval: the interval of the heartbeats in milliseconds, of which a session must contain several;
        None if the options do not set it.
    """
    return max(SESSION_TIMEOUT_MS, 3 * int(heartbeat_interval or 0))


def reset_policy(option: str, value: Any, default: str) -> str:
    """Return the reset policy of a group without committed offsets: ``earliest``, ``latest`` or ``none``.

    With ``none``, a missing committed offset is an error.

    :param option: the client's name for the option.
    :param value: the configured value; None if it is not set.
    :param default: the policy if ``value`` is None.
    :raises kser.errors.SettingError: the value is not a reset policy.
    """
    if value is None:
        return default
    if value not in _RESETS:
        raise SettingError(f"{option} must be one of {', '.join(map(repr, _RESETS))}; it is {value!r}")
    return _RESETS[value]


def _resolve(name: str, given: Any, settings: Settings) -> Any:
    setting = f"KSER_{name.upper()}"
    source = name if given is not None else setting
    value = given if given is not None else settings.get(setting)
    if value is None:
        return None
    if name == "retry":
        return Retry.from_setting(source, parse_json(source, value))
    if name == "dead_letter":
        return _dead_letter(source, value)
    if name == "producer_config":
        return parse_object(source, value)
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise SettingError(f"{source} must be one of {', '.join(map(repr, _CHOICES[name]))}; it is {value!r}")
        return value
    if name in _COUNTS:
        return check_number(source, value, lowest=1, whole=True)
    return check_number(source, value, lowest=0, unit="seconds")


def _dead_letter(source: str, value: Any) -> bool | str:
    if isinstance(value, str):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        value = words.get(value.lower(), value)
    if isinstance(value, bool) or (isinstance(value, str) and is_topic_name(value)):
        return value
    hint = "; a name has 1 to 249 ASCII letters, digits, '.', '_' and '-'" if isinstance(value, str) else ""
    raise SettingError(f"{source} must be True, False or the name of a topic; it is {value!r}{hint}")
