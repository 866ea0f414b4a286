"""Property test of the work queue: two consumers of a group never lose, reorder or needlessly repeat a record.

Hypothesis generates sequences of events: records arrive, are fetched, started, finished, retried, or exceed their
TIME_LIMIT; commits succeed or fail; partitions are revoked, reassigned, moved to the other consumer, or lost; consumers
are killed and restarted. ``KSER_TEST_PROPERTY_CASES`` is the number of cases, and ``KSER_TEST_PROPERTY_SEED`` the seed
of a run to repeat.
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
#: The maximum number of events in an example.
STEPS = 60
#: The number of cases that count as one example.
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
