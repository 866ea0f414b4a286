"""Long chaos run of operations on Apache Kafka with PostgreSQL or SQLite, with random faults."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.chaos_operations import report
from tests.chaos_operations.databases import LockedSqlite, StoppedPostgresql
from tests.chaos_operations.run import ChaosRun
from tests.kafka.broker import KafkaBroker
from tests.postgres import Postgresql

DATABASES = ("postgresql", "sqlite")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos_operations", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="seconds during which operations are sent")
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=DATABASES, default=DATABASES[0])
    parser.add_argument("--keep", type=Path, help="a folder for ledgers and logs, which are deleted otherwise")
    parser.add_argument(
        "--table", type=Path, help="the file to which the figures are added, such as docs/promises-operations.csv"
    )
    arguments = parser.parse_args()
    seed = arguments.seed or random.randrange(1, 1_000_000)
    print(f"seed {seed}, {arguments.seconds:g} s, {arguments.operations} operations, {arguments.database}", flush=True)
    with ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kser-operations-")))
        folder.mkdir(parents=True, exist_ok=True)
        kafka = stack.enter_context(KafkaBroker())
        if arguments.database == "sqlite":
            database = LockedSqlite(folder)
        else:
            database = StoppedPostgresql(stack.enter_context(Postgresql()))
        outcome = ChaosRun(kafka, database, folder, seed, arguments.operations, arguments.seconds).perform()
    report.add_to_table([outcome], arguments.table)
    if arguments.keep is not None:
        faults = sorted(outcome.history.faults, key=lambda fault: fault.at)
        lines = [f"{fault.at:.3f} {fault.until:.3f} {fault.kind} {fault.process}\n" for fault in faults]
        (folder / "faults.txt").write_text("".join(lines))
    print(report.text(outcome))
    for text in outcome.violations:
        print(text)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
