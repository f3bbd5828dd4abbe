"""The process of one run of a sweep: it reads its job from standard input and trains it.

Standard input holds the job as one line of JSON, and stays open: at its end the run stops with a checkpoint. So it
stops when the pool asks for it, and also when the pool is gone. The exit code says how the run ended: 0 done, 1 failed,
2 wrong usage, 12 out of memory, 75 stopped and resumable. The last line that it prints says why.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import threading
import traceback

import torch
from rich.console import Console

from vrm import config
from vrm.config import Resolved
from vrm.runs.signals import STOP_SIGNALS
from vrm.wording import first_line

OUT_OF_MEMORY = errno.ENOMEM
"""Exit code of a run that found no memory for it: 12."""


def work() -> None:
    """Train the job in the first line of standard input, and exit."""
    job = json.loads(sys.stdin.buffer.readline())
    _stop_at_end_of_input()
    try:
        from vrm.runs.api import start

        torch.set_num_threads(1)
        start(Resolved(config.validate(job["run"]), job["sources"]), console=Console(width=120))
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(f"out of memory ({first_line(error)})", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            traceback.print_exc()
        else:
            print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(code or 1)


def _stop_at_end_of_input() -> None:
    """Send SIGTERM to this process at the end of standard input, unless another signal to stop has come before.

    A scheduler may signal every process of a job: then the run has its signal already, and a second one would end it
    without a checkpoint.
    """
    came, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)  # Python writes the number of each signal there

    def listen() -> None:
        while True:
            ready, _, _ = select.select([0, came], [], [])
            if came in ready and any(number in STOP_SIGNALS for number in os.read(came, 1 << 10)):
                return
            if 0 in ready and not os.read(0, 1 << 10):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=listen, daemon=True).start()


if __name__ == "__main__":
    work()
