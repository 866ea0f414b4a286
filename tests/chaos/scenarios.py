"""Scenarios of the chaos tests, one function per kind of fault."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from tests.chaos import messages
from tests.chaos.cluster import OFFSETS, Cluster
from tests.chaos.fleet import CONFLUENT, PYTHON_KAFKA, Settings
from tests.chaos.history import BROKER_KILL, BROKER_STOP, Rules
from tests.chaos.plan import OUTAGE_SECONDS, SETTLE_SECONDS, fault_plan
from tests.chaos.run import Outcome, Run, perform
from tests.kafka.broker import Kafka, KafkaBroker

TRANSPORTS = (PYTHON_KAFKA, CONFLUENT)

#: Messages per second.
RATE = 80.0
#: The number of payloads that are no messages.
PAYLOADS = 10_000
#: Duration of a leader outage in seconds.
LEADER_OUTAGE_SECONDS = 6.0

#: A session timeout in seconds that is longer than a broker outage, as the default of 45 s is.
LONG_SESSION = 30.0
#: The shortest session timeout in seconds that the heartbeats of both clients allow.
SHORT_SESSION = 2.0


def _group_per_transport(rules: Rules, **options: object) -> list[Settings]:
    """Return the settings of one group per transport.

    librdkafka does not wait for running tasks if partitions are added while it revokes its own.
    """
    return [
        Settings(transport, replace(rules, revokes_at_once=transport == CONFLUENT), **options)  # type: ignore[arg-type]
        for transport in TRANSPORTS
    ]


def churn(
    kafka: Kafka, folder: Path, seed: int, seconds: float, transport: str, *, outages: bool = False
) -> list[Outcome]:
    """Kill, terminate and stop consumers, and let consumers join and leave, all the time.

    :param outages: also stop and kill the broker, which must be a :class:`KafkaBroker`.
    """
    rules = Rules(dead_letters=True)
    actions = fault_plan(seed, seconds, session_timeout=rules.session_timeout, outages=outages)
    run = Run(kafka, folder, "churn", seed, [Settings(transport, rules)])

    def scenario(run: Run) -> None:
        run.start(3)
        run.feed(messages.work_records(seed, run.partitions, exits=0.01, poison=0.01), RATE)
        run.wait_for_first_task()
        run.execute(actions)
        run.wait(SETTLE_SECONDS)

    return perform(run, scenario)


def broker_outage(kafka: KafkaBroker, folder: Path, seed: int) -> list[Outcome]:
    """Stop, kill and start the only broker."""
    # librdkafka drops its partitions by itself after a session without a broker.
    run = Run(
        kafka, folder, "broker away", seed, _group_per_transport(Rules(dead_letters=True, session_timeout=LONG_SESSION))
    )
    kinds = random.Random(f"broker {seed}").sample([BROKER_STOP, BROKER_KILL], 2)

    def scenario(run: Run) -> None:
        run.start(2)
        run.feed(messages.work_records(seed, run.partitions), RATE / 3)
        run.wait_for_first_task()
        for kind in kinds:
            run.wait(2)
            run.broker_outage(kind, OUTAGE_SECONDS)

    return perform(run, scenario)


def first_start_killed(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """Kill the first consumer of a new group before its first commit, and start others."""
    # With a short session the others soon get the partitions.
    rules = Rules(session_timeout=SHORT_SESSION, commit_interval=5)
    run = Run(kafka, folder, "first start killed", seed, _group_per_transport(rules), partitions=2)
    chance = random.Random(f"first {seed}")

    def scenario(run: Run) -> None:
        run.feed(messages.work_records(seed, run.partitions), RATE)
        run.start(1)
        run.wait_for_first_task()
        run.wait(chance.uniform(0.2, 0.8))
        for fleet in run.fleets:
            run.wait_until_busy(fleet, fleet.names[0])
            fleet.kill(fleet.names[0])
        run.start(2)
        run.wait(3)

    return perform(run, scenario)


def partitions_added(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """Add partitions to a consumed topic, and send messages to them at once."""
    run = Run(kafka, folder, "partitions added", seed, _group_per_transport(Rules()), partitions=2)
    before, after = 150, 300

    def scenario(run: Run) -> None:
        run.start(2)
        run.feed(islice(messages.work_records(seed, 2), before), RATE)
        run.wait_for_first_task()
        run.wait_for_feeding(30)
        run.add_partitions(6)
        run.feed(islice(messages.work_records(seed, 6, first=before), after), RATE)
        run.wait_for_feeding(30)

    return perform(run, scenario)


def long_task(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """Run a task for ten times max.poll.interval.ms; other consumers join when half of this time has passed."""
    # Consumers limit the revoke_timeout to a third of the poll interval.
    rules = Rules(session_timeout=SHORT_SESSION, poll_interval=SHORT_SESSION, revoke_timeout=SHORT_SESSION / 3)
    interval = {"max_poll_interval_ms": int(SHORT_SESSION * 1000)}
    run = Run(kafka, folder, "long task", seed, _group_per_transport(rules, config=interval), partitions=2)
    chance = random.Random(f"long {seed}")

    def scenario(run: Run) -> None:
        run.start(1)
        long = [messages.work_record("long", 0, None, chance, seconds=10 * SHORT_SESSION + 0.1)]
        run.feed(chain(long, messages.work_records(seed, 2)), 20)
        run.wait_for_first_task()
        run.wait(5 * SHORT_SESSION)
        for fleet in run.fleets:
            fleet.start()
        run.wait(6 * SHORT_SESSION)

    return perform(run, scenario)


def random_payloads(kafka: Kafka, folder: Path, seed: int, count: int = PAYLOADS) -> list[Outcome]:
    """Send random payloads between valid messages, and kill a consumer meanwhile."""
    run = Run(kafka, folder, "random payloads", seed, _group_per_transport(Rules(dead_letters=True)), partitions=4)
    chance = random.Random(f"between {seed}")
    valid = list(islice(messages.work_records(seed, 4), count // 20))
    # Valid messages keep their order, and payloads get random positions between them.
    positioned = [((number + 1) / len(valid), record) for number, record in enumerate(valid)]
    positioned += [(chance.random(), record) for record in messages.random_payloads(seed, count, 4)]
    records = [record for _, record in sorted(positioned, key=lambda pair: pair[0])]

    def scenario(run: Run) -> None:
        run.start(2)
        run.feed(records, 2000)
        run.wait_for_first_task()
        run.wait(chance.uniform(0, 2))
        for fleet in run.fleets:
            run.kill_at_work(fleet)
        run.wait_for_feeding(60)

    return perform(run, scenario)


def leader_outage(cluster: Cluster, folder: Path, seed: int) -> list[Outcome]:
    """Kill the leader of a partition, and then the leader of the committed offsets."""
    run = Run(cluster, folder, "leader lost", seed, _group_per_transport(Rules(dead_letters=True)), partitions=4)

    def scenario(run: Run) -> None:
        run.start(2)
        run.feed(messages.work_records(seed, run.partitions), RATE / 3)
        run.wait_for_first_task()
        for topic in (run.topic, OFFSETS):
            run.wait(2)
            run.leader_outage(topic, LEADER_OUTAGE_SECONDS)

    return perform(run, scenario)
