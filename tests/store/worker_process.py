"""Process that uses a store: it runs a command when it reads a line, and prints how many operations it ran."""

from __future__ import annotations

import contextlib
import sys

from kser.store.model import Claim, OperationQuery
from kser.store.sql import SQLStore
from tests.store.harness import (
    claim_request,
    ending_checkpoint,
    new_operation,
    save_and_claim,
    step_checkpoint,
    unique_name,
)


def save_and_run(store: SQLStore) -> int:
    """Save an operation and run it to its end; return 1."""
    return int(store.checkpoint(ending_checkpoint(save_and_claim(store, new_operation(1)), 0)) == "SUCCESS")


def claim_and_run_all(store: SQLStore) -> int:
    """Claim and run each operation that no other process has claimed; return their number."""
    count = 0
    for row in store.find(OperationQuery(), 1000).rows:
        claim = store.claim(row.uuid, row.target.uuid, claim_request(unique_name()))
        if isinstance(claim, Claim):
            store.checkpoint(step_checkpoint(claim, 0))
            store.checkpoint(ending_checkpoint(claim, 1))
            count += 1
    return count


COMMANDS = {"save_and_run": save_and_run, "claim_and_run_all": claim_and_run_all}

if __name__ == "__main__":
    command, uri = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    with contextlib.closing(SQLStore(uri)) as store:
        print(COMMANDS[command](store), flush=True)
