"""The settings of a run: each with its type, its default, its role and its meaning.

A setting's role says what it decides: ``Trained`` the result, ``Kept`` what is written, ``Placed`` where the work is
done and how fast. What may change when a run is resumed, what the runs of one table row share, the key of a teacher
cache and the page ``docs/settings.md`` are all derived from this file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vrm.files import NoHome, user_path

PYTHON = "python"
"""The recipe's name in a run that was started from Python, on networks and data given as objects."""


class ConfigError(ValueError):
    """A setting that is refused. The message names the key, the value, what is allowed, and the fix."""

    exit_code = 2


@dataclass(frozen=True)
class Role:
    """What a setting decides, declared beside its type."""

    example: str
    """A value as one would type it."""
    common: bool = False
    """Whether ``vrm distill --help`` shows the setting."""
    step: bool = True
    """Whether the setting can change a single training step: its computation or its speed."""


@dataclass(frozen=True)
class Trained(Role):
    """A setting that decides the result of the run."""

    resume: Literal["fixed", "free", "folder"] = "fixed"
    """Whether a run may go on with another value: never, always, or from one run folder to another (a moved one)."""
    seed: bool = False
    """Whether the runs of one table row may differ in it."""
    matters: tuple[str, ...] = ()
    """The only values that change the result, where the others are alike."""
    teacher_output: bool = False
    """Whether the bits of the teacher's logits depend on it (facts known by hash aside: weights and data)."""


@dataclass(frozen=True)
class Kept(Role):
    """A setting that decides what is written and when; it may change whenever a run is resumed."""

    step: bool = False


@dataclass(frozen=True)
class Placed(Role):
    """A setting that decides where the work is done, how fast, and what stops it; it may change at every resume."""


def _at_home(path: Path) -> Path:
    try:
        return user_path(path)
    except NoHome as error:
        raise PydanticCustomError("home", "{reason}", {"reason": str(error)}) from None


def _network_at_home(name: str) -> str:
    return os.path.join(_at_home(Path(name)), "") if name.startswith("~") else name


UserPath = Annotated[Path, AfterValidator(_at_home)]
"""A path, in which ``~`` stands for the home folder."""
NetworkName = Annotated[str, AfterValidator(_network_at_home)]
"""The name of a network, or a run folder, in which ``~`` stands for the home folder."""


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Network(_Section):
    """A network."""

    name: Annotated[NetworkName, Trained("resnet8x4", resume="folder", common=True)]
    """The network, by name or run folder. Names are those of ``vrm models``, ``timm:NAME`` and
    ``torchvision:NAME``; a value with a slash is a folder, which brings its weights."""
    weights: Annotated[UserPath | None, Trained("s.safetensors", resume="free")] = None
    """The file of the weights to start from. They are known by their hash, so the file may move."""
    weights_key: Annotated[str | None, Trained("state_dict_ema", resume="free")] = None
    """Which weights to take of a file that holds several, such as raw ones and their average: the name of their entry
    or of their prefix."""
    logits_key: Annotated[str | None, Trained("logits")] = None
    """Which entry of what the network returns are its logits: a key, a name, or a position in a tuple. By default the
    entry ``logits``, else the only one with a row of as many values as there are classes for each image."""
    options: Annotated[dict[str, Any], Trained("{width: 2}")] = Field(default_factory=dict)
    """Arguments for building the network, as ``options.NAME=VALUE``. A run folder brings its own."""
    mean: Annotated[tuple[Finite, ...] | None, Trained("[0.485,0.456,0.406]")] = None
    """The mean of each channel by which the network's images are normalised, for values in [0, 1]; of a network of one
    channel, that of the grey. By default what its run folder says, else its library (timm, torchvision) of trained
    weights, else that of the data."""
    std: Annotated[tuple[Positive, ...] | None, Trained("[0.229,0.224,0.225]")] = None
    """The standard deviation of each channel, likewise."""
    size: Annotated[int | None, Trained("32"), Field(gt=0)] = None
    """The side in pixels of the square to which images are resized for the network. By default what its run folder
    says, else what its library says of a teacher, else that of the views."""
    antialias: Annotated[bool | None, Trained("false")] = None
    """Whether images that are resized to fewer pixels for the network are averaged. By default what its run folder
    says, else true, unless the views had enlarged images that were no larger than the network's before."""
    outputs: Annotated[Literal["logits", "probabilities"] | None, Trained("probabilities")] = None
    """What the network returns. Of one that ends in a softmax (``probabilities``) the logarithms are taken as logits.
    By default what its run folder says, else logits."""


