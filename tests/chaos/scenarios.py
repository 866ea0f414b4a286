"""Scenarios of the chaos tests, one function per kind of fault."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from tests.chaos import messages
from tests.chaos.cluster import OFFSETS, Cluster
from tests.chaos.fleet import CONFLUENT, PYTHON_KAFKA, Settings
from tests.chaos.history import BROKER_KILL, BROKER_STOP, Fault, History, LoggedRecord, Rules, Sample
from tests.chaos.plan import OUTAGE_SECONDS, SETTLE_SECONDS, fault_plan, fence_plan
from tests.chaos.run import Outcome, Run, perform
from tests.kafka.broker import Kafka, KafkaBroker
from tests.kafka.hostile import hostile_records, shuffled

TRANSPORTS = (PYTHON_KAFKA, CONFLUENT)

#: Messages per second.
RATE = 80.0
#: The number of payloads that are no messages.
PAYLOADS = 10_000
#: The number of hostile records per second, so that they arrive while the payloads do.
HOSTILE_RATE = 20.0
#: The number of messages that are sent at once, and their number per second.
BACKLOG, FAST = 200, 400.0
#: The number of the first message of a topic that was created again.
AFTER = 100_000
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
    """Send random payloads and hostile records between valid messages, and kill a consumer meanwhile."""
    run = Run(kafka, folder, "random payloads", seed, _group_per_transport(Rules(dead_letters=True)), partitions=4)
    chance = random.Random(f"between {seed}")
    valid = list(islice(messages.work_records(seed, 4), count // 20))
    # Valid messages keep their order, and payloads get random positions between them.
    positioned = [((number + 1) / len(valid), record) for number, record in enumerate(valid)]
    positioned += [(chance.random(), record) for record in messages.random_payloads(seed, count, 4)]
    records = [record for _, record in sorted(positioned, key=lambda pair: pair[0])]
    hostile = shuffled(hostile_records(messages.WORK), seed)

    def scenario(run: Run) -> None:
        run.start(2)
        run.feed(records, 2000)
        run.feed_hostile_records(hostile, HOSTILE_RATE)
        run.wait_for_first_task()
        run.wait(chance.uniform(0, 2))
        for fleet in run.fleets:
            run.kill_at_work(fleet)
        run.wait_for_feeding(60)

    return perform(run, scenario)


def member_fenced(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """Start second processes with the group instance ids of consumers, and kill and terminate others meanwhile."""
    rules = Rules(shutdown_timeout=5)
    run = Run(kafka, folder, "member fenced", seed, _group_per_transport(rules, has_instances=True))

    def scenario(run: Run) -> None:
        run.start(3)
        run.feed(messages.work_records(seed, run.partitions), RATE)
        run.wait_for_first_task()
        run.execute(fence_plan(seed))
        run.wait(SETTLE_SECONDS)

    return perform(run, scenario)


def topic_created_again(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """Delete the topic while its messages run, create it again, and send messages to the new topic at once.

    The deleted messages need not be finished, so the outcome has the new topic as its log.
    """
    run = Run(kafka, folder, "topic created again", seed, _group_per_transport(Rules()), partitions=4)
    divisions: list[tuple[Fault, list[LoggedRecord]]] = []
    old, new = messages.work_records(seed, 4), messages.work_records(seed + 1, 4, first=AFTER)

    def scenario(run: Run) -> None:
        gate = folder / "gate"
        run.start(2)
        run.feed(old, RATE)
        run.wait_for_tasks_of_all()
        run.stop_feeding()
        # Consumers must not finish the messages of the old topic before it is deleted.
        run.feed(chain(messages.gated_records(str(gate), 4), islice(old, BACKLOG)), FAST)
        run.wait_for_feeding(30)
        run.wait_for_gated_starts()
        divisions.append(run.create_topic_again())
        run.feed(islice(new, BACKLOG), FAST)
        gate.touch()
        run.wait_for_feeding(30)

    outcomes = perform(run, scenario)
    for fault, before in divisions:
        subjects = {record.subject for record in before}
        outcomes = [
            replace(each, history=each.history.divide(fault, before, lambda entry: entry.subject in subjects))  # noqa: B023
            for each in outcomes
        ]
    return outcomes


def offsets_moved(kafka: Kafka, folder: Path, seed: int) -> list[Outcome]:
    """Move committed offsets of a group without members, back and forward, and keep their metadata.

    Before that, a message in each partition is unfinished, so that the metadata lists finished messages. The group must
    run each message from the moved offset on, and no other. One partition keeps its offset.
    """
    rules = Rules(shutdown_timeout=1)
    run = Run(kafka, folder, "offsets moved", seed, _group_per_transport(rules, workers=8), partitions=4)
    chance = random.Random(f"moved {seed}")
    moves: dict[str, tuple[Fault, Sample]] = {}
    records = messages.work_records(seed, 4)

    def scenario(run: Run) -> None:
        gate = folder / "gate"
        run.start(2)
        run.feed(records, RATE)
        run.wait_for_tasks_of_all()
        run.stop_feeding()
        run.feed(chain(messages.gated_records(str(gate), 4), islice(records, 100)), FAST)
        run.wait_for_feeding(30)
        run.wait_for_gated_tasks()
        for fleet in run.fleets:
            fleet.finish()
            back, forward = -chance.randrange(1, 6), chance.randrange(2, 8)
            moves[fleet.settings.transport] = run.move_offsets(fleet, {0: back, 1: -1, 2: forward})
        gate.touch()
        run.start(2)
        run.feed(islice(records, 100), RATE)
        run.wait_for_feeding(30)

    outcomes = perform(run, scenario)
    return [
        replace(outcome, history=_after_move(outcome.history, *moves[outcome.transport]))
        if outcome.transport in moves
        else outcome
        for outcome in outcomes
    ]


def _after_move(history: History, fault: Fault, start: Sample) -> History:
    """Return the history from moved offsets on; its log is the records that the group must run from then on."""
    last = history.divide(fault, history.log, lambda entry: entry.at < fault.at)
    return replace(last, log=[record for record in history.log if not start.covers(record)])


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
