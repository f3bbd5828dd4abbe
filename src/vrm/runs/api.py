"""Starting and resuming runs: the few calls that command line and Python share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from vrm import config, tasks
from vrm.config import Resolved, Run
from vrm.data import DataSet, place
from vrm.engine.devices import choose_device
from vrm.engine.distribution import World, join
from vrm.engine.evaluation import evaluate
from vrm.models import Card
from vrm.runs.assembly import (
    Assembly,
    assemble,
    load_data,
    load_network,
    tapped,
)
from vrm.runs.checkpoint import write_text
from vrm.runs.display import Display
from vrm.runs.folder import RunError, RunFolder, check_settings
from vrm.runs.trainer import Training


def start(resolved: Resolved, *, console: Console, quiet: bool = False) -> dict[str, Any]:
    """Train a new run; returns its ``model.json``. Nothing is written before all settings are checked."""
    run = resolved.run
    world = join(choose_device(run.device), run.timeout)
    if world.main and (run.run / "config.yaml").is_file():
        check_settings(run)
        raise RunError(
            f"{run.run} already holds a run: `vrm resume {run.run}` goes on with it; or give run=ANOTHER_FOLDER"
        )
    assembly = assemble(run, console=console)
    if world.main and not quiet:
        introduce(assembly, resolved, console)
    return _train(assembly, world, console=console, quiet=quiet)


def resume(path: Path, *, console: Console, quiet: bool = False) -> dict[str, Any]:
    """Go on with a run from its newest whole checkpoint; a finished run is left as it is."""
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path} is not a run folder (it has no config.yaml); give the folder of a run, like runs/NAME")
    run = config.restore(path / "config.yaml").model_copy(update={"run": path})
    world = join(choose_device(run.device), run.timeout)
    return _train(assemble(run, console=console), world, console=console, quiet=quiet)


def distill(
    *,
    student: nn.Module,
    teacher: nn.Module | None,
    data: DataSet,
    run: str | Path,
    method: str = "vrm",
    epochs: int = 100,
    options: Mapping[str, Any] | None = None,
    allow_weak_teacher: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Distil ``teacher`` into ``student``, two modules of your own, on ``data``; the student is trained in place.

    Both networks take images (B, 3, H, W), normalised with the data's mean and standard deviation, and return logits
    (B, C). The folder ``run`` receives ``model.safetensors`` with the student's weights alone. The same call again goes
    on with a run that was interrupted.

    Args:
        student: The network to train.
        teacher: The network to learn from, trained; ``None`` for a method without one (``ce``).
        data: Training and test images, see :func:`vrm.data.from_dataset`.
        run: The run's folder.
        method: A name of ``vrm methods``.
        epochs: Passes over the training images.
        options: The method's options, for example ``{"alpha": 20.0}``.
        allow_weak_teacher: Go on with a teacher that is hardly better than chance.
        quiet: Show nothing.
        settings: Any other key of a run, nested: ``batch_size=128, optimizer={"lr": 0.1}, seed=1``.

    Returns:
        The content of ``model.json``: ``last`` and ``best`` accuracy on the test images, parameters, seconds.

    Raises:
        ValueError: Settings that do not fit each other; says which, and what is allowed.
    """
    content = {
        "run": str(run),
        "epochs": epochs,
        "student": {"name": type(student).__qualname__},
        "data": {"name": data.name},
        "method": {"name": method, **(options or {})},
    }
    if teacher is not None:
        content["teacher"] = {"name": type(teacher).__qualname__, "allow_weak": allow_weak_teacher}
    checked = config.resolve_mapping(config.merge(content, settings)).run
    check_settings(checked)
    world = join(choose_device(checked.device), checked.timeout)
    assembly = assemble(checked, dataset=data, student=student, teacher=teacher)
    return _train(assembly, world, console=Console(), quiet=quiet)


