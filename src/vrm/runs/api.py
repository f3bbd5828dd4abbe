"""Starting, resuming and evaluating: the few calls that command line and Python share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from vrm import config, models, tasks
from vrm.config import Resolved, Run
from vrm.data import BadData, DataSet
from vrm.engine.devices import choose_device
from vrm.engine.distribution import World, join
from vrm.engine.evaluation import evaluate
from vrm.engine.process_state import process_state_restored
from vrm.files import user_path
from vrm.models import Card, unwrap
from vrm.models.wrappers import unwrapped
from vrm.runs.assembly import BATCH_NORMS, Assembly, assemble, load_data, place_data
from vrm.runs.checks.data import matched_taps
from vrm.runs.display import Display
from vrm.runs.environment import collect_facts
from vrm.runs.errors import RunError
from vrm.runs.folder import open_folder, read_settings, read_sources, require_run
from vrm.runs.inputs import settle_input
from vrm.runs.networks import attach_taps, check_classes, load_network
from vrm.runs.resumption import Resumption, decide_resumption, share_resumption
from vrm.runs.trainer import Trainer
from vrm.wording import counted


def start(resolved: Resolved, *, console: Console, quiet: bool = False) -> dict[str, Any]:
    """Train a run, or go on with it if its folder holds it already; return its ``model.json``.

    Nothing is written before all settings are checked. Raise ``ConfigError`` or ``RunError`` for what cannot be.
    """
    with errors_as_typed(resolved):
        world = _join(resolved.run)
        assembly = assemble(resolved.run, console=console)
        return _train(assembly, resolved, world, console=console, quiet=quiet)


def resume(path: str | Path, words: Sequence[str] = (), *, console: Console, quiet: bool = False) -> dict[str, Any]:
    """Go on with the run in a folder from its newest whole checkpoint; return its ``model.json``.

    ``words`` (``key=value``) change settings that may change at resume. A finished run is left as it is.
    """
    path = user_path(path)
    require_run(path)
    run = config.changed(read_settings(path), words)
    sources = read_sources(path) | {word.partition("=")[0]: "command line, at resume" for word in words}
    world = _join(run)
    return _train(assemble(run, console=console), Resolved(run, sources), world, console=console, quiet=quiet)


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
    student_settings: Mapping[str, Any] | None = None,
    teacher_settings: Mapping[str, Any] | None = None,
    data_settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Distil ``teacher`` into ``student``, two modules of your own, on ``data``; train the student in place.

    Both networks take images (B, 3, H, W), or (B, 1, H, W) made grey, and return logits (B, C). Images are normalised
    and resized for each as ``student_settings`` and ``teacher_settings`` say; else as timm's ``pretrained_cfg`` or
    torchvision's weights say of one of their networks (the size only of a teacher); else with the data's mean and
    standard deviation, at the data's size.

    The folder ``run`` receives ``model.safetensors`` with the student's weights alone. The same call again goes on with
    a run that was interrupted. As on the command line, the values apply that are published for the method on data of
    this name and, if :func:`vrm.models.create` made both networks, on the pair. Of the process and of the modules
    nothing changes but the student's weights and buffers, and the device and layout (``channels_last``) in which both
    networks lie. Of compiled, parallel or averaged modules the network inside is used, and saved under its own names.

    Args:
        student: The network to train.
        teacher: The network to learn from, trained; ``None`` for a method without one (``ce``).
        data: Training and test images, see :func:`vrm.data.from_dataset`.
        run: The run's folder.
        method: A name of ``vrm methods``.
        epochs: Passes over the training images.
        options: The method's options, for example ``{"alpha": 20.0}``.
        allow_weak_teacher: Go on with a teacher that is hardly better than chance.
        student_settings: Settings of the student, for example its input: ``{"mean": [0.5] * 3, "std": [0.5] * 3}``.
        teacher_settings: Settings of the teacher: ``mean``, ``std``, ``size`` and ``antialias`` of its input;
            ``{"outputs": "probabilities"}`` if it ends in a softmax; ``cache``, a folder that keeps its logits.
        data_settings: Settings of the data: ``views``, another policy than the data's own; ``seed``; ``placement``.
        quiet: Show nothing.
        settings: Any other key of a run, nested: ``batch_size=128, optimizer={"lr": 0.1}, seed=1``.

    Returns:
        The content of ``model.json``: ``last`` and ``best`` scores on the test images, parameters, seconds.

    Raises:
        ValueError: Settings, data and networks that do not fit each other, before anything is trained; says which, and
            what is allowed.
        RuntimeError: A network fails, or the loss is not finite, during training. The same call goes on.
    """
    given = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    inner = {role: unwrap(network) for role, network in given.items()}
    content: dict[str, Any] = {
        "run": str(run),
        "epochs": epochs,
        "student": {"name": _name(inner["student"]), **(student_settings or {})},
        "data": {"name": data.name, **(data_settings or {})},
        "method": {"name": method, **(options or {})},
    }
    if teacher is not None:
        content["teacher"] = {
            "name": _name(inner["teacher"]),
            "allow_weak": allow_weak_teacher,
            **(teacher_settings or {}),
        }
    elif teacher_settings:
        raise config.ConfigError(f"teacher_settings={dict(teacher_settings)} has no effect without a teacher")
    resolved = config.resolve_mapping(config.merge(content, settings))
    with errors_as_typed(resolved):
        world = _join(resolved.run)
        with process_state_restored(*given.values()), unwrapped(**given) as notes:
            assembly = assemble(resolved.run, dataset=data, student=inner["student"], teacher=inner.get("teacher"))
            assembly = replace(assembly, notes=(*notes, *assembly.notes))
            return _train(assembly, resolved, world, console=Console(), quiet=quiet)


