"""The entry of the command line: it obeys signals to stop before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

TRAINING = ("train", "distill", "resume", "sweep", "demo")
"""The verbs that a signal may stop and the same command goes on with."""


def main() -> None:
    """Run the command line; see :func:`vrm.cli.main`."""
    if sys.argv[1:2] and sys.argv[1] in TRAINING:
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _stop)
    from vrm.cli import main as run

    run()


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once with the exit code of a run that can be resumed: nothing has begun."""
    os.write(2, b"vrm: stopped before the run began; the same command starts it\n")
    os._exit(75)


if __name__ == "__main__":
    main()
