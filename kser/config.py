"""Settings: explicit arguments win over the Flask app's ``config``, that over the environment, that over the default.

===================== ============================================================== ==========================
setting               value                                                          in the environment
===================== ============================================================== ==========================
``KSER_CONFIG``       options of the Kafka client, for producer and consumer alike   a JSON object
``KSER_TOPICS``       topics to consume; the first is where tasks are sent           names, separated by commas
``KSER_DATABASE_URI`` the shared database, where operations are kept                 the address
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
    """Where settings come from, below explicit arguments.

    :param app_config: the Flask app's ``config``, or None without an app.
    """

    def __init__(self, app_config: Mapping[str, Any] | None = None) -> None:
        self._app_config = app_config or {}

    @classmethod
    def of(cls, app: Any) -> Self:
        """The settings of a Flask application, or without one."""
        return cls(getattr(app, "config", None))

    def get(self, name: str) -> Any:
        """The value of a setting, or None: as it was given in the app's config, a str from the environment.

        An empty variable is none: containers set such ones where nothing is meant.
        """
        value = self._app_config.get(name)
        return (os.environ.get(name) or None) if value is None else value

    @property
    def client(self) -> dict[str, Any] | None:
        """``KSER_CONFIG``, or None when it is not set.

        :raises SettingError: it is no JSON object.
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
        """What to consume: ``topics`` as they are, else ``KSER_TOPICS``.

        :raises SettingError: there is none.
        :raises UsageError: it is one text, which would be taken letter by letter.
        """
        found = self.topics if topics is None else topics
        if isinstance(found, str):
            raise UsageError(f"topics must be a list of names, not one text: [{found!r}]")
        if not found:
            raise SettingError(f"there is no topic to consume: pass topics, or set {TOPICS} (names with commas)")
        return found

    @property
    def topics(self) -> list[str]:
        """``KSER_TOPICS``, empty when it is not set.

        :raises SettingError: it holds something that is no name.
        """
        value = self.get(TOPICS) or []
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise SettingError(f"{TOPICS} must hold names of topics; it is {value!r}")
        return [name.strip() for name in names if name.strip()]


def _python_value(key: str, value: Any) -> Any:
    """``value`` in the type that Python clients want, where JSON and the environment have none for it."""
    if key == "api_version" and isinstance(value, str | list):
        try:
            return tuple(int(part) for part in (value.split(".") if isinstance(value, str) else value))
        except (TypeError, ValueError) as error:
            raise SettingError(f"{CONFIG}: api_version must look like '2.0' or [2, 0]; it is {value!r}") from error
    return value


def known_options(config: Mapping[str, Any], own: Iterable[str], *others: Iterable[str]) -> dict[str, Any]:
    """The options of ``config`` that one client knows, out of those that it shares with others.

    :param own: names of the options that the client knows.
    :param others: names that other clients know: they are left out without a word.
    :raises SettingError: no client knows an option; the error names the nearest that exists.
    """
    mine = set(own)
    all_known = mine.union(*others)
    for key in config:
        if key not in all_known:
            nearest = difflib.get_close_matches(str(key), sorted(all_known), n=1, cutoff=0)
            raise SettingError(f"{CONFIG}: the Kafka client knows no option {key!r}; the nearest is {nearest[0]!r}")
    return {key: value for key, value in config.items() if key in mine}
