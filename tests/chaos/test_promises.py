"""Tests of the promise checks: a broken promise in a history is reported, and a kept one is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from tests.chaos import hits, ledger, promises
from tests.chaos.history import (
    BROKER_KILL,
    JOIN,
    KILL,
    MORE_PARTITIONS,
    STOP,
    TERM,
    DeadLetter,
    Fault,
    History,
    LoggedRecord,
    Rules,
    Sample,
)
from tests.chaos.observer import finished_above

#: Three messages with one key, in one partition.
LOG = [LoggedRecord(subject, 0, offset, "key") for offset, subject in enumerate("abc")]

LETTERS = Rules(dead_letters=True)


def history_of(
    *lines: str,
    faults: Sequence[Fault] = (),
    samples: Sequence[Sample] = (),
    dead: Sequence[DeadLetter] = (),
    log: Sequence[LoggedRecord] = LOG,
    rules: Rules | None = None,
) -> History:
    """Return a history whose ledger has these lines.

    :param lines: ``1.5 one start a`` is the start of ``a`` in the process ``one`` at 1.5 s. The ledger position of a
        line is its number, counted from 1.
    """
    entries = []
    for position, line in enumerate(lines, 1):
        at, process, event, *subject = line.split()
        entries.append(ledger.Entry(event, "".join(subject) or "-", process, float(at), position))
    return History(rules or Rules(), list(log), entries, list(samples), list(faults), list(dead))


def sample(at: float, committed: int | None, position: int = 0, **more: object) -> Sample:
    """Return a sample.

    :param committed: the committed offset of partition 0.
    :param position: the number of ledger lines at that time.
    """
    offsets: Mapping[int, int] | None = None if committed is None else {0: committed}
    fields: dict[str, object] = {"finished_above": {}, "dead_letter_count": 0, "log_size": 3, **more}
    return Sample(at=at, committed=offsets, ledger_position=position, **fields)  # type: ignore[arg-type]


def letter(subject: str, at: float, position: int = 0, process: str = "one") -> DeadLetter:
    return DeadLetter(subject, process, at, position)


ALL_DONE = (
    *("1.0 one start a", "1.1 one end a"),
    *("1.2 one start b", "1.3 one end b"),
    *("1.4 one start c", "1.5 one end c"),
)


def test_run_without_faults_breaks_no_promise() -> None:
    history = history_of(*ALL_DONE, samples=[sample(2, 3, 6)])
    assert promises.violations(history) == []
    assert promises.duplicates(history) == []


# -- 1: every message is finished --------------------------------------------------------------------------------------


def test_message_that_never_started_is_reported_as_missing() -> None:
    (violation,) = promises.unfinished(history_of(*ALL_DONE[:4]))
    assert "1 of 3 messages were not finished" in str(violation)
    assert "LoggedRecord(subject='c'" in str(violation), "the evidence"


def test_message_that_never_ended_is_reported_as_missing() -> None:
    assert promises.unfinished(history_of(*ALL_DONE[:5]))


def test_dead_letter_finishes_a_message() -> None:
    assert not promises.unfinished(history_of(*ALL_DONE[:4], dead=[letter("c", 2)], rules=LETTERS))


def test_failed_message_is_missing_only_with_dead_letters_enabled() -> None:
    lines = (*ALL_DONE[:5], "1.5 one fail c")
    assert not promises.unfinished(history_of(*lines))
    assert promises.unfinished(history_of(*lines, rules=LETTERS))


# -- 2: commits --------------------------------------------------------------------------------------------------------


def test_commit_that_covers_a_running_message_is_reported() -> None:
    history = history_of(*ALL_DONE, samples=[sample(1.25, 2, 3)])
    assert promises.covered_unfinished(history) == ["b"]
    assert "covered by a commit while they were unfinished" in str(promises.committed_too_far(history)[0])


def test_commit_of_messages_finished_before_the_request_is_accepted() -> None:
    history = history_of(*ALL_DONE, samples=[sample(1.15, 1, 2), sample(1.35, 2, 4), sample(1.6, 3, 6)])
    assert promises.committed_too_far(history) == []


def test_invalid_commit_after_a_valid_one_is_reported() -> None:
    history = history_of(*ALL_DONE, samples=[sample(1.15, 1, 2), sample(1.2, 3, 2), sample(1.6, 3, 6)])
    assert promises.covered_unfinished(history) == ["b", "c"]


def test_metadata_that_marks_a_running_message_as_finished_is_reported() -> None:
    above = {0: frozenset({2})}
    assert promises.covered_unfinished(history_of(*ALL_DONE, samples=[sample(1.45, 1, 5, finished_above=above)])) == [
        "c"
    ]
    assert promises.covered_unfinished(history_of(*ALL_DONE, samples=[sample(1.6, 1, 6, finished_above=above)])) == []


def test_commit_ahead_of_its_dead_letter_is_reported() -> None:
    lines = (*ALL_DONE[:5], "1.5 one fail c")
    for dead_letter_count, subjects in ((0, ["c"]), (1, [])):
        samples = [sample(1.6, 3, 6, dead_letter_count=dead_letter_count)]
        history = history_of(*lines, dead=[letter("c", 2)], rules=LETTERS, samples=samples)
        assert promises.covered_unfinished(history) == subjects


def test_commit_metadata_is_read_as_documented() -> None:
    assert finished_above(100, "kser:1,14,2,3") == {*range(101, 121), *range(123, 126)}
    assert finished_above(7, "") == finished_above(7, None) == finished_above(7, "of another client") == frozenset()


# -- 3: duplicates -----------------------------------------------------------------------------------------------------


def cause(*lines: str, **recorded: object) -> str | None:
    """Return the cause of the only duplicate in a history."""
    (duplicate,) = promises.duplicates(history_of(*lines, **recorded))  # type: ignore[arg-type]
    return duplicate.cause


RUN_TWICE = ("1.0 one start a", "2.0 one end a", "9.0 two start a", "9.1 two end a")
INTERRUPTED = ("1.0 one start a", "9.0 two start a", "9.1 two end a")


def kill(at: float, process: str = "one") -> Fault:
    return Fault(KILL, process, at, at + 0.01)


def test_duplicate_message_without_a_fault_is_reported() -> None:
    (violation,) = promises.forbidden_duplicates(history_of(*RUN_TWICE))
    assert "1 messages were duplicated without cause" in str(violation)
    assert "9.000 start in two" in str(violation), "the evidence"


def test_message_running_at_sigkill_may_be_duplicated() -> None:
    assert cause(*INTERRUPTED, faults=[kill(1.5)]) == "running at SIGKILL"


def test_message_running_in_two_processes_without_a_fault_is_reported() -> None:
    assert cause("1.0 one start a", "1.5 two start a", "2.0 one end a", "2.1 two end a") is None


def test_kill_of_another_process_excuses_no_duplicate() -> None:
    assert cause(*RUN_TWICE, faults=[kill(2.1, "two"), kill(2.1, "three")]) is None


def test_kill_after_the_second_execution_began_excuses_no_duplicate() -> None:
    assert cause(*RUN_TWICE, faults=[kill(9.05)]) is None


def test_message_finished_just_before_sigkill_may_be_duplicated() -> None:
    assert cause(*RUN_TWICE, faults=[kill(2.9)]) == "not yet committed at SIGKILL"


def test_message_committed_before_sigkill_may_not_be_duplicated() -> None:
    assert cause(*RUN_TWICE, faults=[kill(2.9)], samples=[sample(2.5, 1, 2)]) is None
    above = {0: frozenset({0})}
    assert cause(*RUN_TWICE, faults=[kill(2.9)], samples=[sample(2.5, 0, 2, finished_above=above)]) is None


def test_message_finished_long_before_sigkill_may_not_be_duplicated() -> None:
    assert cause(*RUN_TWICE, faults=[kill(2 + 1 + promises.COMMIT_DELAY + 0.1)]) is None


def test_broker_outage_excuses_a_missing_commit() -> None:
    faults = [Fault(BROKER_KILL, "", 2.1, 7.1), kill(8.5)]
    assert cause(*RUN_TWICE, faults=faults) == "not yet committed at SIGKILL"


def test_each_duplicate_needs_a_cause_of_its_own() -> None:
    lines = (*INTERRUPTED, "9.5 three start a", "9.6 three end a")
    causes = [duplicate.cause for duplicate in promises.duplicates(history_of(*lines, faults=[kill(1.5)]))]
    assert causes == ["running at SIGKILL", "running at SIGKILL", None]
    assert promises.forbidden_duplicates(history_of(*lines, faults=[kill(1.5)]))
    assert not promises.forbidden_duplicates(history_of(*lines, faults=[kill(1.5), kill(9.2, "two")]))


def test_message_running_at_sigstop_past_the_session_may_be_duplicated() -> None:
    lines = ("1.0 one start a", "8.0 two start a", "8.1 two end a", "10.0 one end a")
    assert cause(*lines, faults=[Fault(STOP, "one", 1.5, 9.5)]) == "running at SIGSTOP"


def test_sigstop_shorter_than_the_session_excuses_no_duplicate() -> None:
    lines = ("1.0 one start a", "5.0 two start a", "5.1 two end a", "6.0 one end a")
    assert cause(*lines, faults=[Fault(STOP, "one", 1.5, 5.5)]) is None


def test_message_started_after_sigcont_may_not_be_duplicated() -> None:
    zombie = ("8.0 two start a", "8.1 two end a", "9.7 one start a", "9.8 one end a")
    assert cause(*zombie, faults=[Fault(STOP, "one", 1.5, 9.5)]) is None
    before = ("9.7 one start a", "9.8 one end a", "9.9 two start a", "9.95 two end a")
    assert cause(*before, faults=[Fault(STOP, "one", 1.5, 9.5)]) is None


def test_message_starting_at_sigstop_may_be_duplicated() -> None:
    lines = ("8.0 two start a", "8.1 two end a", "9.501 one start a", "9.6 one end a")
    assert cause(*lines, faults=[Fault(STOP, "one", 1.5, 9.5)]) == "running at SIGSTOP"


def test_message_outliving_shutdown_timeout_may_be_duplicated() -> None:
    term = [Fault(TERM, "one", 1.5, 4.6)]
    assert cause(*INTERRUPTED, faults=term, rules=Rules(shutdown_timeout=3)) == "longer than shutdown_timeout"


def test_message_ending_within_shutdown_timeout_may_not_be_duplicated() -> None:
    assert cause(*RUN_TWICE, faults=[Fault(TERM, "one", 1.5, 2.1)], rules=Rules(shutdown_timeout=3)) is None


def test_message_finished_just_before_sigterm_may_not_be_duplicated() -> None:
    assert cause(*RUN_TWICE, faults=[Fault(TERM, "one", 2.1, 2.2)]) is None


def test_message_outliving_revoke_timeout_may_be_duplicated() -> None:
    joined = [Fault(JOIN, "two", 3, 3)]
    lines = ("1.0 one start a", "9.0 two start a", "9.1 two end a", "20.0 one end a")
    assert cause(*lines, faults=joined, rules=Rules(revoke_timeout=5)) == "longer than revoke_timeout"
    assert cause(*lines, faults=joined, rules=Rules(revoke_timeout=10)) is None


def test_message_running_when_partitions_are_added_may_be_duplicated() -> None:
    added = [Fault(MORE_PARTITIONS, "", 1.5, 1.6)]
    lines = ("1.0 one start a", "2.0 two start a", "2.1 one end a", "2.2 two end a")
    assert cause(*lines, faults=added, rules=Rules(revokes_at_once=True)) == "running when partitions added"
    assert cause(*lines, faults=added) is None
    before = ("0.2 one start a", "0.9 one end a", "2.0 two start a", "2.2 two end a")
    assert cause(*before, faults=added, rules=Rules(revokes_at_once=True)) is None


def test_long_message_may_not_be_duplicated_without_a_rebalance() -> None:
    lines = ("1.0 one start a", "9.0 two start a", "9.1 two end a", "20.0 one end a")
    assert cause(*lines, rules=Rules(revoke_timeout=5)) is None


def test_short_message_may_not_be_duplicated_by_a_rebalance() -> None:
    assert cause(*RUN_TWICE, faults=[Fault(JOIN, "two", 2.1, 2.1)]) is None


def test_retry_after_a_failure_is_no_duplicate() -> None:
    lines = ("1.0 one start a", "1.1 one exit a", "1.2 one start a", "1.3 one end a")
    assert promises.duplicates(history_of(*lines, rules=LETTERS)) == []
    assert cause(*lines) is None, "without dead letters a failure is final"


def test_retry_after_a_dead_letter_is_a_duplicate() -> None:
    lines = ("1.0 one start a", "1.1 one fail a", "9.0 two start a", "9.1 two fail a")
    letters = [letter("a", 1.2), letter("a", 9.2, 1, "two")]
    assert cause(*lines, dead=letters, rules=LETTERS) is None
    assert cause(*lines, dead=letters, rules=LETTERS, faults=[kill(1.5)]) == "not yet committed at SIGKILL"


def test_two_dead_letters_for_one_attempt_are_a_duplicate() -> None:
    letters = [letter("a", 1.2), letter("a", 1.3, 1)]
    assert cause("1.0 one start a", "1.1 one fail a", dead=letters, rules=LETTERS) is None


def test_two_dead_letters_of_an_undecodable_payload_are_a_duplicate() -> None:
    letters = [letter("a", 1.2), letter("a", 9.2, 1, "two")]
    assert cause(dead=letters, rules=LETTERS) is None
    assert cause(dead=letters, rules=LETTERS, faults=[kill(1.5)]) == "not yet committed at SIGKILL"


def test_duplicate_messages_are_counted_once_per_cause() -> None:
    lines = (*INTERRUPTED, "9.5 three start a", "9.6 three end a")
    assert promises.duplicates_by_cause(history_of(*lines, faults=[kill(1.5), kill(9.05, "two")])) == {
        "running at SIGKILL": 1
    }


# -- 4: order ----------------------------------------------------------------------------------------------------------


OVERTAKEN = ("1.0 one start b", "1.1 one end b", "1.2 two start a", "1.3 two end a")
OVERLAPPING = ("1.0 one start a", "1.1 one start b", "1.2 one end a", "1.3 one end b")


def test_message_started_after_a_later_one_is_reported() -> None:
    assert promises.overtaken(history_of(*OVERTAKEN)) == ["b"]
    assert "started after a later message of their lane" in str(promises.out_of_order(history_of(*OVERTAKEN))[0])


def test_overlapping_messages_of_one_key_are_reported() -> None:
    assert promises.overlapping(history_of(*OVERLAPPING)) == ["b"]
    assert "started while the previous message of their lane was running" in str(
        promises.out_of_order(history_of(*OVERLAPPING))[0]
    )


@pytest.mark.parametrize("lines", [OVERTAKEN, OVERLAPPING])
@pytest.mark.parametrize("keys", [("one", "other", "third"), (None, None, None)], ids=["several keys", "no keys"])
def test_messages_of_different_keys_or_without_a_key_have_no_order(
    lines: Sequence[str], keys: Sequence[str | None]
) -> None:
    log = [record._replace(key=key) for record, key in zip(LOG, keys, strict=True)]
    assert promises.out_of_order(history_of(*lines, log=log)) == []
    assert promises.out_of_order(history_of(*lines, log=log, rules=Rules(ordering="partition")))


def test_redelivered_message_may_start_after_later_ones() -> None:
    again = ("2.0 two start a", "2.1 two end a")
    assert promises.out_of_order(history_of(*ALL_DONE, *again)) == []


# -- 5: progress -------------------------------------------------------------------------------------------------------


def test_group_without_progress_despite_lag_is_reported_as_stalled() -> None:
    samples = [sample(second, 1, 2) for second in range(32)]
    (violation,) = promises.stalls(history_of(*ALL_DONE[:2], samples=samples))
    assert violation.text == "no progress for 31.0 s with a lag of 2"
    assert "partition 0: committed 1, 0 finished above, of 3" in str(violation), "the evidence"


def test_idle_group_is_not_stalled() -> None:
    assert promises.stalls(history_of(samples=[sample(second, 3, 6) for second in range(100)])) == []


@pytest.mark.parametrize("growing", ["ledger", "commits"])
def test_slow_group_is_not_stalled(growing: str) -> None:
    samples = [
        sample(second, second // 25, 0, log_size=99)
        if growing == "commits"
        else sample(second, 1, second // 25, log_size=99)
        for second in range(100)
    ]
    history = history_of(samples=samples)
    assert promises.stalls(history) == []
    assert promises.longest_pause(history) == 24


def test_group_is_stalled_although_kafka_does_not_respond() -> None:
    samples = [sample(0, 1, 2), *(sample(second, None, 2) for second in range(1, 32))]
    assert promises.stalls(history_of(samples=samples))


# -- 6: faults that hit ------------------------------------------------------------------------------------------------


def test_fault_hits_only_a_process_at_work() -> None:
    faults = [kill(1.05), kill(1.15), Fault(TERM, "one", 1.25, 2), Fault(TERM, "two", 1.25, 2)]
    assert hits.hits(history_of(*ALL_DONE, faults=faults)) == {KILL: 1, TERM: 1, hits.FIRST_KILL: 1}


def test_sigstop_hits_only_when_longer_than_the_session() -> None:
    faults = [Fault(STOP, "one", 1.05, 8), Fault(STOP, "one", 1.05, 6)]
    assert hits.hits(history_of(*ALL_DONE, faults=faults)) == {STOP: 1}


def test_kill_counts_as_first_start_only_before_any_commit() -> None:
    assert hits.hits(history_of(*ALL_DONE, faults=[kill(1.25)], samples=[sample(1.1, 0)]))[hits.FIRST_KILL] == 1
    assert hits.hits(history_of(*ALL_DONE, faults=[kill(1.25)], samples=[sample(1.15, 1)]))[hits.FIRST_KILL] == 0


def test_outage_hits_only_with_work_before_and_after_it() -> None:
    outage = [Fault(BROKER_KILL, "", 1.15, 1.35)]
    assert hits.hits(history_of(*ALL_DONE, faults=outage, samples=[sample(1.2, None)])) == {BROKER_KILL: 1}
    assert hits.hits(history_of(*ALL_DONE, faults=outage, samples=[sample(1.2, 1)])) == {}
    assert hits.hits(history_of(*ALL_DONE[:4], faults=outage, samples=[sample(1.2, None)])) == {}


def test_joins_exits_long_tasks_and_random_payloads_are_counted_as_hits() -> None:
    log = [LOG[0], LoggedRecord("new", 1, 0, None), LoggedRecord("x1", 0, 1, None)]
    lines = ("1 one start a", "2 one exit a", "3 two start a", "99 two end a", "4 two start new", "5 two end new")
    faults = [Fault(JOIN, "two", 2.5, 2.5), Fault(JOIN, "three", 2.5, 2.5), Fault(MORE_PARTITIONS, "", 3.5, 3.6)]
    rules = Rules(poll_interval=2, dead_letters=True)
    expected = {JOIN: 1, MORE_PARTITIONS: 1, hits.EXIT: 1, hits.LONG_TASK: 1, hits.RANDOM_PAYLOAD: 1}
    assert hits.hits(history_of(*lines, log=log, faults=faults, rules=rules, dead=[letter("x1", 6)])) == expected