class Teacher(Network):
    """The network to learn from."""

    name: Annotated[NetworkName, Trained("runs/teacher/", resume="folder", common=True)]
    """The network to learn from. It needs weights: a run folder brings them."""
    weights: Annotated[UserPath | None, Trained("t.safetensors", resume="free", common=True)] = None
    """The file of the teacher's weights. They are known by their hash, so the file may move."""
    logits_key: Annotated[str | None, Trained("logits", teacher_output=True)] = None
    """Which entry of what the teacher returns are its logits, as ``student.logits_key`` says of the student."""
    allow_weak: Annotated[bool, Placed("true", step=False)] = False
    """Start although the teacher does worse than its card says, or hardly better than chance."""
    cache: Annotated[UserPath | None, Placed("runs/cache", step=False, common=True)] = None
    """A folder that keeps the teacher's logits. They are computed once for all runs with the same views."""
    cache_precision: Annotated[Literal["float32", "float16"], Trained("float16", step=False)] = "float32"
    """How cached logits are stored. ``float16`` halves the size and rounds them (relative error 2^-11)."""


class Data(_Section):
    """The images and their labels."""

    name: Annotated[str, Trained("cifar100", common=True)]
    """The name of the data set. ``folder`` reads class folders, ``packed`` reads a pack made by ``vrm data``."""
    root: Annotated[UserPath | None, Placed("~/data/cifar100", common=True)] = None
    """The folder of the data, or of a pack. The data are known by their hash, so the folder may move."""
    seed: Annotated[int | None, Trained("1", seed=True, teacher_output=True), Field(ge=0)] = None
    """The seed of the order of the images and of their views; by default the run's ``seed``."""
    views: Annotated[str | None, Trained("imagenet")] = None
    """The view policy (augmentations), where it should not be the data set's own."""
    size: Annotated[int | None, Trained("224"), Field(gt=0)] = None
    """Resize the images to a square of this many pixels a side."""
    labels_per_class: Annotated[int | None, Trained("25", common=True), Field(gt=0)] = None
    """Keep so many training images of a class. They are always the same ones."""
    bad_images: Annotated[Literal["error", "skip", "report"], Trained("skip", matters=("skip",))] = "error"
    """What to do about an image that cannot be read: stop at the first, leave all of them out, or list all of them and
    then stop."""
    placement: Annotated[Literal["auto", "device", "host", "stream"], Placed("stream")] = "auto"
    """Where the decoded images lie: on the training device, in the host's memory, or nowhere (``stream`` decodes them
    anew for every batch). ``auto`` takes the first that fits."""
    workers: Annotated[int | None, Placed("8"), Field(ge=0)] = None
    """How many processes or threads decode images; by default one for each processor core."""
    download: Annotated[bool, Placed("true")] = False
    """Fetch the data into ``data.root`` if they are not there and their address is known."""


