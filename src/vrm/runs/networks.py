"""Student and teacher of a run: loaded by name or from a folder, or given as modules, and checked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from vrm import config, models, tasks
from vrm.config import ConfigError
from vrm.contract import Probe
from vrm.data import DataSet
from vrm.models import Card, Preprocess, TappedNetwork
from vrm.models.teacher import common_memory
from vrm.models.weights import fill_network, packed
from vrm.runs.folder import CARD, changed_files
from vrm.wording import counted

LOGICAL = re.compile(r"(stages?|stage\d+|last|stem|map|pooled|logits)(:pre)?")
"""Selectors of taps that are no module paths."""

USUAL_SIDES = (32, 64, 96, 128, 224, 240, 256, 299, 336, 384, 448, 512)
"""Sides of images that are tried with a network that fails on its own, to tell whether another size could help."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and what is known of it."""

    network: nn.Module
    card: Card
    logits_key: str | None = None
    """Which entry of what the network returns are the logits."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it was had."""
    recorded: bool = False
    """Whether the card is that of a run folder."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Who says what the input on the card is, see :mod:`vrm.runs.inputs`."""


def load_network(settings: config.Network, dataset: DataSet, *, role: str) -> LoadedNetwork:
    """Return a network by name or from a run folder, with its weights where they are given.

    A network from a run folder comes with its card, also where the file of weights in it is named. Any other gets the
    card of a network that was made for these data. Raise ``ConfigError`` if it cannot be had;
    ``role`` is what messages call it.
    """
    try:
        if "/" in settings.name:
            folder = Path(settings.name)
            card = load_card(folder)
            network = models.create(card.architecture, num_classes=card.num_classes, **card.options)
            notes = _fill(network, settings, settings.weights or folder / "model.safetensors", role)
            return LoadedNetwork(network, card, notes=notes, recorded=True)
        network = models.create(settings.name, num_classes=dataset.num_classes, **settings.options)
        notes = ()
        if settings.weights is not None:
            notes = _fill(network, settings, settings.weights, role)
            if (beside := _card_beside(settings.weights)) is not None:
                beside = replace(beside, architecture=settings.name, options=settings.options)
                return LoadedNetwork(network, beside, notes=notes, recorded=True)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{role}={settings.name}: {error}") from None
    return LoadedNetwork(network, _card_for(settings.name, dataset, options=settings.options), notes=notes)


def _fill(network: nn.Module, settings: config.Network, file: Path, role: str) -> tuple[str, ...]:
    """Load a network's weights; return what was taken out of which wrapping, if there was any."""
    try:
        told = fill_network(network, file, key=settings.weights_key)
    except models.SeveralWeights as error:
        words = " or ".join(f"{role}.weights_key={key}" for key in error.keys)
        raise ValueError(f"{file} holds several sets of weights that fit and differ; give {words}") from None
    return (f"{role}.weights={told}",) if told else ()


def wrap_module(network: nn.Module, dataset: DataSet) -> LoadedNetwork:
    """Return a user's own module, with the card of a network that was made for these data.

    The card of one that :func:`vrm.models.create` made tells how to make it again; another's names its class.
    """
    name, options = models.created_as(network) or (f"{type(network).__module__}.{type(network).__qualname__}", {})
    return LoadedNetwork(network, _card_for(name, dataset, options=options))


def _card_for(architecture: str, dataset: DataSet, *, options: dict[str, object] | None = None) -> Card:
    """Return the card of a network that was made for this data."""
    return Card(
        architecture=architecture,
        options=options or {},
        task=dataset.task,
        num_classes=dataset.num_classes,
        classes=dataset.classes,
        input_size=dataset.image_size,
        mean=dataset.mean,
        std=dataset.std,
        data=dataset.name,
    )


def load_card(folder: Path) -> Card:
    """Return the card in a run folder; warn if it was changed after the run had ended. Raise ``ValueError`` without."""
    card = Card.read(folder)
    for problem in changed_files(folder, (CARD,)):
        warnings.warn(problem, stacklevel=2)
    return card


def _card_beside(weights: Path) -> Card | None:
    """Return the card of the run in whose folder these weights lie; its scores are those of the last weights."""
    folder = weights if weights.is_dir() else weights.parent
    if not (folder / "model.json").is_file():
        return None
    card = load_card(folder)
    last = weights.is_dir() or weights.name == "model.safetensors"
    return card if last else replace(card, scores=None)


