"""When a worker acts: at a steady rate, until it is told to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

RETRY_S = (
    0.02  # between attempts while no node takes a request: this is how finely an outage is measured
)


class Stop:
    """Whether the run is over: it was told to stop and has enough, or its time is up.

    So a slow system is tested longer, and an orphan ends by itself.
    """

    def __init__(self, file: Path, max_s: float, enough: Callable[[], bool]) -> None:
        self._file = file
        self._deadline = time.monotonic() + max_s
        self._enough = enough
        self._aborted = False

    def abort(self) -> None:
        """End the run now."""
        self._aborted = True

    def told(self) -> bool:
        """Return True when somebody has ended the run."""
        return self._file.exists()

    def __call__(self) -> bool:
        """Return True when the worker shall end."""
        if self._aborted or time.monotonic() >= self._deadline:
            return True
        return self._enough() and self.told()


class Pace:
    """A steady rate. Turns that an outage ate are left out, not caught up with in a burst."""

    def __init__(self, per_s: float, stop: Stop, offset: float = 0.0) -> None:
        self._interval = 1.0 / per_s
        self._stop = stop
        self._next = time.monotonic() + offset * self._interval

    def wait(self) -> bool:
        """Sleep until the next turn; False when the run is over."""
        early = self._next - time.monotonic()
        if early > 0:
            time.sleep(early)
        else:
            self._next += -early // self._interval * self._interval
        self._next += self._interval
        return not self._stop()

    def pause(self) -> bool:
        """Sleep shortly before the same request is tried again; False when the run is over."""
        time.sleep(RETRY_S)
        return not self._stop()