class Optimizer(_Section):
    """The optimizer, and its learning rate after the warm-up."""

    name: Annotated[Literal["sgd", "adamw"], Trained("adamw", common=True)] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: Annotated[float, Trained("0.1", common=True), Field(gt=0)] = 0.05
    """The learning rate at its highest. The schedule lowers it, and the warm-up leads up to it. AdamW's default is
    0.001."""
    momentum: Annotated[float, Trained("0.8"), Field(ge=0, lt=1)] = 0.9
    """The momentum of SGD."""
    nesterov: Annotated[bool, Trained("true")] = False
    """Use Nesterov's momentum (SGD)."""
    weight_decay: Annotated[float, Trained("0.0001"), Field(ge=0)] = 5e-4
    """The weight decay: an L2 penalty for SGD, decoupled for AdamW."""
    betas: Annotated[tuple[float, float], Trained("[0.9,0.99]")] = (0.9, 0.999)
    """The decay rates of AdamW's two moments."""

    @model_validator(mode="before")
    @classmethod
    def _give_adamw_its_rate(cls, given: Any) -> Any:
        """Return the settings with a rate for AdamW where none is given: that of SGD is far too high for it."""
        if isinstance(given, dict) and given.get("name") == "adamw":
            return {"lr": 0.001, **given}
        return given

    @model_validator(mode="after")
    def _check_nesterov(self) -> Self:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov=true needs a momentum: give optimizer.momentum=0.9, or leave it out")
        return self


class Schedule(_Section):
    """How the learning rate changes over the epochs."""

    name: Annotated[Literal["step", "cosine"], Trained("cosine", step=False, common=True)] = "step"
    """How the learning rate falls. ``step`` drops it after the milestones, ``cosine`` lowers it along half a cosine to
    ``schedule.min_lr``."""
    milestones: Annotated[tuple[int, ...], Trained("[150,180,210]", step=False)] = ()
    """The epochs after which the rate is multiplied by ``schedule.gamma`` (step schedule)."""
    gamma: Annotated[float, Trained("0.2", step=False), Field(gt=0, le=1)] = 0.1
    """The factor of each drop (step schedule)."""
    warmup_epochs: Annotated[int, Trained("5", step=False), Field(ge=0)] = 0
    """Epochs at the beginning in which the rate rises linearly, step by step."""
    min_lr: Annotated[float, Trained("0.0001", step=False), Field(ge=0)] = 0.0
    """The rate at the end (cosine schedule)."""


class Checkpoint(_Section):
    """When the state of the run is saved."""

    every: Annotated[int | None, Kept("500", common=True), Field(gt=0)] = None
    """Steps between checkpoints. By default one is written at the end of each epoch."""
    keep: Annotated[int, Kept("5"), Field(gt=0)] = 2
    """How many checkpoints to keep, the newest ones."""
    on_error: Annotated[Literal["stop", "continue"], Kept("continue")] = "stop"
    """What to do if a checkpoint cannot be written, for example on a full disk: stop, or warn and go on."""


class Evaluation(_Section):
    """The settings of ``vrm eval`` and ``vrm data``."""

    model: Network | None = None
    data: Data
    device: Annotated[Literal["auto", "cpu", "cuda"], Placed("cpu")] = "auto"
    """Where to compute; ``auto`` takes a GPU if there is one."""