def introduce(assembly: Assembly, resolved: Resolved, console: Console) -> None:
    """Say what will be trained, and where its settings came from."""
    run = assembly.run
    student = assembly.student.card.architecture
    teacher = f" from {assembly.teacher_card.architecture}" if assembly.teacher_card else ""
    first = [f"{phase.epochs} of {phase.name}" for phase in assembly.method.phases if phase.epochs is not None]
    epochs = f"{run.epochs} epochs" + f" after {' and '.join(first)}" * bool(first)
    lines = [
        f"{run.method['name']}: {student}{teacher} on {assembly.data.name} "
        f"({len(assembly.data.train):,} training and {len(assembly.data.test):,} test images), {epochs}, "
        f"{run.precision} on {assembly.device}, run folder {run.run}",
        "method: " + ", ".join(f"{key}={value}" for key, value in run.method.items() if key != "name"),
        *config.describe_sources(resolved),
    ]
    lines += [assembly.data.placement] * bool(assembly.data.placement)
    taps = assembly.taps
    lines += [
        f"matched: student {s} {_shape(taps['student'][s])} with teacher {t} {_shape(taps['teacher'][t])}"
        for s, t in taps.get("matched", ())
    ]
    needs = assembly.method.needs
    if needs.couples_samples:
        lines.append("this method relates the samples of a batch: another batch size is another objective")
    if needs.teacher_batch_statistics:
        lines.append("the teacher's batch norms normalise by each batch: another batch size is another objective")
    if run.accumulate > 1:
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in assembly.student.network.modules())
        norms |= needs.teacher_batch_statistics
        couplings = ["the method relates samples"] * needs.couples_samples + ["batch norm sees one part"] * norms
        effect = f"not those of whole batches ({', '.join(couplings)})" if couplings else "those of whole batches"
        lines.append(f"each batch in {run.accumulate} parts: gradients are {effect}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _train(assembly: Assembly, world: World, *, console: Console, quiet: bool) -> dict[str, Any]:
    run: Run = assembly.run
    folder = RunFolder(run.run) if world.main else None
    settings = run.run / "config.yaml"
    new = folder is not None and not settings.is_file()
    try:
        if new:
            write_text(settings, config.dump(run))
        elif folder is not None:
            check_settings(run)
        return Training(assembly, folder, console=console, quiet=quiet, world=world).train()
    except (RunError, config.ConfigError):
        if new and folder is not None and not folder.saved():
            settings.unlink()  # it never began: the folder is free for a start with other settings
        raise
    finally:
        if folder is not None:
            folder.close()


def measure(recipe: str, words: Sequence[str], *, console: Console) -> tuple[Card, dict[str, float], int]:
    """Evaluate ``model=`` on a recipe's test split: the network's card, the result, and the number of images."""
    settings = config.resolve_evaluation(recipe, words)
    if settings.model is None:
        raise config.ConfigError("no network to evaluate: give model=NAME model.weights=FILE, or model=RUN_FOLDER/")
    device = choose_device(settings.device)
    try:
        dataset = place(load_data(settings.data, console), device, settings.data.placement)
    except ValueError as error:
        raise config.ConfigError(f"data.placement={settings.data.placement}: {error}") from None
    if settings.model.weights is None and "/" not in settings.model.name:
        raise config.ConfigError(
            f"model={settings.model.name} has no weights: give model.weights=FILE, or a run folder (model=runs/NAME)"
        )
    ready = load_network(settings.model, dataset, role="model")
    task = tasks.load(dataset.task)
    try:
        task.check_classes(ready.card, dataset, role="model")
        task.check_order(ready.card, dataset, role="model")
    except ValueError as error:
        raise config.ConfigError(str(error)) from None
    network = tapped(ready, (), dataset.image_size).to(device)
    with Display(console, title="evaluating", total=len(dataset.test), done=0) as display:
        found = evaluate(network, dataset.test, task, on_batch=display.step)
    return replace(ready.card, data=dataset.name), found, len(dataset.test)
