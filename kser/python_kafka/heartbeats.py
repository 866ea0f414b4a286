"""The answers of a consumer group to the heartbeats of a kafka-python client."""

from __future__ import annotations

from typing import Any

from kafka import KafkaConsumer, errors
from kafka.coordinator.base import MemberState


class HeartbeatAnswers:
    """The answers of the consumer group to the heartbeats of a client.

    If another process has taken the group instance id, kafka-python only logs this answer and stops its heartbeats. So
    this class reads the answers itself.

    :param client: the client.
    """

    def __init__(self, client: KafkaConsumer) -> None:
        self._coordinator = getattr(client, "_coordinator", None) if client.config["group_id"] is not None else None
        self._instance = client.config["group_instance_id"]
        self._answer = 0
        self._thread: Any = None
        if self._coordinator is not None:
            self._handle = self._coordinator._handle_heartbeat_response
            self._coordinator._handle_heartbeat_response = self._note_answer

    def check(self) -> None:
        """Check the last answer to a heartbeat.

        :raises kafka.errors.FencedInstanceIdError: another process has taken the group instance id.
        """
        self._thread = getattr(self._coordinator, "_heartbeat_thread", None) or self._thread
        if self._answer == errors.FencedInstanceIdError.errno:
            raise errors.FencedInstanceIdError(f"the group has answered a heartbeat of {self._instance!r}")

    def close(self) -> None:
        """End the thread of the heartbeats, which kafka-python 2 forgets when the client is fenced."""
        if self._thread is not None:
            self._thread.close()

    @property
    def is_member(self) -> bool:
        """True if the group has recently confirmed the membership, or if the client has no group."""
        coordinator = self._coordinator
        return coordinator is None or (
            coordinator.state is MemberState.STABLE
            and not self._answer
            and not coordinator.heartbeat.session_timeout_expired()
        )

    def _note_answer(self, *arguments: Any) -> Any:
        # kafka-python 2 passes a future, a time and the answer; kafka-python 3 passes the answer and a time.
        self._answer = next(value.error_code for value in arguments if hasattr(value, "error_code"))
        return self._handle(*arguments)