def attach_taps(loaded: LoadedNetwork, taps: tuple[str, ...], image_size: tuple[int, int]) -> TappedNetwork:
    """Return the network behind its own normalisation and, if it takes another size, resizing."""
    size = None if loaded.card.input_size == image_size else loaded.card.input_size
    card = loaded.card
    preprocess = Preprocess(card.mean, card.std, size, antialias=card.antialias is not False)
    return TappedNetwork(
        loaded.network,
        taps,
        preprocess,
        input_size=card.input_size,
        in_channels=card.channels,
        probabilities=card.outputs == "probabilities",
        logits_key=loaded.logits_key,
        num_classes=card.num_classes,
    )


def probe_network(loaded: LoadedNetwork, selectors: tuple[str, ...], dataset: DataSet, role: str) -> Probe:
    """Run a network once and return what its taps measure, those of ``selectors`` that are module paths included.

    Raise ``ConfigError`` if it cannot take the images, or gives another number of logits than there are classes.
    """
    card = loaded.card
    raw = tuple(selector for selector in selectors if not LOGICAL.fullmatch(selector))
    try:
        probe = models.probe(
            loaded.network,
            name=card.architecture,
            input_size=card.input_size,
            in_channels=card.channels,
            extra_taps=raw,
            logits_key=loaded.logits_key,
            num_classes=card.num_classes,
        )
    except models.NetworkError as error:
        fix = f"its forward must take a batch of images of {counted(card.channels, 'channel')} alone; mend it"
        if any(models.accepts(loaded.network, input_size=(n, n), in_channels=card.channels) for n in USUAL_SIDES):
            fix = f"give {role}.size=PIXELS that suit it"
        raise ConfigError(f"{role} {card.architecture} {error.reason}; {fix}, or give another {role}") from error
    except ValueError as error:
        raise ConfigError(f"{role} {card.architecture}: {error}") from None
    check_classes(replace(card, num_classes=probe.num_classes), dataset, role)
    return probe


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_classes(card: Card, dataset: DataSet, role: str, *, order: bool = False) -> None:
    """Raise ``ConfigError`` unless a network has as many classes as the data; with ``order`` also in the same order."""
    task = tasks.load(dataset.task)
    try:
        task.check_classes(card, dataset, role=role)
        if order:
            task.check_order(card, dataset, role=role)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_module(loaded: LoadedNetwork, role: str, device: torch.device) -> None:
    """Raise ``ConfigError`` for a network that takes no hooks, or whose tensors a run cannot train and restore."""
    network, name = loaded.network, f"{role} {loaded.card.architecture}"
    if isinstance(network, torch.jit.ScriptModule):
        raise ConfigError(f"{name} is a ScriptModule, whose features cannot be read; give the module it was made of")
    for tensor, value in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(value):
            raise ConfigError(f"{name}: {tensor!r} has no shape yet; run the network once on an image")
        if isinstance(value, nn.Parameter) and value.is_floating_point() and value.dtype != torch.float32:
            raise ConfigError(
                f"{name}: {tensor!r} is {value.dtype}, but weights are kept in torch.float32; call float() on the "
                "network, and give precision=bfloat16 or float16 to compute in half of it"
            )
        strides = value.stride() if value.layout is torch.strided else ()
        if any(stride == 0 and size > 1 for stride, size in zip(strides, value.shape, strict=False)):
            raise ConfigError(
                f"{name}: the elements of {tensor!r} share memory (it was made by expand), so that it cannot be "
                "restored; register a clone() of it"
            )

    for key, value in network.state_dict().items():
        if isinstance(value, torch.Tensor) and not value.is_quantized:
            continue
        try:
            packed(value, key, quantised=role == "teacher")
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    packs = [path for path, module in network.named_modules() if hasattr(module, "_packed_params")]
    if packs and device.type != "cpu":
        raise ConfigError(f"{name}: {packs[0]!r} is quantised, and runs on a CPU alone; give device=cpu")


def check_trainable(loaded: LoadedNetwork) -> None:
    """Raise ``ConfigError`` if a student has nothing to train, or two parameters overlap in memory."""
    parameters = dict(loaded.network.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        state = f"all {len(parameters)} are frozen (requires_grad is False)" if parameters else "it has none"
        raise ConfigError(
            f"student {loaded.card.architecture} has no parameter to train: {state}; call requires_grad_(True) on what "
            "is to learn"
        )
    common = common_memory(parameters.items())
    if common is not None:
        raise ConfigError(
            f"the student's parameters {common[0]!r} and {common[1]!r} lie in the same memory but are two: each would "
            "be updated on its own. Tie them by using one nn.Parameter in both places"
        )
