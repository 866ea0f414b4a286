"""Scenarios of the chaos tests, one function per kind of fault; all of them check the same promises."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from tests.chaos import messages, monkey
from tests.chaos.cluster import OFFSETS, Cluster
from tests.chaos.fleet import CONFLUENT, PYTHON_KAFKA, Settings
from tests.chaos.history import BROKER_KILL, BROKER_STOP, Rules
from tests.chaos.run import Outcome, Run, perform
from tests.kafka.broker import Kafka, KafkaBroker

TRANSPORTS = (PYTHON_KAFKA, CONFLUENT)

#: Messages a second.
RATE = 80.0
#: Payloads that are no messages.
PAYLOADS = 10_000
#: Seconds that a node of a cluster is away.
LEADER_AWAY = 6.0

#: A session that outlasts a broker's absence, as the default of 45 s does.
OUTLASTING = 30.0
#: The shortest session that kafka-python's and librdkafka's heartbeats leave room for.
SHORT = 2.0


def _each(rules: Rules, **options: object) -> list[Settings]:
    """A group for each transport; librdkafka waits for nobody when it hears of partitions while it gives up its own."""
    by_transport = {each: replace(rules, hasty=each == CONFLUENT) for each in TRANSPORTS}
    return [Settings(transport, own, **options) for transport, own in by_transport.items()]  # type: ignore[arg-type]


def churn(
    kafka: Kafka, folder: Path, seed: int, seconds: float, transport: str, *, outages: bool = False
) -> list[Outcome]:
    """Consumers are killed, ended, stopped past their session, join and leave, all the time.

    :param outages: the broker, which must be a :class:`KafkaBroker`, is stopped and killed as well.
    """
    rules = Rules(dead_letters=True)
    actions = monkey.plan(seed, seconds, session=rules.session, outages=outages)
    run = Run(kafka, folder, "churn", seed, [Settings(transport, rules)])

    def what(run: Run) -> None:
        run.start(3)
        run.feed(messages.work(seed, run.partitions, exits=0.01, poison=0.01), RATE)
        run.wait_for_beginning()
        run.execute(actions)
        run.wait(monkey.SETTLE)

    return perform(run, what)


def broker_away(kafka: KafkaBroker, folder: Path, seed: int) -> list[Outcome]:
    """The only broker is stopped, and killed, and comes back."""
    # librdkafka gives its partitions up by itself when it hears of no broker for a session.
    run = Run(kafka, folder, "broker away", seed, _each(Rules(dead_letters=True, session=OUTLASTING)))
    kinds = random.Random(f"broker {seed}").sample([BROKER_STOP, BROKER_KILL], 2)

    def what(run: Run) -> None:
        run.start(2)
        run.feed(messages.work(seed, run.partitions), RATE / 3)
        run.wait_for_beginning()
        for kind in kinds:
            run.wait(2)
            run.lose_broker(kind, monkey.AWAY)

    return perform(run, what)


def first_start_killed(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """The first consumer that a group ever had is killed before its first commit; others follow."""
    # A short session: the others can begin soon.
    rules = Rules(session=SHORT, commit_interval=5)
    run = Run(kafka, folder, "first start killed", seed, _each(rules), partitions=2)
    chance = random.Random(f"first {seed}")

    def what(run: Run) -> None:
        run.feed(messages.work(seed, run.partitions), RATE)
        run.start(1)
        run.wait_for_beginning()
        run.wait(chance.uniform(0.2, 0.8))
        for fleet in run.fleets:
            run.wait_for_work(fleet, fleet.names[0])
            fleet.kill(fleet.names[0])
        run.start(2)
        run.wait(3)

    return perform(run, what)


def partitions_added(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """A topic gets partitions while it is consumed, and at once there are messages in them."""
    run = Run(kafka, folder, "partitions added", seed, _each(Rules()), partitions=2)
    before, after = 150, 300

    def what(run: Run) -> None:
        run.start(2)
        run.feed(islice(messages.work(seed, 2), before), RATE)
        run.wait_for_beginning()
        run.wait_for_feeding(30)
        run.grow(6)
        run.feed(islice(messages.work(seed, 6, first=before), after), RATE)
        run.wait_for_feeding(30)

    return perform(run, what)


def long_task(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """A task takes ten times max.poll.interval.ms; for most of this time nothing else happens, then others join."""
    # No longer than a third of the interval is what consumers wait, whatever they are told.
    rules = Rules(session=SHORT, poll_interval=SHORT, revoke_timeout=SHORT / 3)
    interval = {"max_poll_interval_ms": int(SHORT * 1000)}
    run = Run(kafka, folder, "long task", seed, _each(rules, config=interval), partitions=2)
    chance = random.Random(f"long {seed}")

    def what(run: Run) -> None:
        run.start(1)
        long = [messages.order("long", 0, None, chance, seconds=10 * SHORT + 0.1)]
        run.feed(chain(long, messages.work(seed, 2)), 20)
        run.wait_for_beginning()
        run.wait(5 * SHORT)
        for fleet in run.fleets:
            fleet.start()
        run.wait(6 * SHORT)

    return perform(run, what)


def rubbish(kafka: Kafka, folder: Path, seed: int, number: int = PAYLOADS) -> list[Outcome]:
    """Random payloads come between good messages, and a consumer is killed while they do."""
    run = Run(kafka, folder, "random payloads", seed, _each(Rules(dead_letters=True)), partitions=4)
    chance = random.Random(f"between {seed}")
    good = number // 20
    # Good messages keep their order.
    placed = [((place + 1) / good, each) for place, each in enumerate(islice(messages.work(seed, 4), good))]
    placed += [(chance.random(), each) for each in messages.rubbish(seed, number, 4)]
    orders = [each for _, each in sorted(placed, key=lambda pair: pair[0])]

    def what(run: Run) -> None:
        run.start(2)
        run.feed(orders, 2000)
        run.wait_for_beginning()
        run.wait(chance.uniform(0, 2))
        for fleet in run.fleets:
            run.kill_at_work(fleet)
        run.wait_for_feeding(60)

    return perform(run, what)


def leader_lost(cluster: Cluster, folder: Path, seed: int) -> list[Outcome]:
    """Of three nodes the one that leads a partition, and then the one that keeps the offsets, is killed."""
    run = Run(cluster, folder, "leader lost", seed, _each(Rules(dead_letters=True)), partitions=4)

    def what(run: Run) -> None:
        run.start(2)
        run.feed(messages.work(seed, run.partitions), RATE / 3)
        run.wait_for_beginning()
        for topic in (run.topic, OFFSETS):
            run.wait(2)
            run.lose_leader(topic, LEADER_AWAY)

    return perform(run, what)
