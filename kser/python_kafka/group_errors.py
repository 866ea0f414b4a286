"""Errors of the consumer group in kafka-python, and how a consumer recovers from each of them."""

from __future__ import annotations

from collections.abc import Mapping

from kafka import errors
from kafka.errors import KafkaError

from kser.consumer.recoveries import Recovery

#: The recovery from each error, by the name of its class in ``kafka.errors``; some versions lack some names. The first
#: class that matches counts.
_BY_NAME: Mapping[str, Recovery] = {
    "RebalanceInProgressError": Recovery.REJOIN,
    "IllegalGenerationError": Recovery.REJOIN,
    "UnknownMemberIdError": Recovery.REJOIN,
    "MemberIdRequiredError": Recovery.REJOIN,
    "CommitFailedError": Recovery.REJOIN,
    "LeaderNotAvailableError": Recovery.REJOIN,
    "NotLeaderForPartitionError": Recovery.REJOIN,
    "FencedLeaderEpochError": Recovery.REJOIN,
    "UnknownLeaderEpochError": Recovery.REJOIN,
    "IllegalStateError": Recovery.REPLACE,
    "GroupAuthorizationFailedError": Recovery.WAIT,
    "GroupMaxSizeReachedError": Recovery.WAIT,
    # The other members may be of an earlier release, and end soon.
    "InconsistentGroupProtocolError": Recovery.WAIT,
    # kafka-python raises this error also while brokers of several versions work together.
    "UnsupportedVersionError": Recovery.WAIT,
    "FencedInstanceIdError": Recovery.FENCED,
    "InvalidGroupIdError": Recovery.SETTING,
    "InvalidSessionTimeoutError": Recovery.SETTING,
}

#: The recovery from each error of the consumer group, by its class.
RECOVERIES: Mapping[type[KafkaError], Recovery] = {
    getattr(errors, name): recovery for name, recovery in _BY_NAME.items() if hasattr(errors, name)
}


def recovery_from(error: KafkaError) -> Recovery:
    """Return how a consumer recovers from an error of kafka-python."""
    return next((recovery for cls, recovery in RECOVERIES.items() if isinstance(error, cls)), Recovery.WAIT)
