"""The admission of records to the controller: a record that exceeds a limit fails before its value is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kser.attempt import current_attempt
from kser.errors import LimitExceeded
from kser.limits import Limits, applied, environment_limits, header_bytes


class Admission:
    """The check of each record before user code can see it. The worker pool calls this object with each value.

    :param limits: the limits of the consumer.
    :param registry: returns the controller that handles the messages.
    :param handle: passes a value to the controller.
    """

    def __init__(self, limits: Limits, registry: Callable[[], Any], handle: Callable[[Any], None]) -> None:
        self._limits = limits
        self._registry = registry
        self._handle = handle
        self._differs = limits != environment_limits()

    def __call__(self, value: Any) -> None:
        """Handle the value of the record of the current attempt, or reject it because the record exceeds a limit."""
        try:
            self._check(value)
        except LimitExceeded as exc:
            reject = getattr(self._registry(), "_kser_handle_undecodable", None)
            if reject is None:
                # The controller is an object of the user without this method. The worker pool logs the exception.
                raise
            reject(value, exc)
            return
        if self._differs:
            with applied(self._limits):
                self._handle(value)
        else:
            self._handle(value)

    def _check(self, value: Any) -> None:
        limits = self._limits
        if value is not None and len(value) > limits.max_value_bytes:
            limits.check_value(value)
        attempt = current_attempt.get()
        if attempt is not None and (headers := attempt.record.headers):
            limits.check_headers(header_bytes(headers))
