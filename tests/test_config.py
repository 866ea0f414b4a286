"""Tests of settings: the Flask app's config, then the environment, then the default."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kser.config import Settings, check_number, known_options
from kser.errors import SettingError


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("KSER_TOPICS", "from,environment")
    monkeypatch.setenv("KSER_CONFIG", '{"client_id": "environment"}')
    return monkeypatch


def test_settings_default_to_nothing() -> None:
    assert Settings().client is None
    assert Settings().topics == []
    assert Settings().get("KSER_CONFIG") is None


def test_settings_are_read_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    assert Settings().topics == ["from", "environment"]
    assert Settings().client == {"client_id": "environment"}


def test_app_config_overrides_the_environment(environment: pytest.MonkeyPatch) -> None:
    settings = Settings({"KSER_TOPICS": ["app"], "KSER_CONFIG": {"client_id": "app"}})
    assert settings.topics == ["app"]
    assert settings.client == {"client_id": "app"}


def test_app_config_without_a_value_falls_back_to_the_environment(environment: pytest.MonkeyPatch) -> None:
    settings = Settings({"KSER_TOPICS": None})
    assert settings.topics == ["from", "environment"]
    assert settings.client == {"client_id": "environment"}


def test_arguments_override_all_settings(environment: pytest.MonkeyPatch) -> None:
    assert Settings({"KSER_TOPICS": ["app"]}).consumed_topics(["argument"]) == ["argument"]
    assert Settings().consumed_topics() == ["from", "environment"]


@pytest.mark.parametrize("argument", [None, []])
def test_missing_topics_error_names_the_setting(argument: Any) -> None:
    with pytest.raises(SettingError, match="no topic to consume: pass topics, or set KSER_TOPICS"):
        Settings().consumed_topics(argument)


@pytest.mark.parametrize(
    ("value", "topics"),
    [
        ("dice", ["dice"]),
        (" dice , shop ,", ["dice", "shop"]),
        ("", []),
        (",", []),
        (["dice", " shop "], ["dice", "shop"]),
        (("dice",), ["dice"]),
    ],
)
def test_topics_are_comma_separated_text_or_a_list(value: Any, topics: list[str]) -> None:
    assert Settings({"KSER_TOPICS": value}).topics == topics


@pytest.mark.parametrize("value", [[1], ["dice", None], 5, True])
def test_invalid_topic_names_are_rejected(value: Any) -> None:
    with pytest.raises(SettingError, match="KSER_TOPICS must contain topic names"):
        _ = Settings({"KSER_TOPICS": value}).topics


@pytest.mark.parametrize("value", ["{", "localhost:9092", "[1"])
def test_config_that_is_not_json_is_rejected(value: str) -> None:
    with pytest.raises(SettingError, match="KSER_CONFIG is not JSON") as caught:
        _ = Settings({"KSER_CONFIG": value}).client
    assert repr(value) in caught.value.message


@pytest.mark.parametrize("value", ["[]", '"text"', "5", ["a"]])
def test_config_that_is_not_an_object_is_rejected(value: Any) -> None:
    with pytest.raises(SettingError, match="KSER_CONFIG must be a JSON object"):
        _ = Settings({"KSER_CONFIG": value}).client


def test_empty_environment_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Container files declare empty variables for settings that are not needed."""
    monkeypatch.setenv("KSER_CONFIG", "")
    monkeypatch.setenv("KSER_TOPICS", "")
    assert Settings().client is None
    assert Settings().topics == []


@pytest.mark.parametrize("version", ["2.0", "2.0.0", [2, 0], (2, 0)])
def test_api_version_is_converted_to_a_tuple(version: Any) -> None:
    client = Settings({"KSER_CONFIG": {"api_version": version}}).client
    assert client is not None
    assert client["api_version"][:2] == (2, 0)
    assert isinstance(client["api_version"], tuple)


@pytest.mark.parametrize("version", ["auto", "2.x", ["two"], [None]])
def test_invalid_api_version_is_rejected(version: Any) -> None:
    with pytest.raises(SettingError, match=r"api_version must look like '2\.0'"):
        _ = Settings({"KSER_CONFIG": {"api_version": version}}).client


def test_config_of_the_app_is_not_modified() -> None:
    config = {"api_version": "2.0"}
    assert Settings({"KSER_CONFIG": config}).client == {"api_version": (2, 0)}
    assert config == {"api_version": "2.0"}


def test_client_receives_only_the_options_it_knows() -> None:
    config = {"acks": 1, "group_id": "players", "client_id": "me"}
    assert known_options(config, ["acks", "client_id"], ["group_id", "client_id"]) == {"acks": 1, "client_id": "me"}


@pytest.mark.parametrize(("wrong", "nearest"), [("groupid", "group_id"), ("bootstrap.servers", "bootstrap_servers")])
def test_unknown_option_error_names_the_nearest_option(wrong: str, nearest: str) -> None:
    with pytest.raises(SettingError, match=f"no option '{wrong}'; the nearest is '{nearest}'"):
        known_options({wrong: 1}, ["bootstrap_servers"], ["group_id"])


def test_unknown_option_without_a_similar_one_is_rejected() -> None:
    with pytest.raises(SettingError, match="no option '§'"):
        known_options({"§": 1}, ["acks"])


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_number_is_the_setting_or_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_LEASE", "12.5")
    assert Settings().number("KSER_LEASE", 30) == 12.5
    assert Settings({"KSER_LEASE": 5}).number("KSER_LEASE", 30) == 5
    assert Settings().number("KSER_REAPER", 1) == 1


@pytest.mark.parametrize("value", ["7", 7, 7.0])
def test_whole_number_is_an_int(value: Any) -> None:
    number = check_number("workers", value, whole=True)
    assert (number, type(number)) == (7, int)


@pytest.mark.parametrize("value", [None, True, "", "x", "nan", "inf", 0, -1, [1], 10**400, math.nan, math.inf])
def test_value_that_is_no_number_above_zero_is_rejected(value: Any) -> None:
    with pytest.raises(SettingError, match="workers must be a number above 0; it is "):
        check_number("workers", value)


@pytest.mark.parametrize("value", ["1", "1e3", None, True])
def test_value_of_another_type_is_rejected(value: Any) -> None:
    with pytest.raises(SettingError, match="lease must be a number of seconds, 1 or more; it is "):
        check_number("lease", value, lowest=1, unit="seconds", types=int | float)
