"""States of tasks and operations and the transitions between them, defined only here."""

from __future__ import annotations

from typing import Final

from cdumay_result import Result

PENDING: Final = "PENDING"
RUNNING: Final = "RUNNING"
SUCCESS: Final = "SUCCESS"
FAILED: Final = "FAILED"
CANCELLED: Final = "CANCELLED"

#: Allowed transitions: the states that may follow each state. A resume changes FAILED or CANCELLED to RUNNING.
TRANSITIONS: Final[dict[str, frozenset[str]]] = {
    PENDING: frozenset({RUNNING, CANCELLED}),
    RUNNING: frozenset({SUCCESS, FAILED, CANCELLED}),
    SUCCESS: frozenset(),
    FAILED: frozenset({RUNNING}),
    CANCELLED: frozenset({RUNNING}),
}

#: Final states of an operation.
FINAL: Final = frozenset({SUCCESS, FAILED, CANCELLED})


def is_final(state: str) -> bool:
    """Return whether ``state`` is a final state of an operation."""
    return state in FINAL


def can_transition(old: str, new: str) -> bool:
    """Return whether a *stored* operation may change from ``old`` to ``new``.

    kser does not check the transitions of operations that are not stored, because users may set states of their own for
    these operations (decision S1). A state that is not in :data:`TRANSITIONS` has no transition.
    """
    return new in TRANSITIONS.get(old, ())


def final_status(*results: Result | None) -> str:
    """Return the final state of a task or operation with these results.

    The state is SUCCESS if no return code is above zero, else FAILED.

    None counts as a blank result. A negative return code is not a failure: a merge keeps the higher return code, so a
    Result with a negative return code, merged into a blank Result, gives the return code 0 (decision C3).

    :raises AttributeError: one of the results is not a Result.
    :raises TypeError: a return code is not a number.
    """
    worst = 0
    for result in results:
        if result:
            worst = worst if worst > result.retcode else result.retcode
    return FAILED if worst else SUCCESS
