"""Process that works with a store: it runs the command of its arguments when it reads a line, and prints a number."""

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


def make(store: SQLStore) -> int:
    """Save an operation and run it; return 1."""
    return int(store.checkpoint(ending_checkpoint(save_and_claim(store, new_operation(1)), 0)) == "SUCCESS")


def work(store: SQLStore) -> int:
    """Claim and run every operation that is free; return their number."""
    done = 0
    for row in store.find(OperationQuery(), 1000).rows:
        claim = store.claim(row.uuid, row.target.uuid, claim_request(unique_name()))
        if isinstance(claim, Claim):
            store.checkpoint(step_checkpoint(claim, 0))
            store.checkpoint(ending_checkpoint(claim, 1))
            done += 1
    return done


if __name__ == "__main__":
    command, uri = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    with contextlib.closing(SQLStore(uri)) as store:
        print({"make": make, "work": work}[command](store), flush=True)
