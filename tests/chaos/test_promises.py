"""Tests of the promise checks: a broken promise in a history is reported, and a kept one is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from tests.chaos import hits, ledger, promises
from tests.chaos.history import (
    BROKER_KILL,
    FENCED,
    JOIN,
    KILL,
    MORE_PARTITIONS,
    MOVED,
    NEW_TOPIC,
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


def test_message_whose_task_succeeds_may_not_be_dead_lettered() -> None:
    log = [LOG[0]._replace(succeeds=True), LOG[1]._replace(succeeds=True), LOG[2]]
    history = history_of(*ALL_DONE[:2], dead=[letter("b", 2), letter("c", 3, 1)], log=log, rules=LETTERS)
    assert promises.unfinished(history) == []
    (violation,) = promises.wrongly_failed(history)
    assert violation.text == "1 messages failed although their tasks succeed"
    assert "subject='b'" in str(violation), "the evidence"


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
    assert finished_above(100, "id:5f2c09ab starts:2 kser:1,2;0123abcd;\0") == {101, 102}
    assert finished_above(100, "id:5f2c09ab starts:2;0123abcd;") == frozenset()
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


# -- 3: duplicates of a fenced process --------------------------------------------------------------------------------


def fenced(at: float, until: float) -> Fault:
    return Fault(FENCED, "one", at, until, "two")


def test_message_running_when_its_process_is_fenced_may_be_duplicated() -> None:
    lines = ("1.0 one start a", "2.0 two up", "2.2 two start a", "2.3 two end a", "4.0 one end a")
    assert cause(*lines, faults=[fenced(1.5, 4.5)]) == "running at member fenced"


def test_message_committed_before_its_process_is_fenced_may_not_be_duplicated() -> None:
    lines = ("1.0 one start a", "1.8 one end a", "2.0 two up", "2.2 two start a", "2.3 two end a")
    assert cause(*lines, faults=[fenced(1.5, 3)]) == "not yet committed at member fenced"
    assert cause(*lines, faults=[fenced(1.5, 3)], samples=[sample(1.9, 1, 2)]) is None


def test_message_that_ended_long_before_its_process_is_fenced_may_not_be_duplicated() -> None:
    lines = ("1.0 one start a", "1.1 one end a", "9.0 two up", "9.2 two start a", "9.3 two end a")
    assert cause(*lines, faults=[fenced(1.5, 10)]) is None


def test_fenced_process_that_has_not_noticed_it_may_start_what_its_successor_ran() -> None:
    lines = ("2.0 two up", "2.2 two start a", "2.3 two end a", "2.4 one start a", "2.5 one end a")
    assert cause(*lines, faults=[fenced(1.5, 3)]) == "running at member fenced"
    early = ("1.6 two start a", "1.7 two end a", "1.8 one start a", "1.9 one end a", "2.0 two up")
    assert cause(*early, faults=[fenced(1.5, 3)]) is None, "the successor was no member yet"


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


# -- 6: fenced processes -----------------------------------------------------------------------------------------------


def test_fenced_process_that_starts_messages_long_after_its_successor_is_reported() -> None:
    lines = ("2.0 two up", "2.2 two start a", "2.3 two end a", "2.4 one start b", "9.0 one start c")
    (violation,) = promises.started_when_fenced(history_of(*lines, faults=[fenced(1.5, 9.5)]))
    assert violation.text == "fenced processes started 1 messages"
    assert "subject='c'" in str(violation), "the evidence"
    assert promises.started_when_fenced(history_of(*lines[:-1], faults=[fenced(1.5, 9.5)])) == []
    assert promises.started_when_fenced(history_of(*lines, faults=[kill(1.5)])) == []


# -- histories of two parts --------------------------------------------------------------------------------------------

#: The offsets of the group move back from 2 to 1 while no process runs.
MOVE = Fault(MOVED, "", 5, 5.1)


def after_move(*lines: str, samples: Sequence[Sample] = ()) -> History:
    """Return the history after the messages ``a`` and ``b`` ran and the committed offset was moved back to ``b``."""
    whole = history_of(*ALL_DONE[:4], *lines, samples=[sample(1.6, 2, 4), *samples])
    last = whole.divide(MOVE, LOG, lambda entry: entry.at < 5)
    last.log = LOG[1:]
    return last


AGAIN = ("6.0 two start b", "6.1 two end b", "6.2 two start c", "6.3 two end c")


def test_messages_from_a_moved_offset_on_must_run_again() -> None:
    assert promises.violations(after_move(*AGAIN, samples=[sample(5.2, 1, 4), sample(6.4, 3, 8)])) == []
    (violation,) = promises.violations(after_move(*AGAIN[2:]))
    assert violation.text == "1 of 2 messages were not finished"


def test_message_below_a_moved_offset_may_not_run_again() -> None:
    (violation,) = promises.violations(after_move("5.9 two start a", *AGAIN, "6.4 two end a"))
    assert violation.text == "1 messages ran that are not in the log"


def test_commit_that_covers_a_message_before_it_runs_again_is_reported() -> None:
    assert promises.covered_unfinished(after_move(*AGAIN, samples=[sample(6.05, 2, 5), sample(6.4, 3, 8)])) == ["b"]


def test_broken_promise_of_the_earlier_part_is_reported() -> None:
    last = after_move(*AGAIN)
    assert last.earlier is not None
    last.earlier.samples.insert(0, sample(1.25, 2, 2))
    (violation,) = promises.violations(last)
    assert violation.promise == 2


def test_message_that_ran_before_the_new_topic_was_noticed_may_run_again_and_has_no_order() -> None:
    created = Fault(NEW_TOPIC, "", 0.5, 0.9)
    lines = ("1.0 one start c", "1.1 one end c", *(line.replace("1.", "2.", 1) for line in ALL_DONE))
    assert cause(*lines, faults=[created]) == "started before the consumer noticed: topic created again"
    assert promises.violations(history_of(*lines, faults=[created])) == []
    assert cause(*lines) is None
    assert promises.out_of_order(history_of(*lines))
    late = ("8.0 one start c", "8.1 one end c", *(line.replace("1.", "9.", 1) for line in ALL_DONE))
    assert cause(*late, faults=[created]) is None
    assert promises.out_of_order(history_of(*late, faults=[created]))


# -- faults that hit ------------------------------------------------------------------------------------------------


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


def test_fencing_hits_only_a_process_at_work_whose_successor_works() -> None:
    lines = ("1.0 one start a", "2.0 two up", "3.0 two start a", "3.1 two end a", "4.0 one end a")
    assert hits.hits(history_of(*lines, faults=[fenced(1.5, 4.5)])) == {FENCED: 1}
    assert hits.hits(history_of(*lines[:2], lines[4], faults=[fenced(1.5, 4.5)])) == {}
    assert hits.hits(history_of("1.0 one start a", "1.9 one end a", *lines[1:4], faults=[fenced(1.5, 4.5)])) == {}


def test_new_topic_hits_only_when_a_message_of_the_old_topic_was_running() -> None:
    created = Fault(NEW_TOPIC, "", 1.05, 1.15)
    for at, count in ((1.05, {NEW_TOPIC: 1}), (1.15, {})):
        fault = created._replace(at=at)
        history = history_of(*ALL_DONE).divide(fault, LOG[:1], lambda entry: entry.subject == "a")
        assert hits.hits(history) == count


def test_moved_offsets_hit_only_when_finished_messages_run_again_in_both_directions() -> None:
    log = [
        LoggedRecord(f"{partition}{offset}", partition, offset, None) for partition in (0, 1) for offset in (0, 1, 2)
    ]
    lines = [
        f"1.0 one {event} {record.subject}" for record in log if record.subject != "10" for event in ("start", "end")
    ]
    committed = Sample(1.5, {0: 3, 1: 0}, {1: frozenset({1, 2})}, 10, 0, 6)
    history = history_of(*lines, log=log, samples=[committed]).divide(MOVE, log, lambda entry: entry.at < 5)
    for back, forward, count in ((2, 1, 1), (3, 1, 0), (2, 0, 0), (2, 3, 0)):
        starts = {0: back, 1: forward}
        history.log = [record for record in log if record.offset >= starts[record.partition]]
        assert hits.hits(history)[MOVED] == count


def test_joins_exits_long_tasks_and_random_payloads_are_counted_as_hits() -> None:
    log = [LOG[0], LoggedRecord("new", 1, 0, None), LoggedRecord("x1", 0, 1, None)]
    lines = ("1 one start a", "2 one exit a", "3 two start a", "99 two end a", "4 two start new", "5 two end new")
    faults = [Fault(JOIN, "two", 2.5, 2.5), Fault(JOIN, "three", 2.5, 2.5), Fault(MORE_PARTITIONS, "", 3.5, 3.6)]
    rules = Rules(poll_interval=2, dead_letters=True)
    expected = {JOIN: 1, MORE_PARTITIONS: 1, hits.EXIT: 1, hits.LONG_TASK: 1, hits.RANDOM_PAYLOAD: 1}
    assert hits.hits(history_of(*lines, log=log, faults=faults, rules=rules, dead=[letter("x1", 6)])) == expected
