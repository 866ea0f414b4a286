"""Property test of the work queue: two consumers of a group never lose, reorder or needlessly repeat a record.

Hypothesis makes up what happens: records arrive, are polled, taken, finished, tried again, given up after their
TIME_LIMIT; offsets are committed or not; partitions are revoked, return, move to the other consumer, are lost;
consumers are killed and started again. ``KSER_TEST_PROPERTY_CASES`` says how much of it,
``KSER_TEST_PROPERTY_SEED`` repeats a run.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.consumer.group_model import Group

CASES = int(os.environ.get("KSER_TEST_PROPERTY_CASES") or (20_000 if os.environ.get("CI") == "true" else 2_000))
SEED = int(os.environ.get("KSER_TEST_PROPERTY_SEED") or random.randrange(2**32))
#: What happens in one example, and how many examples so many cases are.
STEPS = 60
CASES_PER_EXAMPLE = 5


@pytest.mark.slow
def test_random_events_neither_lose_duplicate_nor_reorder_records(capsys: pytest.CaptureFixture[str]) -> None:
    examples = max(CASES // CASES_PER_EXAMPLE, 1)
    run_state_machine_as_test(
        seed(SEED)(Group),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with capsys.disabled():
        print(f"\n{examples} examples of up to {STEPS} steps, KSER_TEST_PROPERTY_SEED={SEED}")
