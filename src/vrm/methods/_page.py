"""The documentation page of a method, made from what its file says of itself."""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from vrm import methods
from vrm.contract import DataInfo, Method, Norm, Probe

EXAMPLE = "resnet32x4/resnet8x4 on CIFAR-100"


def page(name: str) -> str:
    """The page of a method in Markdown: formula, options, published settings, needs. ``ValueError`` if unknown."""
    method = methods.load(name)
    text = _markdown(inspect.getdoc(inspect.getmodule(method)) or "")
    summary = _markdown(inspect.getdoc(method) or "").partition("\n\n")[0]
    explained = _markdown(inspect.getdoc(method.__init__) or "")
    return (
        "\n\n".join(
            [
                f"# {name}",
                f"*{method.title}*, {method.venue} {method.year}. Family: {method.family}.",
                summary,
                "## Formula and sources",
                text,
                "## Options",
                _table(("option", "type", "default"), _options(method)) if methods.options(method) else "None.",
                *([explained] if methods.options(method) else []),
                "## Published settings",
                _table(("data set", "teacher/student", "settings"), _published(method))
                if method.published
                else "None.",
                "## What it needs",
                _table(("", f"with default options; sizes for {EXAMPLE}"), _needs(method())),
            ]
        )
        + "\n"
    )


def needs_in_words(method: Method) -> str:
    """What a new instance (it is used up) asks of its surroundings beyond logits of one view, in a phrase."""
    needs = method.needs
    taps = sorted({*needs.student_taps, *needs.teacher_taps})
    phases = [f"{phase.epochs} epochs of {phase.name}" for phase in method.phases if phase.epochs is not None]
    refused = _refused(method)
    words = {
        "no teacher": not needs.teacher,
        "teacher's batch norms in train mode": needs.teacher_batch_statistics,
        f"{1 + needs.virtual_views} views": needs.virtual_views,
        "taps " + ", ".join(taps): taps,
        "sample index": needs.index,
        "draws": needs.draws,
        "whole batches": needs.couples_samples,
        "own optimiser": method.optimizer,
        "extra parameters": any(p.requires_grad for p in method.parameters()),
        "memory": _memory(method) >= 1e5,
        " and ".join(phases) + " before": phases,
        f"other networks than {EXAMPLE}": refused,
    }
    return "; ".join(word for word, wanted in words.items() if wanted) or "logits"


def _markdown(text: str) -> str:
    """A docstring in Markdown: its references and literals between single backticks."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text.replace("``", "`"))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    return f"`{annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else annotation}`"


def _value(value: Any) -> str:
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, tuple | list) else str(value)


def _options(method: type[Method]) -> list[tuple[str, ...]]:
    options = methods.options(method).items()
    return [(f"`{name}`", _type(option.annotation), f"`{_value(option.default)}`") for name, option in options]


def _published(method: type[Method]) -> list[tuple[str, ...]]:
    return [
        (data, "all others" if pair == "*" and len(pairs) > 1 else "all" if pair == "*" else pair, _settings(settings))
        for data, pairs in method.published.items()
        for pair, settings in pairs.items()
    ]


def _settings(settings: Any) -> str:
    return ", ".join(f"`{name}={_value(value)}`" for name, value in settings.items()) or "the defaults"


def _needs(method: Method) -> list[tuple[str, ...]]:
    needs = method.needs
    phases = []
    for phase in method.phases:
        length = "the run's epochs" if phase.epochs is None else f"{phase.epochs} epochs"
        terms = "all terms" if phase.terms is None else " and ".join(phase.terms)
        phases.append(f"{phase.name} ({length}, {terms})")
    return [
        ("teacher", "yes" if needs.teacher else "no"),
        *[("teacher's batch norms", "in train mode")] * needs.teacher_batch_statistics,
        ("views, each a pass of the student", str(1 + needs.virtual_views)),
        ("taps of the student", ", ".join(needs.student_taps) or "none"),
        ("taps of the teacher", ", ".join(needs.teacher_taps) or "none"),
        ("phases", ", then ".join(phases)),
        *_sizes(method),
        ("sample index", "yes" if needs.index else "no"),
        ("random draws of its own", "yes" if needs.draws else "no"),
        ("couples the samples of a batch", "yes" if needs.couples_samples else "no"),
        ("least batch, least classes", f"{needs.min_batch}, {needs.min_classes}"),
        ("optimiser of its own", "yes" if method.optimizer is not None else "no"),
        ("step may be captured as a graph", "yes" if needs.capturable else "no"),
    ]


def _sizes(method: Method) -> list[tuple[str, ...]]:
    """Extra parameters and memory, counted on an example."""
    refused = _refused(method)
    if refused is not None:
        return [("extra parameters, memory", f"does not work on {EXAMPLE}: {refused}")]
    parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
    memory = _memory(method)
    shown = f"{memory / 1e6:,.1f} MB" if memory >= 1e5 else f"{memory / 1e3:,.1f} kB"
    return [
        ("extra parameters", f"{parameters:,}"),
        ("memory (buffers)", shown if memory else "none"),
    ]


def _memory(method: Method) -> int:
    return sum(b.numel() * b.element_size() for b in method.buffers())


def _refused(method: Method) -> str | None:
    """Build it on the example; why that cannot be, if so."""
    if method.needs.teacher:
        with torch.random.fork_rng(devices=[]):
            try:
                method.build(*_example())
            except ValueError as error:
                return str(error)
    return None


def _example() -> tuple[Probe, Probe, DataInfo]:
    """resnet8x4, resnet32x4 and CIFAR-100 as they are measured before training."""
    stages = {"stage1": (64, 32, 32), "stage2": (128, 16, 16), "stage3": (256, 8, 8)}
    pre = {f"{stage}:pre": shape for stage, shape in stages.items()}
    shapes: dict[str, tuple[int, ...]] = {"stem": (32, 32, 32), **stages, **pre, "pooled": (256,), "logits": (100,)}
    norms = {tap: Norm(torch.ones(shape[0]), torch.zeros(shape[0])) for tap, shape in pre.items()}
    student, teacher = (
        Probe(name, (32, 32), 100, shapes, frozenset({*pre, "logits"}), norms, nn.Linear(256, 100))
        for name in ("resnet8x4", "resnet32x4")
    )
    return student, teacher, DataInfo(50_000, 100, 64, torch.arange(50_000) % 100)
