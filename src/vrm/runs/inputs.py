"""The input of each network of a run: size, resampling, channels and normalisation, and whose word each of them is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vrm import config, models
from vrm.config import ConfigError
from vrm.data import DataSet
from vrm.models import LibraryInput
from vrm.runs.networks import LoadedNetwork
from vrm.wording import counted, shape_in_words

CARD, DATA = "its card", "the data"
"""Who may say what a network's input is, beside its library, the settings and the rule for antialiasing."""


def settle_input(
    loaded: LoadedNetwork, settings: config.Network, dataset: DataSet, *, role: str, is_module: bool = False
) -> LoadedNetwork:
    """Return a network with its input settled, on its card and, with whose word it is, in ``origins``.

    Each part is, in this order, what the settings give; what the card of its run folder says; what its library says
    (mean and standard deviation of trained weights; the size of a network that is not trained here); what the data
    have. Images are shrunk with antialiasing, unless the views had enlarged them from no more pixels than the network
    takes. Raise ``ConfigError`` for what the network cannot have.

    Args:
        loaded: The network, with the data's input on its card if it has no run folder.
        settings: Those of the network.
        dataset: The data of the run.
        role: ``student``, ``teacher`` or ``model``, as in the settings' keys.
        is_module: Whether the network was given as a module, which may be trained.
    """
    card, view = loaded.card, dataset.image_size
    found: dict[str, Any] = {name: getattr(card, name) for name in ("mean", "std", "input_size", "antialias")}
    origins = dict.fromkeys(found, CARD if loaded.recorded else DATA)

    def take(said: dict[str, Any], origin: str) -> None:
        found.update(said)
        origins.update({name: origin.format(role=role, name=name.removeprefix("input_")) for name in said})

    library = None if loaded.recorded else models.library_input(loaded.network, card.architecture)
    if library is not None:
        trained = is_module or role != "student" or settings.weights is not None
        take(_said_by(library, trained=trained, sized=role != "student"), library.origin)
    given = {"mean": settings.mean, "std": settings.std, "antialias": settings.antialias}
    given["input_size"] = None if settings.size is None else (settings.size, settings.size)
    take({name: value for name, value in given.items() if value is not None}, "{role}.{name}")

    if settings.mean is not None and max(settings.mean) > 1 and dataset.test.dtype == torch.uint8:
        raise ConfigError(
            f"{role}.mean={list(settings.mean)} lies above 1, but images are 0 to 1 here; divide mean and std by 255"
        )
    channels = card.channels if loaded.recorded else _channels(loaded, found["input_size"], role)
    for name in ("mean", "std"):
        if given[name] is None and channels == 1 and len(found[name]) == 3:
            found[name] = models.grey_statistics(found[name])
        if len(found[name]) != channels:
            raise ConfigError(
                f"{role}.{name}={list(found[name])} has {counted(len(found[name]), 'number')}, but the network takes "
                f"images of {counted(channels, 'channel')}{' (grey)' if channels == 1 else ''}; give {channels}"
            )
    if not _shrinks(view, found["input_size"]):
        if settings.antialias is not None:
            raise ConfigError(
                f"{role}.antialias={str(settings.antialias).lower()} has no effect: images of {shape_in_words(view)} "
                "are not resized to fewer pixels for it; leave it out"
            )
    elif found["antialias"] is None:
        stored = dataset.test.stored_size
        enlarged = not _shrinks(stored, found["input_size"])  # shrunk again, they have no more detail than before
        reason = f"the views had enlarged images of {shape_in_words(stored)}" if enlarged else "by default"
        take({"antialias": not enlarged}, reason)
    outputs = settings.outputs or card.outputs
    return replace(loaded, card=replace(card, **found, outputs=outputs), origins=origins)


def _shrinks(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Return whether images get fewer pixels on any side."""
    return any(side > new for side, new in zip(before, after, strict=True))


def _channels(loaded: LoadedNetwork, input_size: tuple[int, int], role: str) -> int:
    """Return how many channels a network without a run folder takes."""
    if models.created_as(loaded.network) is None:
        return models.input_channels(loaded.network, input_size)
    options = loaded.card.options
    name = "in_chans" if "in_chans" in options else "in_channels"
    channels = options.get(name, 3)
    if channels not in (1, 3):
        raise ConfigError(f"{role}.options.{name}={channels}: images have 3 channels, and made grey 1; give 3 or 1")
    return int(channels)


def _said_by(library: LibraryInput, *, trained: bool, sized: bool) -> dict[str, Any]:
    """Return those fields of a card that the library decides."""
    found: dict[str, Any] = {"mean": library.mean, "std": library.std} if trained else {}
    return found | ({"input_size": library.size} if sized and library.size is not None else {})


def describe_input(loaded: LoadedNetwork, dataset: DataSet) -> str:
    """Return how images reach a network, and who says so."""
    card, view = loaded.card, dataset.image_size
    origins = {  # a setting is quoted, as elsewhere in messages
        part: f"'{origin}'" if re.fullmatch(r"[a-z]+\.[a-z_]+", origin) else origin
        for part, origin in loaded.origins.items()
    }
    text = f"{shape_in_words(view)} images"
    if card.input_size != view:
        text += f" are resized to {shape_in_words(card.input_size)} for it, as {origins['input_size']} says"
    if _shrinks(view, card.input_size):
        text += f", {'with' if card.antialias else 'without'} antialiasing ({origins['antialias']})"
    text += "; made grey" if card.channels == 1 else ""
    mean, std = (f"{name} {numbers_in_words(value)}" for name, value in (("mean", card.mean), ("std", card.std)))
    of = f" of {origins['mean']}" if origins["mean"] != origins["std"] else ""
    text += f"; {mean}{of} and {std} of {origins['std']}"
    if card.channels == 3 and (card.mean, card.std) != (dataset.mean, dataset.std):
        text += f"; the data have {numbers_in_words(dataset.mean)} and {numbers_in_words(dataset.std)}"
    return text


def numbers_in_words(values: Sequence[float]) -> str:
    """Return ``(0.5, 0.25)`` with at most four digits each."""
    return f"({', '.join(f'{value:.4g}' for value in values)})"
