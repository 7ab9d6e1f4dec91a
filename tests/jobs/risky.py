"""Work for a process of its own; in a module that imports nothing, for every process imports it."""

from __future__ import annotations

import os
import signal


def risky(number: int) -> int:
    """Return ten times the number, but for 1: then the process is killed."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10
