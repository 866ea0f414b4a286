"""The group lease: the local estimate whether the client is still a member of its consumer group."""

from __future__ import annotations

import math
from collections.abc import Callable


class GroupLease:
    """A lease on the group membership, renewed by each poll of the client.

    If the process was stopped or starved and did not poll for a long time, the group may have reassigned its
    partitions. While the lease is expired, no attempt starts.

    :param clock: returns the time in seconds.
    :param fence: the duration of the lease, in seconds.
    """

    def __init__(self, clock: Callable[[], float], max_silence: float = math.inf) -> None:
        self._clock = clock
        self._max_silence = max_silence
        #: The time at which the lease expires, by the clock.
        self.deadline = clock() + max_silence

    def renew(self) -> None:
        """Renew the lease; call it while the client is in its group."""
        self.deadline = self._clock() + self._max_silence

    @property
    def is_expired(self) -> bool:
        """Whether the lease has expired."""
        return self._clock() >= self.deadline
