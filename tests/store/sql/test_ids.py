"""Tests of the ids of operations."""

from __future__ import annotations

import time

import pytest

from kser.store.sql import SQLStore
from kser.store.sql.ids import ID_EPOCH, IdGenerator, id_at, time_of
from tests.store.harness import new_operation, save_and_claim


def test_ids_contain_their_time_and_fit_until_2091() -> None:
    now = time.time()
    ids = IdGenerator()
    first_ids = [ids.next_ids(now, 3) for _ in range(5)]
    assert first_ids == sorted(set(first_ids))
    assert all(time_of(first) == pytest.approx(now, abs=1e-3) for first in first_ids)
    assert first_ids[1] >= first_ids[0] + 3
    assert id_at(ID_EPOCH + 71 * 365 * 86400).bit_length() <= 63


def test_ids_increase_even_when_the_clock_steps_back() -> None:
    ids = IdGenerator()
    assert ids.next_ids(ID_EPOCH + 1000, 1) < ids.next_ids(ID_EPOCH + 10, 1) < ids.next_ids(0, 1)


def test_duplicate_id_is_replaced(any_store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes may generate the same id in one millisecond."""
    duplicate_id = save_and_claim(any_store, new_operation(1)).id
    ids = any_store._writer.saves._ids
    next_ids, duplicate = ids.next_ids, iter([duplicate_id])
    monkeypatch.setattr(ids, "next_ids", lambda now, count: next(duplicate, None) or next_ids(now, count))
    root = new_operation(1)
    claim = save_and_claim(any_store, root)
    assert (claim.root.uuid, claim.epoch) == (root.uuid, 1)
    assert claim.id != duplicate_id
    assert next(duplicate, None) is None
