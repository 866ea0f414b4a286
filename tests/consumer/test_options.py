"""Tests of consumer options: each is an argument and a setting of the same name."""

from __future__ import annotations

import inspect
import logging
from dataclasses import fields
from typing import Any

import pytest
from flask import Flask

from kser.config import Settings
from kser.consumer.options import ConsumerKwargs, ConsumerOptions
from kser.dummy.consumer import Consumer as InMemory
from kser.errors import SettingError, UsageError
from kser.python_kafka.consumer import Consumer as Kafka
from kser.retry import Retry
from tests.consumer.harness import new_consumer
from tests.support import lines

pytestmark = pytest.mark.usefixtures("bus")

DEFAULTS = {
    "workers": 1,
    "ordering": "key",
    "commit": "after",
    "retry": None,
    "dead_letter": False,
    "shutdown_timeout": 30,
    "revoke_timeout": 10,
    "max_in_flight": 1000,
    "max_buffered_bytes": 16 << 20,
    "stall_timeout": 300,
    "producer_config": None,
    "max_starts": 20,
    "client_timeout": None,
}

#: For each option its name, an argument, the equivalent text in the environment, and the resulting value.
OPTIONS: list[tuple[str, Any, str, Any]] = [
    ("max_starts", 5, "5", 5),
    ("workers", 4, "4", 4),
    ("ordering", "partition", "partition", "partition"),
    ("ordering", "none", "none", "none"),
    ("commit", "before", "before", "before"),
    ("commit", "never", "never", "never"),
    ("retry", Retry(max_attempts=7, delay=0), '{"max_attempts": 7, "delay": 0}', Retry(max_attempts=7, delay=0)),
    ("retry", {"max_attempts": 7}, '{"max_attempts": 7}', Retry(max_attempts=7)),
    ("dead_letter", True, "true", True),
    ("dead_letter", True, "YES", True),
    ("dead_letter", True, "1", True),
    ("dead_letter", False, "no", False),
    ("dead_letter", "broken", "broken", "broken"),
    ("shutdown_timeout", 2.5, "2.5", 2.5),
    ("shutdown_timeout", 0, "0", 0),
    ("revoke_timeout", 1, "1", 1),
    ("max_in_flight", 10, "10", 10),
    ("max_buffered_bytes", 1 << 20, "1048576", 1 << 20),
    ("stall_timeout", 60, "60", 60),
    ("producer_config", {"acks": 1}, '{"acks": 1}', {"acks": 1}),
    ("client_timeout", 90, "90", 90),
]


def options_of(app: Flask | None = None, **arguments: Any) -> dict[str, Any]:
    """Return the options of a consumer, by name."""
    options = ConsumerOptions.from_settings(Settings.of(app), ConsumerKwargs(**arguments))  # type: ignore[typeddict-item]
    return {field.name: getattr(options, field.name) for field in fields(options)}


def test_options_have_defaults() -> None:
    assert options_of() == DEFAULTS


def test_every_option_is_a_typed_argument() -> None:
    assert set(ConsumerKwargs.__annotations__) == {field.name for field in fields(ConsumerOptions)} == set(DEFAULTS)
    assert {name for name, *_ in OPTIONS} == set(DEFAULTS)


