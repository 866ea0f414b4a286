"""Long chaos run: consumers join and die, and the broker goes down about once a minute, for a chosen time."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos import report, scenarios
from tests.kafka.broker import KafkaBroker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("KSER_TEST_CHAOS_SECONDS") or 1800))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("KSER_TEST_CHAOS_SEED") or 0))
    parser.add_argument("--transport", choices=scenarios.TRANSPORTS, default=scenarios.TRANSPORTS[0])
    parser.add_argument("--keep", type=Path, help="a folder for ledgers and logs, which are deleted otherwise")
    arguments = parser.parse_args()
    seed = arguments.seed or random.randrange(1, 1_000_000)
    print(f"seed {seed}, {arguments.seconds:g} s, {arguments.transport}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kser-chaos-") as temporary_folder, KafkaBroker() as kafka:
        folder = arguments.keep or Path(temporary_folder)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = scenarios.churn(kafka, folder, seed, arguments.seconds, arguments.transport, outages=True)
    report.add_to_table(outcomes)
    for outcome in outcomes:
        print(report.text(outcome))
        for text in outcome.violations:
            print(text)
    return 1 if any(outcome.violations for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
