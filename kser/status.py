"""States of tasks and operations, and the transitions between them: the one place that knows either."""

from __future__ import annotations

from typing import Final

from cdumay_result import Result

PENDING: Final = "PENDING"
RUNNING: Final = "RUNNING"
SUCCESS: Final = "SUCCESS"
FAILED: Final = "FAILED"
CANCELLED: Final = "CANCELLED"

#: What may follow a state. FAILED and CANCELLED go back to RUNNING when somebody resumes.
TRANSITIONS: Final[dict[str, frozenset[str]]] = {
    PENDING: frozenset({RUNNING, CANCELLED}),
    RUNNING: frozenset({SUCCESS, FAILED, CANCELLED}),
    SUCCESS: frozenset(),
    FAILED: frozenset({RUNNING}),
    CANCELLED: frozenset({RUNNING}),
}


#: States of an operation that has ended.
FINAL: Final = frozenset({SUCCESS, FAILED, CANCELLED})


def is_final(state: str) -> bool:
    """Whether an operation in that state has ended."""
    return state in FINAL


def may_follow(old: str, new: str) -> bool:
    """Whether a *stored* operation may go from ``old`` to ``new``.

    In memory nothing is refused: users set states of their own there (decision S1), and a state that the table does
    not know leads nowhere.
    """
    return new in TRANSITIONS.get(old, ())


def outcome(*results: Result | None) -> str:
    """The state that work ends in whose results, merged, are ``results``: SUCCESS if no return code is above zero.

    A missing result counts as a blank one. Negative return codes do not count as failures, because merging them into
    a blank Result gives zero (decision C3).

    :raises AttributeError: one of them is no Result.
    :raises TypeError: a return code is no number.
    """
    worst = 0
    for result in results:
        if result:
            worst = worst if worst > result.retcode else result.retcode
    return FAILED if worst else SUCCESS
