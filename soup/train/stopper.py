"""The wish to stop, as signals bring it. Installed before anything slow is imported, so that none goes astray."""

from __future__ import annotations

import os
import signal
from types import FrameType

# Exit statuses of a training process that ended neither well nor badly.
INTERRUPTED = 130  # asked to stop; goes on from its checkpoint
LOST = 69  # EX_UNAVAILABLE: another machine of the run is gone; goes on from its checkpoint
BUSY = 75  # EX_TEMPFAIL of sysexits.h: another process has the run


class Stopper:
    """Turns the first SIGINT or SIGTERM into a wish to stop at the next step; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked: str | None = None

    def install(self) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, self._ask)
        # A fork server blocks them until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        self.asked = signal.Signals(number).name
