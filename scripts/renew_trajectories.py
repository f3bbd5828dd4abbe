"""Writes tests/runs/trajectories.json anew, and says what changed: after a change of numbers that was meant.

.venv/bin/python scripts/renew_trajectories.py            all kinds
.venv/bin/python scripts/renew_trajectories.py memory     those that are named; the others stay as they are
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.runs.test_trajectories import FILE, KINDS, differences, make_teacher, trajectory


def main(*kinds: str) -> None:
    """Run ``kinds``, or all, and keep what comes out."""
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"unknown kinds {', '.join(sorted(unknown))}; there are: {', '.join(KINDS)}")
    kept: dict[str, Any] = json.loads(FILE.read_text())["kinds"] if FILE.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(Path(folder))
        for number, kind in enumerate(kinds or KINDS):
            found = trajectory(teacher, Path(folder) / str(number), kind)
            changes = differences(kept[kind], found) if kind in kept else ["new"]
            print(f"{kind}: {'; '.join(changes) or 'as before'}")
            kept[kind] = found
    made = {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}
    content = {"made with": made, "kinds": {kind: kept[kind] for kind in KINDS if kind in kept}}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
