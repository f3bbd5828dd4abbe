"""What a benchmark measures: methods with the settings of a run, as they are or with something changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, Field, field_validator

from vrm import config, methods
from vrm.config import ConfigError, Run
from vrm.config.schema import UserPath
from vrm.wording import nearest

REFERENCES = ("ce", "kd")
"""Always measured: cross entropy alone, which is what training without a teacher costs, and plain distillation."""

NAIVE = "naive"
"""The one value of ``against`` that is no setting: VRM with every edge in memory."""

SHARED = ("device", "data", "recipe")
"""What all subjects of one measurement have in common, apart from ``NOT_SHARED``."""

NOT_SHARED = ("data.placement", "data.views", "data.seed")


class Settings(BaseModel, extra="forbid"):
    """The settings of a measurement, beside those of the runs that it measures.

    Attributes:
        methods: Names, or ``all``.
        against: What each method is measured against beside itself: other settings, such as
            ``[compile=true,precision=bfloat16+ema=0.99]`` (``+`` joins several), or ``naive``, a VRM that stores every
            edge.
        rounds: Rounds in which every subject has a turn; by default 10 on CUDA, 5 on the CPU.
        steps: Timed steps in a turn; by default 20 on CUDA, 3 on the CPU.
        warmup: Untimed steps before them.
        samples: How many images to make up where none are given.
        classes: How many classes they have.
        memory: On the CPU, measure peak memory too, in a process for each method.
        out: A JSON file for everything that was measured.
    """

    methods: tuple[str, ...] = ("vrm",)
    against: tuple[str, ...] = ()
    rounds: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    warmup: int = Field(1, ge=0)
    samples: int = Field(50_000, gt=0)
    classes: int | None = Field(None, gt=1)
    memory: bool = True
    out: UserPath | None = None

    @field_validator("methods", "against", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        """Read ``methods=vrm`` as ``methods=[vrm]``."""
        return (value,) if isinstance(value, str) else value

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        chosen = methods.names() if names == ("all",) else tuple(dict.fromkeys(names))
        unknown = [name for name in chosen if name not in methods.names()]
        if unknown or not chosen:
            near = nearest(unknown[0], (*methods.names(), "all")) if unknown else "name one, or all"
            raise ValueError(f"methods={','.join(chosen)}: {near}")
        return chosen

    @field_validator("against")
    @classmethod
    def _check_against(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if word != NAIVE and not all("=" in part for part in word.split("+")):
                raise ValueError(f"against={word}: give {NAIVE}, or settings, as against=[compile=true,ema=0.99]")
        return tuple(dict.fromkeys(words))


@dataclass(frozen=True)
class Subject:
    """A method in one of its phases, as it is or with one change (a value of ``against``)."""

    method: str
    run: Run
    change: str = ""
    phase: int = 0
    """The position of the phase."""
    phase_name: str = ""
    """Empty for a method with a single phase."""

    @property
    def name(self) -> str:
        """Method, phase and change in words."""
        return " ".join(filter(None, (self.method, self.phase_name and f"({self.phase_name})", self.change)))


def resolve_run(recipe: str, words: Sequence[str], method: str) -> Run:
    """Return the settings of a run with this method and any pair, without a teacher if the method needs none.

    Raise ``ConfigError`` for words that a run refuses, and for a missing teacher.
    """
    chosen = []
    for word in words:
        key, _, value = word.partition("=")
        owner, _, option = key.partition(".")
        if key == "pair":
            if value.count("/") != 1:
                raise ConfigError(f"{word}: give pair=TEACHER/STUDENT, or teacher=NAME and student=NAME")
            teacher, student = value.split("/")
            chosen += [f"teacher={teacher}", f"student={student}"]
        elif owner in methods.names():
            chosen += [f"method.{option}={value}"] if owner == method else []
        else:
            chosen.append(word)
    run = config.resolve("distill", recipe, [*chosen, f"method={method}"]).run
    if not config.build_method(run.method).needs.teacher:
        return run.model_copy(update={"teacher": None})
    if run.teacher is None:
        raise ConfigError(f"method={method} needs a teacher: give pair=TEACHER/STUDENT, or teacher=NAME")
    return run


def list_subjects(recipe: str, words: Sequence[str], settings: Settings) -> list[Subject]:
    """Return everything to be measured, the references first.

    Raise ``ConfigError`` for settings that a run refuses, that have no effect on a step, or that all subjects share.
    """
    check_words(words)
    for change in settings.against:
        if change == NAIVE:
            if "vrm" not in settings.methods:
                raise ConfigError(f"against={NAIVE} is a form of vrm; name it in methods")
            continue
        check_words(change.split("+"))
        for key in _keys(change):
            if key.partition(".")[0] in SHARED and key not in NOT_SHARED:
                raise ConfigError(f"against={change}: all steps of one measurement have the same {key}; measure twice")
    references = [name for name in REFERENCES if name in methods.names()]
    found = []
    for name in dict.fromkeys((*references, *settings.methods)):
        for change in ("", *(settings.against if name in settings.methods else ())):
            owners = {key.partition(".")[0] for key in _keys(change)} & set(methods.names())
            if (change == NAIVE and name != "vrm") or not owners <= {name}:
                continue
            kept = [word for word in words if word.partition("=")[0] not in _keys(change)]
            try:
                run = resolve_run(recipe, [*kept, *(part for part in change.split("+") if "=" in part)], name)
            except ConfigError:
                if name in settings.methods:
                    raise
                continue  # a reference that these settings rule out, such as KD without a teacher
            phases = config.build_method(run.method).phases
            found += [
                Subject(name, run, change, position, phase.name if len(phases) > 1 else "")
                for position, phase in enumerate(phases)
            ]
    return found


def _keys(change: str) -> set[str]:
    return {part.partition("=")[0] for part in change.split("+") if "=" in part}


def check_words(words: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a setting without effect on a step, or a method named elsewhere than in ``methods``."""
    for word in words:
        key = word.partition("=")[0]
        section, _, option = key.partition(".")
        if section == "method":
            raise ConfigError(
                f"{word}: name methods with methods=[..], and an option of one as NAME.{option or 'OPTION'}=VALUE"
            )
        if not config.affects_step(key):
            raise ConfigError(f"{word}: {key} has no effect on a step; leave it out")
