"""Settings: the Flask app's config, then the environment, then nothing."""

from __future__ import annotations

from typing import Any

import pytest

from kser.config import Settings, known_options
from kser.errors import SettingError


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("KSER_TOPICS", "from,environment")
    monkeypatch.setenv("KSER_CONFIG", '{"client_id": "environment"}')
    return monkeypatch


def test_without_any_there_is_nothing() -> None:
    assert Settings().client is None
    assert Settings().topics == []
    assert Settings().get("KSER_CONFIG") is None


def test_the_environment_is_read(environment: pytest.MonkeyPatch) -> None:
    assert Settings().topics == ["from", "environment"]
    assert Settings().client == {"client_id": "environment"}


def test_the_apps_config_wins_over_the_environment(environment: pytest.MonkeyPatch) -> None:
    settings = Settings({"KSER_TOPICS": ["app"], "KSER_CONFIG": {"client_id": "app"}})
    assert settings.topics == ["app"]
    assert settings.client == {"client_id": "app"}


def test_an_apps_config_without_a_value_leaves_it_to_the_environment(environment: pytest.MonkeyPatch) -> None:
    settings = Settings({"KSER_TOPICS": None})
    assert settings.topics == ["from", "environment"]
    assert settings.client == {"client_id": "environment"}


def test_arguments_win_over_everything(environment: pytest.MonkeyPatch) -> None:
    assert Settings({"KSER_TOPICS": ["app"]}).consumed_topics(["argument"]) == ["argument"]
    assert Settings().consumed_topics() == ["from", "environment"]


@pytest.mark.parametrize("given", [None, []])
def test_nothing_to_consume_names_the_setting(given: Any) -> None:
    with pytest.raises(SettingError, match="no topic to consume: pass topics, or set KSER_TOPICS"):
        Settings().consumed_topics(given)


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
def test_topics_are_text_with_commas_or_names(value: Any, topics: list[str]) -> None:
    assert Settings({"KSER_TOPICS": value}).topics == topics


@pytest.mark.parametrize("value", [[1], ["dice", None], 5, True])
def test_topics_that_are_no_names_are_refused(value: Any) -> None:
    with pytest.raises(SettingError, match="KSER_TOPICS must hold names of topics"):
        _ = Settings({"KSER_TOPICS": value}).topics


@pytest.mark.parametrize("value", ["{", "localhost:9092", "[1"])
def test_a_config_that_is_not_json_is_refused(value: str) -> None:
    with pytest.raises(SettingError, match="KSER_CONFIG is not JSON") as caught:
        _ = Settings({"KSER_CONFIG": value}).client
    assert repr(value) in caught.value.message


@pytest.mark.parametrize("value", ["[]", '"text"', "5", ["a"]])
def test_a_config_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(SettingError, match="KSER_CONFIG must be a JSON object"):
        _ = Settings({"KSER_CONFIG": value}).client


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Container files set empty variables where nothing is meant; KSER_TOPICS takes that too."""
    monkeypatch.setenv("KSER_CONFIG", "")
    assert Settings().client is None


@pytest.mark.parametrize("version", ["2.0", "2.0.0", [2, 0], (2, 0)])
def test_the_version_of_the_broker_has_the_clients_type(version: Any) -> None:
    client = Settings({"KSER_CONFIG": {"api_version": version}}).client
    assert client is not None
    assert client["api_version"][:2] == (2, 0)
    assert isinstance(client["api_version"], tuple)


@pytest.mark.parametrize("version", ["auto", "2.x", ["two"], [None]])
def test_a_version_that_is_none_is_refused(version: Any) -> None:
    with pytest.raises(SettingError, match=r"api_version must look like '2\.0'"):
        _ = Settings({"KSER_CONFIG": {"api_version": version}}).client


def test_the_value_that_was_given_is_not_touched() -> None:
    given = {"api_version": "2.0"}
    assert Settings({"KSER_CONFIG": given}).client == {"api_version": (2, 0)}
    assert given == {"api_version": "2.0"}


def test_a_client_takes_the_options_that_it_knows() -> None:
    config = {"acks": 1, "group_id": "players", "client_id": "me"}
    assert known_options(config, ["acks", "client_id"], ["group_id", "client_id"]) == {"acks": 1, "client_id": "me"}


@pytest.mark.parametrize(("wrong", "nearest"), [("groupid", "group_id"), ("bootstrap.servers", "bootstrap_servers")])
def test_an_option_that_nobody_knows_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(SettingError, match=f"no option '{wrong}'; the nearest is '{nearest}'"):
        known_options({wrong: 1}, ["bootstrap_servers"], ["group_id"])


def test_an_option_that_resembles_nothing_is_refused_all_the_same() -> None:
    with pytest.raises(SettingError, match="no option '§'"):
        known_options({"§": 1}, ["acks"])
