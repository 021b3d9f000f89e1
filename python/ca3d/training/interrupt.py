"""Stopping a run by signal without losing anything."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StoppedError(Exception):
    """The run was asked to stop and has saved its state.

    Args:
        signal_number: The signal that asked.

    Example:
        >>> StoppedError(signal.SIGTERM).exit_code
        143
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + self.signal_number


class SignalGuard:
    """Remembers SIGINT and SIGTERM instead of dying from them; a second one ends the process.

    Outside the main thread, where handlers can't be set, it does nothing.

    Example:
        >>> with SignalGuard() as guard:
        ...     guard.received is None
        True
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise StoppedError(number)
        self.received = number
