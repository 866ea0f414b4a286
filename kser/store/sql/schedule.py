"""The times at which the steps of roots are due, as SQL expressions; see :mod:`kser.store.transitions`."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, literal_column, or_

from kser.store.model import IMMEDIATE_TAKEOVERS, MAX_RESEND_DELAY, MAX_TAKEOVER_DELAY, SEND_DELAY, DueReason
from kser.store.sql.statements import ONE, ZERO
from kser.store.sql.tables import operation

#: From this number of sends on, the resend delay is always ``MAX_RESEND_DELAY``. The delay doubles with each send, so
#: after 20 sends even a first delay of 10 ms exceeds this maximum.
MAX_DOUBLINGS: Final = 20

# As ZERO and ONE, these values are part of the text of a statement.
_IMMEDIATE: Final[ColumnElement[Any]] = literal_column(str(IMMEDIATE_TAKEOVERS))
_LONGEST: Final[ColumnElement[Any]] = literal_column(str(int(MAX_TAKEOVER_DELAY)))
_DOUBLINGS: Final[ColumnElement[Any]] = literal_column(str(int(MAX_TAKEOVER_DELAY).bit_length()))
_SEND_DELAY: Final[ColumnElement[Any]] = literal_column(str(SEND_DELAY))
_EXPIRED: Final[ColumnElement[Any]] = literal_column(f"'{DueReason.EXPIRED}'")


def lease_values(now: Any, owner: Any, lease: Any, claim_count: Any) -> dict[str, Any]:
    """Return the values of the columns that the start or the renewal of a lease changes.

    :param claim_count: the number of claims of the step, including the claim that has the lease.
    """
    take_at = now + lease + takeover_delay(claim_count)
    return {
        "owner": owner,
        "lease_until": now + lease,
        "take_at": take_at,
        "send_at": take_at + _SEND_DELAY,
        "due_reason": _EXPIRED,
    }


def takeover_delay(claim_count: Any) -> ColumnElement[Any]:
    """Return the number of seconds between the expiry of a lease and the next takeover of the step."""
    return case(
        (claim_count <= _IMMEDIATE, ZERO),
        (claim_count - _IMMEDIATE >= _DOUBLINGS, _LONGEST),
        else_=ONE.op("<<")(claim_count - _IMMEDIATE),
    )


def is_claimable(now: Any, expired: Any) -> ColumnElement[bool]:
    """Return the condition that a root has no owner, or an owner whose step may be taken over.

    :param expired: 1 if a claim may end the claim of an owner whose lease has expired, otherwise 0.
    """
    own = operation.c
    may_end = and_(expired == ONE, own.lease_until + takeover_delay(own.claim_count) <= now)
    return or_(own.owner.is_(None), may_end)


def may_be_sent(now: Any) -> ColumnElement[bool]:
    """Return the condition that a root has not ended, and has no owner with a valid lease."""
    own = operation.c
    return and_(own.take_at.is_not(None), or_(own.owner.is_(None), own.lease_until <= now))


def resend_delay(first: Any) -> ColumnElement[Any]:
    """Return the number of seconds until a step is due again; each earlier send doubles the delay ``first``."""
    sends = operation.c.send_count
    doubled = first * ONE.op("<<")(sends)
    return case(
        (sends >= MAX_DOUBLINGS, MAX_RESEND_DELAY), (doubled > MAX_RESEND_DELAY, MAX_RESEND_DELAY), else_=doubled
    )
