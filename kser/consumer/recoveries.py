"""How a consumer recovers from an error of its consumer group."""

from __future__ import annotations

from enum import Enum, auto

from kser.errors import ClientError, ClientFenced, GroupSettingError


class Recovery(Enum):
    """A way to recover from an error of the consumer group."""

    #: The client recovers by itself: it joins the group again, or finds the new leader of a partition.
    REJOIN = auto()
    #: The broker, an administrator or another member must act; the client tries again meanwhile.
    WAIT = auto()
    #: This client cannot recover, so a new client must replace it.
    REPLACE = auto()
    #: Another process has taken the group instance id, so this consumer must end.
    FENCED = auto()
    #: The group does not accept a setting of this client, so this consumer must end.
    SETTING = auto()


#: The texts of the errors that end the consumer, after the reason.
_ADVICE = {
    Recovery.FENCED: "another process uses the group instance id {instance!r}: give each process its own id",
    Recovery.SETTING: "correct the settings of the Kafka client, or those of the broker",
}


def as_recovery(error: ClientError, recovery: Recovery, instance: object) -> ClientError:
    """Return an error of the client in the form that makes the consumer recover in this way.

    :param error: the error.
    :param recovery: the way to recover from the error.
    :param instance: the group instance id of the client; None if it has none.
    """
    if recovery is Recovery.FENCED:
        return ClientFenced(f"{error.message}; {_ADVICE[recovery].format(instance=instance)}", kind=error.kind)
    if recovery is Recovery.SETTING:
        return GroupSettingError(f"{error.message}; {_ADVICE[recovery]}", kind=error.kind)
    return ClientError(
        error.message,
        kind=error.kind,
        fatal=recovery is Recovery.REPLACE,
        transient=recovery is Recovery.REJOIN,
    )
