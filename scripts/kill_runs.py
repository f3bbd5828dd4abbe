"""Kill a run with ``kill -9`` at random instants, resume it each time, and compare the end with that of one unkilled.

    python scripts/kill_runs.py kills=100 digits method=crd teacher=runs/t/ student=resnet8 epochs=6 checkpoint.every=3

``kills`` is how often to kill (100), ``draws`` the seed of the instants (0), ``folder`` where the runs lie (by default
a temporary folder, removed if all is well). All other words are those of ``vrm distill`` or, with ``model=``, of ``vrm
train``. A run that ends before it is killed is compared too, and another one begins. Weights, momenta, buffers, logs
and cards must be bitwise the same at the end, and nothing half-written may be left. Exit code 1 if anything differs.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CLOCKS = ("seconds", "images_per_second", "full_run_seconds")
"""The entries of a card that are measured with a clock, and differ from run to run."""

START = [sys.executable, "-c", "from vrm.cli import main; main()"]


def start(run: Path, words: list[str]) -> subprocess.Popen[str]:
    """Start a process that begins the run, or goes on with it."""
    verb = "train" if any(word.startswith("model=") for word in words) else "distill"
    line = ["resume", str(run)] if (run / "config.yaml").is_file() else [verb, *words, f"run={run}"]
    return subprocess.Popen([*START, *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def opened(process: subprocess.Popen[str], run: Path) -> bool:
    """Wait until the process holds the run's lock; return False if it has ended before."""
    while process.poll() is None:
        if (run / "lock").is_file() and f"process {process.pid} on" in (run / "lock").read_text():
            return True
        time.sleep(0.005)
    return False


def finish(run: Path, words: list[str]) -> float:
    """Go on with a run to its end; return for how many seconds its folder was open."""
    process = start(run, words)
    began = time.monotonic() if opened(process, run) else 0.0
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{run}: exit code {process.returncode}\n{output}")
    return time.monotonic() - began


def content(run: Path) -> dict[str, object]:
    """Return the files of a finished run whose content must not depend on when it was killed."""
    found: dict[str, object] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name == "model.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in CLOCKS}
        elif path.name in ("timings.jsonl", "manifest.json", "state.json", "lock", "config.yaml"):
            found[name] = "a clock, or the run's own name, is in it"
        else:
            found[name] = path.read_bytes()
    return found


def differences(whole: Path, run: Path) -> Iterator[str]:
    """Yield what of a finished run differs from the one that nobody killed."""
    a, b = content(whole), content(run)
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            yield f"{name} is there in only one of them"
        elif a[name] != b[name]:
            yield f"{name} differs"


def main() -> None:
    """Kill and resume runs as the words say, and compare."""
    own = {"kills": "100", "draws": "0", "folder": ""}
    words = []
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
        else:
            words.append(word)
    if not words:
        sys.exit(__doc__)
    folder = Path(own["folder"] or tempfile.mkdtemp(prefix="vrm-kills-"))
    kills, draw = int(own["kills"]), random.Random(int(own["draws"]))
    whole = folder / "whole"
    duration = finish(whole, words)
    print(f"an unkilled run takes {duration:.1f} s; {kills} kills in {folder}", flush=True)
    done, number, wrong, at_most = 0, 1, 0, 0
    while done < kills:
        run = folder / f"killed-{number}"
        ended = False
        here = 0
        while not ended and done < kills:
            process = start(run, words)
            if draw.random() < 0.1:  # also while it starts
                time.sleep(draw.uniform(0, 3))
            elif opened(process, run):
                time.sleep(draw.uniform(0, duration))
            process.kill()
            process.communicate()
            ended = process.returncode == 0
            here += not ended
            done += not ended
        if not ended:
            finish(run, words)
        found = list(differences(whole, run))
        wrong += bool(found)
        at_most = max(at_most, here)
        print(f"run {number}: killed {here} times, {'; '.join(found) or 'the same end'} ({done} kills)", flush=True)
        if not found:
            shutil.rmtree(run)
        number += 1
    print(f"{done} kills of {number - 1} runs, up to {at_most} of one: {wrong} ended otherwise")
    if wrong:
        sys.exit(1)
    if not own["folder"]:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
