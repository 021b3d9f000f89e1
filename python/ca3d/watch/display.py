"""What the user sees in the terminal, on standard error: standard output is for the events."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ca3d.watch.events import Event

_REFRESH_SECONDS = 0.2


class Display:
    """Prints lines, and on a terminal one line below them that changes.

    Args:
        stream: Where to; None for standard error.

    Example:
        >>> import io
        >>> out = io.StringIO()
        >>> Display(out).note("camera found")
        >>> out.getvalue()
        'camera found\\n'
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = ""
        self._when = 0.0

    def note(self, text: str) -> None:
        """Prints a line.

        Args:
            text: The line.
        """
        self._wipe()
        print(text, file=self._stream, flush=True)

    def event(self, event: Event) -> None:
        """Prints that something began or ended.

        Args:
            event: The event.
        """
        confidence = f"{100 * event.confidence:.0f} %"
        if event.lasting:
            self.note(f"{clock(event.start)}  {event.label} ({confidence})")
        else:
            seconds = event.end - event.start
            self.note(f"{clock(event.end)}  end of {event.label}, {seconds:.1f} s ({confidence})")

    def status(self, text: str) -> None:
        """Shows the state, on a terminal only.

        Args:
            text: One line.
        """
        now = time.monotonic()
        if self._live and now - self._when >= _REFRESH_SECONDS:
            self._wipe()
            print(text, end="", file=self._stream, flush=True)
            self._shown, self._when = text, now

    def close(self) -> None:
        """Takes the changing line away."""
        self._wipe()

    def _wipe(self) -> None:
        if self._shown:
            print("\r" + " " * len(self._shown) + "\r", end="", file=self._stream)
            self._shown = ""


def clock(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds.

    Example:
        >>> clock(3661.5)
        '1:01:01.5'
    """
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}"
