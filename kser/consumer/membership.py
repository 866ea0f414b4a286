"""The proof that a Kafka client is a member of its group, which a poll without an error does not give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kser.backoff import random_delay
from kser.consumer.client import ConsumerClient
from kser.consumer.partition_table import PartitionTable
from kser.errors import ClientError, ClientFenced, SettingError

#: Seconds between two tries to prove the membership after an error.
PROOF_INTERVAL = 2.0
#: Seconds that a commit may take, which is the proof.
PROOF_TIMEOUT = 1.2
#: Back-off in seconds before each new client but the first.
_BACKOFF = partial(random_delay, first=0.5, ceiling=10, lowest=0.2)


class MembershipProof:
    """The proofs of the membership of a consumer, and the time at which the next new client may connect.

    :param partitions: the partition table.
    :param clock: returns the time in seconds.
    """

    def __init__(self, partitions: PartitionTable, clock: Callable[[], float]) -> None:
        self._partitions = partitions
        self._clock = clock
        self._next_try = self._connect_at = 0.0
        #: The number of clients that were discarded since the last proof.
        self._discarded_count = 0

    def is_given(self, client: ConsumerClient, has_records: bool) -> bool:
        """Return whether the client works again after an error: it has returned records, or it is a proved member.

        After a failed proof, the next try follows at least ``PROOF_INTERVAL`` seconds later.
        """
        now = self._clock()
        if not has_records and now < self._next_try:
            return False
        proved = has_records or self._is_member(client)
        self._next_try = 0.0 if proved else now + PROOF_INTERVAL
        if proved:
            self._discarded_count = 0
        return proved

    def commit_again(self, client: ConsumerClient) -> bool:
        """Repeat the last commit, because a group accepts commits only from its members.

        :return: False if there is nothing to commit.
        :raises kser.errors.ClientError: this client is not a member of the group, or the group does not respond.
        """
        committed = self._partitions.committed_offsets() if self._partitions.commit_enabled else {}
        if committed:
            client.commit(committed, PROOF_TIMEOUT)
        return bool(committed)

    def is_outside(self, client: ConsumerClient | None) -> bool:
        """Return whether the consumer has no partitions, and is not even a member of its group."""
        return not self._partitions.assignment and (client is None or not client.is_member())

    def note_discarded(self) -> None:
        """Record that a client was discarded, or could not be created.

        The first new client may connect at once. Further ones wait, because each client has threads and connections.
        """
        if self._discarded_count:
            self._connect_at = self._clock() + _BACKOFF(self._discarded_count)
        self._discarded_count += 1

    @property
    def seconds_to_connect(self) -> float:
        """Seconds until the next new client may connect; 0 or less if it may connect now."""
        return self._connect_at - self._clock()

    def _is_member(self, client: ConsumerClient) -> bool:
        try:
            return self.commit_again(client) or client.is_member()
        except (ClientFenced, SettingError):
            raise
        except ClientError:
            return False