class Run(_Section):
    """All settings of a run."""

    recipe: Annotated[str, Kept("cifar100")]
    """The recipe that the settings started from: the first word of the command, not a setting to give."""
    run: Annotated[UserPath, Kept("runs/vrm-0", common=True)]
    """The folder of the run. By default it is named by recipe, student, method and seed, in ``runs/``."""
    seed: Annotated[int, Trained("1", seed=True, common=True), Field(ge=0)] = 0
    """The seed of everything random. It rules the initial weights, the method's draws and, unless ``data.seed`` is
    given, the order and the views of the images."""
    epochs: Annotated[int, Trained("100", step=False, common=True), Field(gt=0)]
    """Passes through the training images. Phases of the method before that come on top."""
    batch_size: Annotated[int, Trained("128", common=True, teacher_output=True), Field(gt=0)] = 64
    """The images of one update. They are divided over all processes and all ``accumulate`` parts."""
    steps: Annotated[int | None, Trained("100", resume="free", step=False, common=True), Field(gt=0)] = None
    """Stop after this many steps. The schedule stays that of the whole run, and the same command without ``steps`` goes
    on to its end. A run that is stopped so early that it trains on fewer images than there are test images measures
    teacher and student on as many of them as it trains on, but on 256 at least."""
    views: Annotated[Literal[1, 2], Trained("2")] = 1
    """``2`` gives a method that uses one view of each image a second one; its loss is the mean over both."""
    student: Network
    teacher: Teacher | None = None
    method: Annotated[dict[str, Any], Trained("vrm", common=True)]
    """The method, a name of ``vrm methods``. ``method.OPTION=VALUE`` sets an option, and ``vrm methods
    NAME`` lists them."""
    data: Data
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer.model_validate({}))
    schedule: Schedule = Field(default_factory=lambda: Schedule.model_validate({}))
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint.model_validate({}))
    device: Annotated[Literal["auto", "cpu", "cuda"], Placed("cpu", common=True)] = "auto"
    """Where to train. ``auto`` takes a GPU if there is one."""
    precision: Annotated[
        Literal["float32", "tf32", "bfloat16", "float16"], Trained("bfloat16", common=True, teacher_output=True)
    ] = "float32"
    """The precision of the networks' passes. Losses and weights stay in float32. ``tf32`` needs an NVIDIA GPU."""
    accumulate: Annotated[int, Trained("4", teacher_output=True), Field(gt=0)] = 1
    """Split each batch into this many parts that go through the networks one after the other, to save memory."""
    ema: Annotated[float | None, Trained("0.999"), Field(gt=0, lt=1)] = None
    """Also keep an exponential moving average of the weights with this decay."""
    nan: Annotated[Literal["stop", "skip", "rollback"], Trained("skip", resume="free", step=False)] = "stop"
    """A step that meets NaN or infinity changes nothing. Then the run stops, goes on, or returns to the newest
    checkpoint with half the learning rate."""
    deterministic: Annotated[bool, Trained("true", teacher_output=True)] = False
    """Use only GPU algorithms that give the same bits every time. A CPU always does, at the same number of threads."""
    threads: Annotated[int | None, Placed("4"), Field(gt=0)] = None
    """CPU threads for one operation; by default as many as PyTorch chooses."""
    capture: Annotated[Literal["auto", "off"], Placed("off")] = "auto"
    """``auto`` records the training step as a CUDA graph where that is possible."""
    compile: Annotated[bool, Trained("true", teacher_output=True)] = False
    """Compile both networks with ``torch.compile``, on a GPU also the views and the losses."""
    channels_last: Annotated[bool, Trained("true", teacher_output=True)] = False
    """Store images and feature maps with the channels last."""
    timeout: Annotated[float, Placed("1800", step=False), Field(gt=0)] = 600
    """Seconds after which a distributed run gives up on a process that does not answer."""
    log_every: Annotated[int, Kept("10"), Field(gt=0)] = 50
    """Steps between the lines of ``metrics.jsonl``, counted from the start of each epoch."""
    tensorboard: Annotated[bool, Kept("true")] = False
    """Also write the metrics for TensorBoard."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs} is as long as the run (epochs={self.epochs}), "
                "so the rate would only rise; give fewer"
            )
        if self.schedule.name == "cosine" and self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr={self.schedule.min_lr} lies above optimizer.lr={self.optimizer.lr}, so the rate "
                "would rise; give less"
            )
        late = [m for m in self.schedule.milestones if m >= self.epochs]
        if self.schedule.name == "step" and late:
            example = str(sorted({self.epochs * eighths // 8 for eighths in (5, 6, 7)} - {0})).replace(" ", "")
            raise ValueError(
                f"schedule.milestones={late} lie at or after the last epoch ({self.epochs}), so the rate would never "
                f"drop; give milestones below {self.epochs}, for example schedule.milestones={example}"
            )
        return self

    @property
    def data_seed(self) -> int:
        """The seed of the order of the images and of their views."""
        return self.seed if self.data.seed is None else self.data.seed
