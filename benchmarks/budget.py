"""Checks that training has not become slower: ratios of CPU time, each against its budget plus ten percent.

    python benchmarks/budget.py [--only WORD]     # some two minutes on one core; exit status 1 names the culprit
    python benchmarks/budget.py --renew           # on an idle machine: its processor's budgets are written anew

Ratios and not times, so that they depend little on the machine; CPU time on one thread and not what the clock on the
wall shows, so that what else runs there matters little; what is compared takes turns, and the median over the rounds
counts. What is over its budget is measured a second time, and the smaller ratio counts. Work of different kinds still
compares differently from one processor to another, so ``benchmarks/budgets.json`` has budgets for each that they were
measured on. On any other the largest of them stand in, and that is said: they catch less. The ratios, on ResNet20 to
ResNet8, batch 64, images of 32 x 32 pixels made up:

    step METHOD / ce          a method's step over that of cross entropy alone
    step METHOD / networks    over the networks' own passes on ready tensors
    calls METHOD / networks   operator calls in a step over those in the passes: what a GPU would have to launch. Exact
    views / lookups           both views of VRM, over ten table lookups of every byte
    relations ..              VRM's losses in closed form over Algorithm 1 as it stands, forward and backward
    loop / steps              an epoch of the training loop over the same steps without it, on images of 8 x 8 pixels

A method without a budget is listed and passes; renew the budgets to give it one. Renew them too after a change that is
meant to cost something, and say so in the commit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arguments import at_least
from rich.console import Console
from torch import Tensor

from vrm import methods
from vrm.bench import step_time as bench
from vrm.bench.step_profile import profiled_step
from vrm.config import Run, validate
from vrm.engine.step import Step
from vrm.runs.assembly import assemble
from vrm.runs.folder import RunFolder, environment
from vrm.runs.trainer import Training

BUDGETS = Path(__file__).parent / "budgets.json"
MARGIN = 0.10
WORDS = ("pair=resnet20/resnet8", "batch_size=64", "threads=1", "device=cpu")
OVER_NETWORKS = ("ce", "kd", "vrm")
CALLS = 10
LOOKUPS = 10
CPU = torch.device("cpu")
QUIET = Console(quiet=True)

Ratios = dict[str, float]
Calls = dict[str, Callable[[], object]]


def cpu_times(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of each call, taking turns; behind one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                found[name].append(time.process_time() - start)
    return found


def over(times: dict[str, list[float]], name: str, other: str) -> float:
    """The median over the rounds of one's time by the other's."""
    return median(a / b for a, b in zip(times[name], times[other], strict=True))


def steps(names: tuple[str, ...], rounds: int) -> Ratios:
    """Steps of methods (their main phases) over cross entropy and over the networks; calls; views."""
    chosen = bench.Settings(samples=2048)
    with tempfile.TemporaryDirectory(prefix="vrm-budget-") as folder:
        runs = {name: bench.resolve("cifar100", WORDS, name) for name in dict.fromkeys(("ce", *names))}
        dataset, _ = bench.kept_in_place(bench.load(runs["ce"].data, chosen, QUIET), runs["ce"])
        calls: Calls = {}
        ratios: Ratios = {}
        bares: bench.Bares = {}
        networks: dict[str, str] = {}
        for name, run in runs.items():
            if run.teacher is not None:
                teacher = bench.with_weights(run.teacher, dataset, Path(folder))
                run = run.model_copy(update={"teacher": teacher})
            main = next(i for i, phase in enumerate(methods.load(name)().phases) if phase.epochs is None)
            found = bench.ready(bench.Subject(name, run, phase=main), dataset, bares=bares)
            calls[name] = lambda turns=found.turns: turns.call(0)
            known = next(key for key, turns in bares.items() if turns is found.bare)
            networks[name] = f"networks {list(bares).index(known)}"
            calls[networks[name]] = lambda turns=found.bare: turns.call(0)
            _, passes = profiled_step(lambda number, turns=found.bare: turns.call(number), CPU, repeats=1)
            if found.launches is not None and passes is not None:
                ratios[f"calls {name} / networks"] = found.launches / passes
            if found.step.distiller.num_virtual:
                calls["views"], calls["lookups"] = _views(found.step), _lookups(found.step)
        times = cpu_times(calls, rounds)
    ratios |= {f"step {name} / ce": over(times, name, "ce") for name in names if name != "ce"}
    ratios |= {f"step {n} / networks": over(times, n, networks[n]) for n in OVER_NETWORKS if n in names}
    if "views" in calls:
        ratios["views / lookups"] = over(times, "views", "lookups")
    return ratios


def _views(step: Step) -> Callable[[], object]:
    index = torch.arange(64)
    pixels = step.store.batch(index)
    return lambda: step.policy(pixels, index, epoch=1, seed=0, num_virtual=step.distiller.num_virtual)


def _lookups(step: Step) -> Callable[[], object]:
    pixels = step.store.batch(torch.arange(64)).flatten(1)
    table = torch.arange(256, dtype=torch.uint8).flip(0).expand(len(pixels), -1)
    return lambda: [table.gather(1, pixels.long()) for _ in range(LOOKUPS)]


def relations(rounds: int) -> Ratios:
    """VRM's two losses with pruning, and one alone without; the closed form's turn is of some calls.

    A single one would be measured by the caches that the explicit form left behind.
    """
    from relations import explicit, keep_memory, ours

    keep_memory()

    def calls_of(batch: int, classes: int, graph: str, pruning: str) -> Calls:
        generator = torch.Generator().manual_seed(0)
        logits = [3 * torch.randn(batch, classes, generator=generator) for _ in range(4)]
        leaves = [z.requires_grad_() for z in logits[:2]]

        def grad(form: Callable[[list[Tensor], str, str], Tensor], times: int) -> Callable[[], object]:
            return lambda: [torch.autograd.grad(form(logits, graph, pruning), leaves) for _ in range(times)]

        return {"closed": grad(ours, CALLS), "explicit": grad(explicit, 1)}

    return {
        f"relations {graph} {batch}x{classes}, pruning {pruning}": over(
            cpu_times(calls_of(batch, classes, graph, pruning), rounds), "closed", "explicit"
        )
        / CALLS
        for batch, classes, graph, pruning, rounds in (
            (64, 100, "whole", "mixture", 5 * rounds),
            (64, 1000, "sample", "none", rounds),
            (64, 300, "class", "none", rounds),
        )
    }


class _TimedTraining(Training):
    """Notes the CPU time from the beginning of a step to the end of a later one."""

    FIRST, LAST = 5, 95

    def _captured(self, step: Step) -> Callable[..., None]:
        call = super()._captured(step)
        self.calls, self.seconds_of_steps = 0, 0.0

        def counted(*inputs: Tensor) -> None:
            self.calls += 1
            if self.calls == self.FIRST:
                self.seconds_of_steps = -time.process_time()
            call(*inputs)
            if self.calls == self.LAST:
                self.seconds_of_steps += time.process_time()

        return counted


def loop(rounds: int) -> Ratios:
    """The loop over its steps: feeding, the learning rate, logging."""
    chosen = bench.Settings(samples=6400, classes=10)
    words = ["student=resnet8", "data.size=8", "batch_size=64", "threads=1", "device=cpu"]
    ratios = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="vrm-budget-") as folder:
            run: Run = bench.resolve("digits", words, "ce")
            run = validate(run.model_dump() | {"epochs": 1, "run": Path(folder) / "run"})
            dataset = bench.load(run.data, chosen, QUIET)
            made = RunFolder(run.run)
            training = _TimedTraining(assemble(run, dataset=dataset), made, console=QUIET, quiet=True)
            training.train()
            made.close()
            assembly = assemble(run, dataset=dataset)
            step, _, _ = bench.step_of(assembly)
            batches = bench.whole_batches(assembly, most=training.LAST)
            for index, batch in enumerate(batches, start=1):
                if index == training.FIRST:
                    start = time.process_time()
                step(*batch)
            bare = time.process_time() - start
        if number:  # the first warms up
            ratios.append(training.seconds_of_steps / bare)
    return {"loop / steps": median(ratios)}


def measured(only: str, rounds: int) -> Iterator[Ratios]:
    """All ratios whose name has ``only`` in it, group by group."""
    names = tuple(name for name in methods.names() if name in only or not only.startswith(("step ", "calls ")))
    groups: dict[str, Callable[[], Ratios]] = {
        "step calls views / networks": lambda: steps(names, rounds),
        "relations": lambda: relations(max(rounds // 3, 2)),
        "loop / steps": lambda: loop(4),
    }
    for title, group in groups.items():
        if only.partition(" ")[0] in title or not only:
            yield {name: ratio for name, ratio in group().items() if only in name}


def check(ratios: Ratios, budgets: dict[str, float]) -> list[str]:
    """The names of those over their budget."""
    return [name for name, ratio in ratios.items() if name in budgets and ratio > (1 + MARGIN) * budgets[name]]


def table(ratios: Ratios, budgets: dict[str, float], bad: list[str]) -> None:
    width = max(map(len, ratios), default=0)
    for name, ratio in ratios.items():
        budget = budgets.get(name)
        told = "no budget yet" if budget is None else f"{budget:9.4f}  {100 * (ratio / budget - 1):+6.1f} %"
        print(f"{name:{width}} {ratio:9.4f}  {told}{'   OVER BUDGET' if name in bad else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write the budgets instead of checking them")
    parser.add_argument("--only", default="", help="ratios with this in their names")
    parser.add_argument("--rounds", type=at_least(1), default=9)
    parser.add_argument("--budgets", type=Path, default=BUDGETS)
    options = parser.parse_args()
    if options.renew and options.only:
        parser.error("--renew measures all; leave --only out")
    torch.set_num_threads(1)
    here = f"{bench.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    known: dict[str, dict[str, Any]] = {}
    if options.budgets.exists() or not options.renew:
        try:
            known = json.loads(options.budgets.read_text(encoding="utf-8"))["processors"]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{options.budgets} holds no budgets ({type(error).__name__}: {error})")
    if not (known or options.renew):
        parser.error(f"{options.budgets} holds no budgets; make them with --renew, of code that you trust")
    budgets: dict[str, float] = {}
    if not options.renew:
        if here not in known:
            print(f"no budgets of this processor ({here}): the largest of {' and '.join(known)} stand in")
        for each in [known[here]] if here in known else known.values():
            for name, ratio in each["ratios"].items():
                budgets[name] = max(ratio, budgets.get(name, 0.0))
    ratios: Ratios = {}
    bad: list[str] = []
    for found in measured(options.only, options.rounds):
        over_once = check(found, budgets)
        for name in over_once:
            print(f"{name} is over its budget; once more", flush=True)
            for again in measured(name, options.rounds):
                found[name] = min([found[name], *(ratio for other, ratio in again.items() if other == name)])
        bad += check(found, budgets)
        table(found, budgets, bad)
        sys.stdout.flush()
        ratios |= found
    if options.renew:
        known[here] = {
            "environment": environment(CPU),
            "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        }
        content = {"how": "python benchmarks/budget.py --renew, on an idle machine", "processors": known}
        options.budgets.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.budgets}")
        return 0
    if not ratios:
        print(f"no ratio has {options.only!r} in its name", file=sys.stderr)
        return 2
    if bad:
        print(f"more than {MARGIN:.0%} over budget: {', '.join(bad)}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
