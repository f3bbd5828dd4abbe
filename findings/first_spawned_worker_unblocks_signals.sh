#!/usr/bin/env bash
# torch 2.15.0 on CPython 3.11 to 3.13 (Linux): the first DataLoader worker that is spawned unblocks SIGINT and SIGTERM
# in the thread that starts it.
#
# Guess: a thread that has blocked SIGTERM with signal.pthread_sigmask keeps it blocked until it unblocks it itself, and
# processes that it spawns inherit that. So a trainer can block the signals before it starts its workers, and a scheduler
# that signals the whole process group stops the trainer alone.
#
# Seen: the mask lasts exactly until the first spawn. Starting a spawned process first starts multiprocessing's resource
# tracker; that blocks SIGINT and SIGTERM around its own start and afterwards unblocks them without looking at what was
# blocked before. The thread's own mask is changed, and the workers inherit SIGTERM unblocked. A second pass with new
# workers, the tracker being there, keeps the mask.
#
# Output seen:
#   before: SIGTERM blocked
#   first workers: SIGTERM unblocked in the thread, unblocked in the workers
#   later workers: SIGTERM blocked in the thread, blocked in the workers
#
# Why it surprises: it depends on what else has used multiprocessing before, so a test that ran after another one passes
# and the program does not. Calling multiprocessing.resource_tracker.ensure_running() before blocking avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.15.0 numpy==2.4.6
cat > "$folder/workers.py" <<'PYTHON'
import re
import signal
from pathlib import Path

from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


def state(blocked):
    return "blocked" if blocked else "unblocked"


def blocked_in(pid):
    mask = re.search(r"^SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def start():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    workers = iter(DataLoader(Numbers(), num_workers=2, multiprocessing_context="spawn"))
    next(workers)
    mine = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    theirs = {blocked_in(process.pid) for process in workers._workers}
    assert len(theirs) == 1
    return f"SIGTERM {state(mine)} in the thread, {state(theirs.pop())} in the workers"


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("before: SIGTERM", state(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    print("first workers:", start())
    print("later workers:", start())
PYTHON
seen=$("$folder/venv/bin/python" "$folder/workers.py")
echo "$seen"
expected="before: SIGTERM blocked
first workers: SIGTERM unblocked in the thread, unblocked in the workers
later workers: SIGTERM blocked in the thread, blocked in the workers"
[ "$seen" = "$expected" ] || { echo "this has changed"; exit 1; }
