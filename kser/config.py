"""Settings from the Flask app's ``config`` and from the environment.

The order of precedence is: explicit argument, ``config`` of the Flask app, environment variable, default.

======================== ============================================================== ==========================
setting                  value                                                          in the environment
======================== ============================================================== ==========================
``KSER_CONFIG``          options of the Kafka client, for producers and consumers       a JSON object
``KSER_PRODUCER_CONFIG`` options for producers, with precedence over ``KSER_CONFIG``    a JSON object
``KSER_TOPICS``          topics to consume; tasks are sent to the first topic           names, separated by commas
``KSER_DATABASE_URI``    the shared database, which stores the operations               a database URL
======================== ============================================================== ==========================
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import UnionType
from typing import Any, Self

from kser.errors import SettingError, TopicMissing, UsageError

CONFIG = "KSER_CONFIG"
PRODUCER_CONFIG = "KSER_PRODUCER_CONFIG"
TOPICS = "KSER_TOPICS"
DATABASE_URI = "KSER_DATABASE_URI"

#: Maximum value of a setting in seconds, about 3 years. Threads and databases cannot wait for much longer times.
MAX_SECONDS = 100_000_000

_TOPIC_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")


class Settings:
    """Lookup of settings: first in the Flask app's ``config``, then in the environment.

    :param app_config: the Flask app's ``config``, or None without an app.
    """

    def __init__(self, app_config: Mapping[str, Any] | None = None) -> None:
        self._app_config = app_config or {}

    @classmethod
    def of(cls, app: Any) -> Self:
        """Create the settings of a Flask application; ``app`` may be None."""
        return cls(getattr(app, "config", None))

    def get(self, name: str) -> Any:
        """Return the value of a setting, or None if it is not set.

        A value from the app's config is returned unchanged. A value from the environment is a str. An empty variable
        counts as not set, because tools such as Docker Compose define an empty variable for a setting that has no
        value.
        """
        value = self._app_config.get(name)
        return (os.environ.get(name) or None) if value is None else value

    def number(self, name: str, default: float, *, whole: bool = False) -> float:
        """Return a setting that must be a number above 0, or ``default`` if the setting is not set.

        :param whole: whether the number must be whole. Otherwise, it is a number of seconds, at most ``MAX_SECONDS``.
        :raises SettingError: the value is not a number above 0, or not a whole number although ``whole`` is True, or
            too many seconds.
        """
        value = self.get(name)
        number = check_number(name, default if value is None else value, whole=whole)
        if not whole and number > MAX_SECONDS:
            raise SettingError(f"{name} must be a number of seconds, {MAX_SECONDS:,} or less; it is {value!r}")
        return number

    @property
    def client(self) -> dict[str, Any] | None:
        """Options of the Kafka client from ``KSER_CONFIG``, or None if ``KSER_CONFIG`` is not set.

        :raises SettingError: the value is not a JSON object.
        """
        value = parse_json(CONFIG, self.get(CONFIG))
        if value is not None and not isinstance(value, Mapping):
            raise SettingError(f"{CONFIG} must be a JSON object with options of the Kafka client; it is {value!r}")
        return None if value is None else {key: _python_value(key, option) for key, option in value.items()}

    @property
    def producer(self) -> dict[str, Any]:
        """Options of the Kafka client for producers only, from ``KSER_PRODUCER_CONFIG``; empty if it is not set.

        :raises SettingError: the value is not a JSON object.
        """
        value = self.get(PRODUCER_CONFIG)
        return {} if value is None else parse_object(PRODUCER_CONFIG, value)

    def consumed_topics(self, topics: Any = None) -> Any:
        """Return the topics to consume: ``topics``, or the topics in ``KSER_TOPICS`` if ``topics`` is None.

        :raises SettingError: ``topics`` is empty, or it is None and ``KSER_TOPICS`` contains no topic.
        :raises UsageError: ``topics`` is a str, which Python would read as a list of letters.
        """
        consumed = self.topics if topics is None else topics
        if isinstance(consumed, str):
            raise UsageError(f"topics must be a list of names, not a str: pass [{consumed!r}]")
        if not consumed:
            raise SettingError(
                f"there is no topic to consume: pass topics, or set {TOPICS} (names separated by commas)"
            )
        return consumed

    @property
    def topics(self) -> list[str]:
        """Topics in ``KSER_TOPICS``; empty if ``KSER_TOPICS`` is not set.

        :raises SettingError: the value contains something other than topic names.
        """
        value = self.get(TOPICS) or []
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise SettingError(f"{TOPICS} must contain topic names; it is {value!r}")
        return [name.strip() for name in names if name.strip()]

    def first_topic(self, fallback: str) -> str:
        """Return the first topic of ``KSER_TOPICS``, or ``fallback`` if ``KSER_TOPICS`` contains no topic.

        A pattern names no topic that a message could be sent to. So if the first topic is a pattern, return
        ``fallback`` too.

        :raises SettingError: the value contains something other than topic names.
        :raises TopicMissing: the first topic is a pattern, and ``fallback`` is empty.
        """
        first = next(iter(self.topics), fallback)
        if not is_pattern(first):
            return first
        if not fallback:
            raise TopicMissing(
                f"there is no topic to send to: {TOPICS} begins with the pattern {first!r}, which names no topic; pass"
                f" send(topic=...), set TOPIC on the class, or put the name of a topic first in {TOPICS}"
            )
        return fallback


def is_topic_name(name: str) -> bool:
    """Return whether Kafka accepts ``name`` as the name of a topic."""
    return bool(_TOPIC_NAME.fullmatch(name)) and name not in (".", "..")


def is_pattern(topic: str) -> bool:
    """Return whether an entry of the consumed topics is a pattern instead of a name."""
    return topic.startswith("^")


def _python_value(key: str, value: Any) -> Any:
    """Convert ``api_version`` to a tuple, because JSON has no tuples. Return other options unchanged."""
    if key == "api_version" and isinstance(value, str | list):
        try:
            return tuple(int(part) for part in (value.split(".") if isinstance(value, str) else value))
        except (TypeError, ValueError) as error:
            raise SettingError(f"{CONFIG}: api_version must look like '2.0' or [2, 0]; it is {value!r}") from error
    return value


def known_options(config: Mapping[str, Any], own: Iterable[str], *others: Iterable[str]) -> dict[str, Any]:
    """Return the options of ``config`` that a client knows. ``config`` may also contain options of other clients.

    :param own: option names of this client.
    :param others: option names of the other clients; these options are dropped silently.
    :raises SettingError: ``config`` has an option that no client knows. The error text contains the most similar name
        of an option.
    """
    own = set(own)
    known = own.union(*others)
    for key in config:
        if key not in known:
            nearest = nearest_name(str(key), sorted(known))
            raise SettingError(f"{CONFIG}: the Kafka client knows no option {key!r}; the nearest is {nearest!r}")
    return {key: value for key, value in config.items() if key in own}


def nearest_name(name: str, known: Sequence[str]) -> str:
    """Return the known name that is most similar to ``name``."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def parse_json(source: str, value: Any) -> Any:
    """Return the value of a setting. A str must contain JSON, and this function decodes it.

    :param source: the name of the setting, for the error text.
    :raises SettingError: ``value`` is a str that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise SettingError(f"{source} is not JSON: {error}; it is {value!r}") from error


def parse_object(source: str, value: Any) -> dict[str, Any]:
    """Return client options: a mapping, or a str with a JSON object. The error text never contains the options.

    :param source: the name of the setting, for the error text.
    :raises SettingError: ``value`` is something else.
    """
    try:
        options = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SettingError(f"{source} is not JSON: {error}") from None
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise SettingError(
            f"{source} must be a JSON object with options of the Kafka client; it is of the type"
            f" {type(options).__name__}"
        )
    return {key: _python_value(key, option) for key, option in options.items()}


def check_number(
    source: str,
    value: Any,
    *,
    lowest: float | None = None,
    whole: bool = False,
    unit: str = "",
    types: type | UnionType = object,
) -> float:
    """Return a setting as a number.

    :param source: the name of the setting, for the error text.
    :param lowest: the lowest number that is allowed; None allows every number above 0.
    :param whole: whether the number must be whole. In that case, the result is an int.
    :param unit: the unit of the number, for the error text.
    :param types: the types that are allowed; by default, every type that ``float`` converts, except bool.
    :raises SettingError: ``value`` is not a number, or the other parameters do not allow it.
    """
    number = math.nan
    accepted = isinstance(value, types) and not isinstance(value, bool)
    if accepted:
        with suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    in_range = number > 0 if lowest is None else number >= lowest
    if not in_range or number == math.inf or (whole and number % 1):
        kind = f"{'whole ' * whole}number{unit and f' of {unit}'}"
        limit = " above 0" if lowest is None else f", {lowest:g} or more"
        raise SettingError(f"{source} must be a {kind}{limit}; it is {value!r}")
    # Return an int unchanged, because float() would round an int above 2**53.
    return (value if isinstance(value, int) else int(number)) if whole else number
