"""Settings from the Flask app's ``config`` and from the environment.

The order of precedence is: explicit argument, ``config`` of the Flask app, environment variable, default.

===================== ============================================================== ==========================
setting               value                                                          in the environment
===================== ============================================================== ==========================
``KSER_CONFIG``       options of the Kafka client, for producers and consumers       a JSON object
``KSER_TOPICS``       topics to consume; tasks are sent to the first one             names, separated by commas
``KSER_DATABASE_URI`` the shared database, which stores the operations               a database URL
===================== ============================================================== ==========================
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

from kser.errors import SettingError, UsageError

CONFIG = "KSER_CONFIG"
TOPICS = "KSER_TOPICS"
DATABASE_URI = "KSER_DATABASE_URI"


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

        A value of the app's config is returned as given; a value of the environment is a str. An empty variable counts
        as not set, because containers define empty variables for settings that have no value.
        """
        value = self._app_config.get(name)
        return (os.environ.get(name) or None) if value is None else value

    @property
    def client(self) -> dict[str, Any] | None:
        """Client options of ``KSER_CONFIG``, or None when it is not set.

        :raises SettingError: the value is not a JSON object.
        """
        value = self.get(CONFIG)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise SettingError(f"{CONFIG} is not JSON: {error}; it is {value!r}") from error
        if value is not None and not isinstance(value, Mapping):
            raise SettingError(f"{CONFIG} must be a JSON object with options of the Kafka client; it is {value!r}")
        return None if value is None else {key: _python_value(key, option) for key, option in value.items()}

    def consumed_topics(self, topics: Any = None) -> Any:
        """Return the topics to consume: ``topics`` as given, else ``KSER_TOPICS``.

        :raises SettingError: there is no topic.
        :raises UsageError: ``topics`` is a str, which would be read as a list of letters.
        """
        found = self.topics if topics is None else topics
        if isinstance(found, str):
            raise UsageError(f"topics must be a list of names, not a str: pass [{found!r}]")
        if not found:
            raise SettingError(
                f"there is no topic to consume: pass topics, or set {TOPICS} (names separated by commas)"
            )
        return found

    @property
    def topics(self) -> list[str]:
        """Topics of ``KSER_TOPICS``; empty when it is not set.

        :raises SettingError: the value contains something other than topic names.
        """
        value = self.get(TOPICS) or []
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise SettingError(f"{TOPICS} must contain topic names; it is {value!r}")
        return [name.strip() for name in names if name.strip()]


def _python_value(key: str, value: Any) -> Any:
    """Convert ``value`` to the type that Python clients expect, where JSON and the environment cannot express it."""
    if key == "api_version" and isinstance(value, str | list):
        try:
            return tuple(int(part) for part in (value.split(".") if isinstance(value, str) else value))
        except (TypeError, ValueError) as error:
            raise SettingError(f"{CONFIG}: api_version must look like '2.0' or [2, 0]; it is {value!r}") from error
    return value


def known_options(config: Mapping[str, Any], own: Iterable[str], *others: Iterable[str]) -> dict[str, Any]:
    """Return the options of ``config`` that a client knows; other clients share the same ``config``.

    :param own: option names of this client.
    :param others: option names of the other clients; these options are dropped silently.
    :raises SettingError: no client knows an option; the error text contains the most similar option name.
    """
    mine = set(own)
    all_known = mine.union(*others)
    for key in config:
        if key not in all_known:
            nearest = difflib.get_close_matches(str(key), sorted(all_known), n=1, cutoff=0)
            raise SettingError(f"{CONFIG}: the Kafka client knows no option {key!r}; the nearest is {nearest[0]!r}")
    return {key: value for key, value in config.items() if key in mine}
