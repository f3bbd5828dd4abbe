"""The card of a trained network: what must be known to use it elsewhere, for example as a teacher."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from vrm.files import Damaged, read_json, user_path

FORMAT = 3
"""The format of run folders that this version writes and reads."""

ADDED = ("antialias", "outputs")
"""What cards of this format may lack, because the first of them were written without."""


@dataclass(frozen=True)
class Card:
    """What a run's ``model.json`` says of its network, beside the records of the run itself."""

    architecture: str
    """A name that :func:`vrm.models.create` knows, or the class of a user's own module."""
    options: dict[str, Any]
    """What :func:`vrm.models.create` was given besides the number of classes."""
    task: str
    """What the network was trained for, see :mod:`vrm.tasks`."""
    num_classes: int
    classes: tuple[str, ...]
    """Class names, in the order of the logits."""
    input_size: tuple[int, int]
    """(height, width) in pixels."""
    mean: tuple[float, ...]
    """Mean of each channel by which inputs are normalised, for values in [0, 1]; one for a network of grey images."""
    std: tuple[float, ...]
    """Standard deviation of each channel, likewise."""
    data: str | None = None
    """The data set that it was trained on."""
    scores: dict[str, float] | None = None
    """By metric key, what these weights reached on the test split of ``data``; ``None`` if that was not measured."""
    antialias: bool | None = None
    """Whether larger images are averaged where they are resized to ``input_size``; ``None`` if none were resized."""
    outputs: Literal["logits", "probabilities"] = "logits"
    """What the network returns."""

    @property
    def channels(self) -> int:
        """Number of channels of the input: 3, or 1 for grey images."""
        return len(self.mean)

    @staticmethod
    def read(folder: str | Path) -> Card:
        """Return the card in a run folder.

        Raise ``ValueError`` if there is none, and :class:`vrm.files.Damaged` if it cannot be read.
        """
        folder = user_path(folder)
        path = folder / "model.json"
        if not path.is_file():
            started = (folder / "config.yaml").is_file()
            hint = "the run has not finished: `vrm resume` it first" if started else "it is not a run folder"
            raise ValueError(f"{folder} has no model.json ({hint})")
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise Damaged(
                f"{path} is of format {content.get('format', 2)}, and this version of vrm reads format {FORMAT} alone: "
                "use its weights with teacher=NAME teacher.weights=FILE, or train it again"
            )
        try:
            names = [field.name for field in fields(Card) if field.name in content or field.name not in ADDED]
            known = {name: content[name] for name in names}
            card = TypeAdapter(Card).validate_python(known)
        except KeyError as error:
            raise Damaged(f"{path} is damaged: it lacks {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise Damaged(f"{path} is damaged: {key}={first['input']!r}: {first['msg']}") from None
        if card.num_classes != len(card.classes) or min(*card.input_size, card.num_classes) < 1:
            raise Damaged(
                f"{path} is damaged: num_classes={card.num_classes} with {len(card.classes)} class names, "
                f"input_size={card.input_size}"
            )
        if card.channels not in (1, 3) or len(card.std) != card.channels or not min(card.std) > 0:
            raise Damaged(f"{path} is damaged: mean={card.mean}, std={card.std}")
        return card
