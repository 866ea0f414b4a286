"""Tests of subscriptions: names and patterns of topics."""

from __future__ import annotations

import re

import pytest

from kser.config import Settings
from kser.consumer.subscription import Subscription
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.errors import SettingError, TopicMissing, UsageError
from kser.sequencing.registry import OperationRegistry
from tests.consumer.harness import MANUAL_COMMIT, ScriptedTask
from tests.support import message

pytestmark = pytest.mark.usefixtures("bus")


def send_to(topic: str, uuid: str) -> None:
    """Send a message with a uuid to a topic."""
    InMemoryBroker.at("").send(topic, message(ScriptedTask, uuid=uuid).dumps().encode())


@pytest.mark.parametrize(
    ("entries", "matching"),
    [
        (["^shop"], ["shop.cards", "shop.orders", "shopping"]),
        ([r"^shop\."], ["shop.cards", "shop.orders"]),
        ([r"^shop\.orders$"], ["shop.orders"]),
        (["^shop", "bank"], ["bank", "shop.cards", "shop.orders", "shopping"]),
        (["^cards|^bank", r"^shop\.o"], ["bank", "bankrupt", "shop.orders"]),
        (["^"], ["bank", "bankrupt", "shop.cards", "shop.orders", "shopping"]),
        (["^nothing", "missing"], ["missing"]),
        (["bank"], ["bank"]),
        ([r"^(shop)\.(.)", r"^(b)ankr.pt$"], ["bankrupt", "shop.cards", "shop.orders"]),
        ([r"^(x)y", r"^s(h)o(p)\2ing$"], ["shopping"]),
        ([r"^(?P<a>x)y", r"^sho(?P<a>p)(?P=a)"], ["shopping"]),
        ([r"^(x)", r"^(s)?hop(?(1)x|y)", r"^(s)?hop(?(1)\.c|y)"], ["shop.cards"]),
    ],
)
def test_pattern_matches_the_beginning_of_a_name(entries: list[str], matching: list[str]) -> None:
    topics = ["bank", "bankrupt", "shop.cards", "shop.orders", "shopping", "__consumer_offsets", "shop.orders.dlq"]
    subscription = Subscription(entries, r".*\.dlq")
    assert subscription.matching(topics) == matching
    assert list(subscription) == entries


@pytest.mark.parametrize("pattern", ["^(", "^[a", "^*", "^shop(?P<a>.)(?P<a>.)", "^a{2,1}"])
def test_invalid_pattern_is_rejected_by_the_constructor(pattern: str) -> None:
    with pytest.raises(SettingError, match=re.escape(f"the topic {pattern!r} begins with '^', so it is a pattern")):
        Consumer({}, ["dice", pattern])


@pytest.mark.parametrize(
    ("patterns", "rejected"),
    [
        ([r"^(a)b", r"^(.)\1"], True),
        ([r"^(a)b", r"^(.)?(?(1)x|y)"], True),
        ([r"^(a)b", r"^c\\\\(.)\1"], True),
        ([r"^(?P<a>a)", r"^(?P<a>b)"], True),
        ([r"^(.)\1", "^ab"], False),
        (["^ab", r"^(.)\1"], False),
        (["^(a)b", r"^(?P<b>.)(?P=b)"], False),
        (["^(a)b", r"^\\1"], False),
    ],
)
def test_patterns_that_cannot_be_joined_are_rejected_only_where_they_are_joined(
    patterns: list[str], rejected: bool
) -> None:
    subscription = Subscription(patterns)
    if rejected:
        with pytest.raises(SettingError, match="pattern"):
            _ = subscription.regex
        return
    assert subscription.regex is not None
    topics = ["ab", "aa", "zz", "abz", "yx"]
    assert list(filter(subscription.regex.match, topics)) == [
        topic for topic in topics if any(re.match(pattern, topic) for pattern in patterns)
    ]


def test_topic_that_is_no_text_is_rejected_by_the_constructor() -> None:
    with pytest.raises(UsageError, match="topics must contain names of topics as str; it contains 5"):
        Consumer({}, [5])  # type: ignore[list-item]


def test_consumer_reads_all_topics_that_match_its_pattern(bus: InMemoryBroker) -> None:
    for topic in ("shop.orders", "shop.cards", "bank"):
        send_to(topic, topic)
    consumer = Consumer({}, ["^shop"])
    consumer.run_until_idle()
    assert sorted(ScriptedTask.ran) == ["shop.cards", "shop.orders"]
    send_to("shop.late", "shop.late")
    send_to("bank.late", "bank.late")
    consumer.run_until_idle()
    assert ScriptedTask.ran[2:] == ["shop.late"]
    assert {partition.topic for partition in consumer.assignment} == {"shop.orders", "shop.cards", "shop.late"}


def test_pattern_may_match_no_topic_yet(bus: InMemoryBroker) -> None:
    consumer = Consumer({}, ["^shop"])
    assert (consumer.run_until_idle(), consumer.assignment) == (0, frozenset())
    bus.create_topic("shop.orders", 2)
    send_to("shop.orders", "1")
    assert consumer.run_until_idle() == 1


def test_names_and_patterns_may_be_mixed() -> None:
    for topic in ("shop.orders", "bank", "banks"):
        send_to(topic, topic)
    Consumer({}, ["bank", "^shop"]).run_until_idle()
    assert sorted(ScriptedTask.ran) == ["bank", "shop.orders"]


@pytest.mark.parametrize(("dead_letter", "topic"), [(True, "shop.orders.dlq"), ("shop.broken", "shop.broken")])
def test_pattern_does_not_match_the_dead_letters_of_its_own_consumer(
    dead_letter: bool | str, topic: str, bus: InMemoryBroker
) -> None:
    bus.send("shop.orders", b"no message")
    consumer = Consumer(MANUAL_COMMIT, ["^shop"], dead_letter=dead_letter)
    for _ in range(3):
        consumer.run_until_idle()
    assert consumer.counts == {"done": 1, "failed": 1, "dead_lettered": 1}
    assert set(bus.topics) == {"shop.orders", topic}
    assert len(bus.values(topic)) == 1


def test_pattern_of_a_consumer_without_dead_letters_matches_dead_letter_topics(bus: InMemoryBroker) -> None:
    send_to("shop.orders.dlq", "1")
    assert Consumer({}, [r"^.*\.dlq$"]).run_until_idle() == 1


# -- the topic of tasks ------------------------------------------------------------------------------------------------


def test_task_is_not_sent_to_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = OperationRegistry()

    @registry.subscribe
    class Pay(ScriptedTask):
        pass

    monkeypatch.setenv("KSER_TOPICS", "^shop,orders")
    with pytest.raises(TopicMissing, match=r"KSER_TOPICS begins with the pattern '\^shop', which names no topic"):
        registry.topic_for(Pay())
    assert registry.topic_for(Pay(), "orders") == "orders"
    monkeypatch.setenv("KSER_TOPICS", "orders,^shop")
    assert registry.topic_for(Pay()) == "orders"


@pytest.mark.parametrize(("topics", "first"), [("^shop,orders", "origin"), ("orders,^shop", "orders"), ("", "origin")])
def test_tasks_of_an_operation_stay_on_its_topic_if_the_first_topic_is_a_pattern(
    topics: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSER_TOPICS", topics)
    settings = Settings()
    assert settings.first_topic("origin") == first