def _name(network: nn.Module) -> str:
    """Return the name under which methods may publish settings for a network, else its class."""
    created = models.created_as(network)
    return type(network).__qualname__ if created is None else created[0]


def introduce(assembly: Assembly, resolved: Resolved, console: Console) -> None:
    """Say what will be trained, and where its settings came from."""
    run, needs = assembly.run, assembly.method.needs
    teacher = f" from {assembly.teacher_card.architecture}" if assembly.teacher_card else ""
    first = [f"{phase.epochs} of {phase.name}" for phase in assembly.method.phases if phase.epochs is not None]
    epochs = counted(run.epochs, "epoch") + f" after {' and '.join(first)}" * bool(first)
    if run.steps is not None:
        epochs = f"{counted(run.steps, 'step')} on the schedule of {epochs}"
    lines = [
        f"{run.method['name']}: {assembly.student.card.architecture}{teacher} on {assembly.data.name} "
        f"({len(assembly.data.train):,} training and {counted(len(assembly.data.test), 'test image')}), {epochs}, "
        f"{run.precision} on {assembly.device}, run folder {run.run}",
        *config.describe_sources(resolved),
    ]
    if options := [f"{key}={value}" for key, value in run.method.items() if key != "name"]:
        lines.insert(1, f"method: {', '.join(options)}")
    lines += assembly.notes
    lines += [text for text in (assembly.data.origin, assembly.data.placement) if text]
    lines += [f"matched: student {pair.replace(' with ', ' with teacher ')}" for pair in matched_taps(assembly.taps)]
    if needs.couples_samples:
        lines.append("this method relates the samples of a batch: another batch size is another objective")
    if needs.teacher_batch_statistics:
        lines.append("the teacher's batch norms normalise by each batch: another batch size is another objective")
    if run.accumulate > 1:
        norms = any(isinstance(module, BATCH_NORMS) for module in assembly.student.network.modules())
        norms |= needs.teacher_batch_statistics
        couplings = ["the method relates samples"] * needs.couples_samples + ["batch norm sees one part"] * norms
        effect = f"not those of whole batches ({', '.join(couplings)})" if couplings else "those of whole batches"
        lines.append(f"each batch in {run.accumulate} parts: gradients are {effect}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def errors_as_typed(resolved: Resolved) -> Iterator[None]:
    """Let errors of a run name settings as the user wrote them: in Python, or as ``model`` of ``vrm train``."""
    try:
        yield
    except (config.ConfigError, RunError, BadData) as error:
        error.args = (config.as_typed(str(error), resolved),)
        raise


def _join(run: Run) -> World:
    """Meet the other processes of the run, after refusing what the run's folder alone shows to be impossible."""
    world = join(choose_device(run.device), run.timeout)
    if world.main:
        decide_resumption(run.run, run).require()
    return world


def _train(assembly: Assembly, resolved: Resolved, world: World, *, console: Console, quiet: bool) -> dict[str, Any]:
    """Train in the run's folder, from where :func:`decide_resumption` says."""
    run = assembly.run
    facts = collect_facts(assembly, world)
    errors = Console(stderr=True, quiet=quiet)
    folder = None
    if world.main:
        folder = open_folder(run.run, lambda text: errors.print(text, style="yellow", markup=False, soft_wrap=True))
    begins = folder is not None and folder.is_new
    trainer = None
    try:
        found = decide_resumption(run.run, run, facts) if world.main else Resumption()
        found = share_resumption(found, world)
        found.require()
        if folder is not None:
            folder.write_settings(resolved)
            if begins and not quiet:
                introduce(assembly, resolved, console)
        trainer = Trainer(assembly, facts, folder, console=console, quiet=quiet, world=world)
        return trainer.train(found)
    except BaseException:
        if begins and folder is not None and (trainer is None or trainer.state.step == 0):
            folder.forget_settings()  # nothing was trained: the folder is free for other settings
        raise
    finally:
        if folder is not None:
            folder.close()


def evaluate_model(recipe: str, words: Sequence[str], *, console: Console) -> tuple[Card, dict[str, float], int]:
    """Evaluate ``model=`` on a recipe's test split; return the network's card, its scores and the number of images."""
    settings = config.resolve_evaluation(recipe, words)
    if settings.model is None:
        raise config.ConfigError("no network to evaluate: give model=NAME model.weights=FILE, or model=RUN_FOLDER/")
    if settings.model.weights is None and "/" not in settings.model.name:
        raise config.ConfigError(
            f"model={settings.model.name} has no weights: give model.weights=FILE, or a run folder (model=runs/NAME)"
        )
    device = choose_device(settings.device)
    dataset = place_data(load_data(settings.data, console), device, settings.data)
    loaded = load_network(settings.model, dataset, role="model")
    loaded = settle_input(loaded, settings.model, dataset, role="model")
    for note in loaded.notes:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    check_classes(loaded.card, dataset, "model", order=True)
    loaded = replace(loaded, logits_key=settings.model.logits_key)
    network = attach_taps(loaded, (), dataset.image_size).to(device)
    with Display(console, title="evaluating", total=len(dataset.test)) as display:
        found = evaluate(network, dataset.test, tasks.load(dataset.task), on_batch=display.step)
    return replace(loaded.card, data=dataset.name), found, len(dataset.test)