@pytest.mark.parametrize(("name", "argument", "text", "value"), OPTIONS)
def test_option_is_an_argument_or_a_setting(
    name: str, argument: Any, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {**DEFAULTS, name: value}
    setting = f"KSER_{name.upper()}"
    app = Flask("shop")
    app.config[setting] = argument
    assert options_of(**{name: argument}) == expected
    assert options_of(app) == expected
    monkeypatch.setenv(setting, text)
    assert options_of() == expected


def test_arguments_override_the_app_and_the_app_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Flask("shop")
    monkeypatch.setenv("KSER_WORKERS", "2")
    assert options_of(app)["workers"] == 2
    app.config["KSER_WORKERS"] = 3
    assert options_of(app)["workers"] == 3
    assert options_of(app, workers=4)["workers"] == 4
    assert options_of(app, workers=None)["workers"] == 3


def test_false_or_zero_argument_overrides_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_DEAD_LETTER", "true")
    monkeypatch.setenv("KSER_SHUTDOWN_TIMEOUT", "20")
    options = options_of(dead_letter=False, shutdown_timeout=0)
    assert (options["dead_letter"], options["shutdown_timeout"]) == (False, 0)


def test_empty_environment_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.setenv(f"KSER_{name.upper()}", "")
    assert options_of() == DEFAULTS


INVALID_OPTIONS: list[tuple[str, Any, str]] = [
    ("workers", 0, "workers must be a whole number, 1 or more; it is 0"),
    ("workers", "two", "workers must be a whole number, 1 or more; it is 'two'"),
    ("workers", 1.5, "workers must be a whole number, 1 or more; it is 1.5"),
    ("workers", True, "workers must be a whole number, 1 or more; it is True"),
    ("workers", float("nan"), "workers must be a whole number, 1 or more; it is nan"),
    ("max_starts", 0, "max_starts must be a whole number, 1 or more; it is 0"),
    ("max_in_flight", 0, "max_in_flight must be a whole number, 1 or more; it is 0"),
    ("max_buffered_bytes", -1, "max_buffered_bytes must be a whole number, 1 or more; it is -1"),
    ("shutdown_timeout", -1, "shutdown_timeout must be a number of seconds, 0 or more; it is -1"),
    ("shutdown_timeout", "a while", "shutdown_timeout must be a number of seconds, 0 or more; it is 'a while'"),
    ("revoke_timeout", float("nan"), "revoke_timeout must be a number of seconds, 0 or more; it is nan"),
    ("revoke_timeout", False, "revoke_timeout must be a number of seconds, 0 or more; it is False"),
    ("stall_timeout", float("inf"), "stall_timeout must be a number of seconds, 0 or more; it is inf"),
    ("stall_timeout", [5], "stall_timeout must be a number of seconds, 0 or more; it is [5]"),
    ("ordering", "keys", "ordering must be one of 'key', 'partition', 'none'; it is 'keys'"),
    ("ordering", 5, "ordering must be one of 'key', 'partition', 'none'; it is 5"),
    ("commit", "sometimes", "commit must be one of 'after', 'before', 'never'; it is 'sometimes'"),
    ("commit", "", "commit must be one of 'after', 'before', 'never'; it is ''"),
    ("retry", 5, "retry must be a Retry, or a mapping (in JSON, an object) with no other keys than max_attempts"),
    ("retry", "5 times", "retry is not JSON: "),
    ("dead_letter", "", "dead_letter must be True, False or the name of a topic; it is ''"),
    ("dead_letter", 5, "dead_letter must be True, False or the name of a topic; it is 5"),
    ("dead_letter", "^orders", "dead_letter must be True, False or the name of a topic; it is '^orders'; a name"),
    ("dead_letter", "a b", "dead_letter must be True, False or the name of a topic; it is 'a b'; a name has 1 to 249"),
    ("dead_letter", "x" * 250, "dead_letter must be True, False or the name of a topic; it is 'xxx"),
    ("producer_config", [1], "producer_config must be a JSON object with options of the Kafka client; it is"),
    ("producer_config", "{", "producer_config is not JSON: "),
]


@pytest.mark.parametrize(("name", "value", "text"), INVALID_OPTIONS)
def test_invalid_option_is_rejected_with_its_allowed_values(name: str, value: Any, text: str) -> None:
    with pytest.raises(SettingError) as caught:
        options_of(**{name: value})
    assert caught.value.message.startswith(text)


@pytest.mark.parametrize(
    ("setting", "text", "begins"),
    [
        ("KSER_WORKERS", "many", "KSER_WORKERS must be a whole number, 1 or more; it is 'many'"),
        ("KSER_RETRY", "{", "KSER_RETRY is not JSON: "),
        ("KSER_RETRY", '{"on": "KeyError"}', "KSER_RETRY must be a Retry, or a mapping "),
        ("KSER_COMMIT", "After", "KSER_COMMIT must be one of 'after', 'before', 'never'; it is 'After'"),
    ],
)
def test_invalid_setting_is_rejected_with_its_name(
    setting: str, text: str, begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting, text)
    with pytest.raises(SettingError) as caught:
        new_consumer()
    assert caught.value.message.startswith(begins)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("worker", "workers"),
        ("dead_letters", "dead_letter"),
        ("shutdown_timout", "shutdown_timeout"),
        ("topic", "topics"),
    ],
)
def test_misspelt_option_is_rejected_with_the_nearest(misspelt: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no option '{misspelt}'; the nearest is '{nearest}'"):
        new_consumer(**{misspelt: None})


def test_transports_share_the_options() -> None:
    assert inspect.signature(InMemory) == inspect.signature(Kafka)


@pytest.mark.parametrize(
    ("dead_letter", "topic"), [(False, None), (True, "dice.dlq"), ("broken", "broken"), ("dice.dlq", "dice.dlq")]
)
def test_dead_letter_option_gives_the_dead_letter_topic(dead_letter: Any, topic: str | None) -> None:
    assert ConsumerOptions(dead_letter=dead_letter).dead_letter_topic("dice") == topic


def test_dead_letter_topic_may_not_be_consumed() -> None:
    """Each dead letter would become another message of the consumed topic, without end."""
    with pytest.raises(SettingError, match="'dice'"):
        new_consumer(dead_letter="dice")


@pytest.mark.parametrize(("interval_ms", "seconds"), [(300_000, 10), (15_000, 5), (None, 10)])
def test_rebalance_waits_for_less_than_max_poll_interval(interval_ms: int | None, seconds: float) -> None:
    config = {} if interval_ms is None else {"max_poll_interval_ms": interval_ms}
    assert new_consumer(config)._kser_partitions._revoke_timeout == seconds


def test_effective_options_are_logged_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kser")
    policy = Retry(max_attempts=2)
    consumer = new_consumer(
        {"group_id": "players"}, workers=3, ordering="partition", commit="never", retry=policy, dead_letter=True
    )
    consumer.stop()
    with pytest.raises(SystemExit):
        consumer.run()
    assert lines(caplog)[1] == (
        f"Consumer: commit=never, workers=3, ordering=partition, group=players, topics=dice, retry={policy},"
        " dead letters=<topic>.dlq"
    )


@pytest.mark.parametrize(("given", "limit"), [({}, 40), ({"revoke_timeout": 60}, 90), ({"client_timeout": 15}, 15)])
def test_client_timeout_is_30_seconds_more_than_revoke_timeout(given: dict[str, float], limit: float) -> None:
    assert ConsumerOptions.from_settings(Settings(), ConsumerKwargs(**given)).client_limit == limit  # type: ignore[typeddict-item]


@pytest.mark.parametrize("given", [{"client_timeout": 10}, {"client_timeout": 5}, {"client_timeout": 0}])
def test_client_timeout_that_a_rebalance_may_exceed_is_rejected(given: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"client_timeout must be longer than revoke_timeout \(10 s\)"):
        options_of(**given)
