"""Tests of the group commit when KeyboardInterrupt reaches one of its threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

import pytest

from kser.store.sql.group_commit import GroupCommit, PendingWrite
from tests.support import WAIT_SECONDS, wait_until


def test_group_commit_continues_after_an_interrupted_follower() -> None:
    """durability rule 14: otherwise no later thread would become the leader."""
    gate, entered = threading.Event(), threading.Event()

    def write_batch(writes: Sequence[PendingWrite[str]]) -> None:
        if writes[0].item == "slow":
            entered.set()
            gate.wait(WAIT_SECONDS)
        for write in writes:
            write.result = write.item

    group: GroupCommit[str] = GroupCommit(write_batch, 1)
    leader = threading.Thread(target=group.write, args=("slow",))
    leader.start()
    assert entered.wait(WAIT_SECONDS)

    def interrupt_follower() -> None:
        wait_until(lambda: group._waiting)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt_follower)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        group.write("interrupted")
    gate.set()
    leader.join()
    interrupter.join()
    assert (group.write("late"), list(group._waiting), group._leading) == ("late", [], 0)


def test_group_commit_lead_is_handed_over_by_an_interrupted_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 14"""

    def write_batch(writes: Sequence[PendingWrite[str]]) -> None:
        for write in writes:
            write.result = write.item

    def interrupt(_write: PendingWrite[str]) -> None:
        raise KeyboardInterrupt

    group: GroupCommit[str] = GroupCommit(write_batch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(group, "_lead", interrupt)
        with pytest.raises(KeyboardInterrupt):
            group.write("interrupted")
    assert (group.write("late"), group._leading) == ("late", 0)
