"""One of two processes of a distributed run on small modules: python two.py FOLDER METHOD [NORM]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from tests.runs.own import DIGITS, Net, Pixels, settings
from vrm.config import Resolved
from vrm.engine.distribution import ProcessLost, join, leave
from vrm.engine.evaluation import evaluate
from vrm.engine.step import Step
from vrm.runs import api
from vrm.runs.assembly import assemble
from vrm.runs.errors import Preempted


def main(folder: Path, method: str, what: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = Net(norm=what == "norm", dropout=0.2 if what == "dropout" else 0.0)
    more: dict[str, object] = {"epochs": 300 if what == "long" else 3, "batch_size": 10, "timeout": 20.0}
    more |= {"checkpoint": {"every": 2}, "log_every": 2}
    if what == "poison":
        more["nan"] = "skip"
    if what == "parts":
        more["accumulate"] = 2
    options = {"gather": True} if method == "vrm" else {}
    teacher = Pixels()
    run = settings(folder / "run", student, teacher, method, **more)
    run.method.update(options)
    assembly = assemble(run, dataset=DIGITS, student=student, teacher=teacher)
    if what in ("plain", "parts"):  # in float64, where rounding does not hide a mistake
        assembly.distiller.double()
        if assembly.teacher is not None:
            assembly.teacher.double()
    world = join(assembly.device, assembly.run.timeout)
    if what == "poison":
        call = Step.__call__

        def poisoned(self: Step, index: torch.Tensor, *images: torch.Tensor) -> None:
            weight = student.get_parameter("fc.weight")
            bad = world.rank == 1 and int(self.progress.step) == 3
            handle = weight.register_hook(lambda g: g * float("nan")) if bad else None
            call(self, index, *images)
            if handle is not None:
                handle.remove()

        Step.__call__ = poisoned
    print("ready", flush=True)
    try:
        api._train(assembly, Resolved(run, {}), world, console=Console(quiet=True), quiet=True)
    except Preempted:
        leave(75)
    except ProcessLost as error:
        print(f"lost: {error}", flush=True)
        leave(1)
    whole = evaluate(assembly.distiller.student, DIGITS.test, assembly.task, batch_size=7, world=world)
    found = {"evaluation": whole, "weights": {n: t.tolist() for n, t in student.state_dict().items()}}
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
