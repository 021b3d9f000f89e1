"""Keeping up with the clock: reading a file as fast as it plays, and noticing to be late."""

from __future__ import annotations

import time

# Decoding leaves out what no key frame needs when it is so late, until it is no longer.
_LATE, _ON_TIME = 1.0, 0.3
# A camera's clock may be slower than this machine's, by far less than this.
_DRIFT = 1e-3
_LONGEST_WAIT = 5.0


class Pace:
    """Compares the source's time stamps with the clock.

    Args:
        paced: Wait until a frame is due, as a camera would.
        live: Notice to be late.

    Attributes:
        behind: Whether frames come so late that some must be left out.
        skipped: Packets that were left undecoded.
        told: How many of them the user has been told of.

    Example:
        >>> pace = Pace(paced=False, live=False)
        >>> pace.wait(1e6)
        >>> pace.behind
        False
    """

    def __init__(self, paced: bool, live: bool) -> None:
        self._paced, self._live = paced, live
        self._offset: float | None = None
        self._seen = 0.0
        self.behind = False
        self.skipped = self.told = 0

    def wait(self, seconds: float) -> None:
        """Waits for a frame's time to come, or takes note of how late it is.

        Args:
            seconds: The frame's time stamp.
        """
        if not self._live:
            return
        now = time.monotonic()
        offset = now - seconds
        if self._offset is None:
            self._offset = offset
        if self._paced:
            wait = max(0.0, self._offset - offset)
            time.sleep(min(wait, _LONGEST_WAIT))
            # A hole of minutes in a file is not waited for.
            self._offset -= max(0.0, wait - _LONGEST_WAIT)
        else:
            # The frame that came soonest after it was taken sets the clock.
            self._offset = min(offset, self._offset + _DRIFT * (now - self._seen))
        self._seen = now
        late = offset - self._offset
        self.behind = late > (_ON_TIME if self.behind else _LATE)

    def restart(self) -> None:
        """Forgets the source's clock: it has been set back."""
        self._offset, self.behind = None, False

    def due(self, seconds: float) -> float:
        """Returns when a frame was due, on the clock of `time.monotonic()`.

        Args:
            seconds: The frame's time stamp.
        """
        return time.monotonic() if self._offset is None else self._offset + seconds
