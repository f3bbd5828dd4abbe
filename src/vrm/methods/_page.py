"""The documentation page of a method, made from its docstrings, signature and declarations."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from vrm import methods
from vrm.contract import NO_TEACHER_PROBE, DataInfo, Method, Norm, Probe
from vrm.wording import bytes_in_words

EXAMPLE = "resnet32x4/resnet8x4 on CIFAR-100"


def venue_in_words(method: type[Method]) -> str:
    """Return where and when a method was published, or ``-`` for one without a paper."""
    return "-" if method.venue == "-" else f"{method.venue} {method.year}"


def page(name: str) -> str:
    """Return the page of a method in Markdown: formula, options, published settings and needs.

    Raise ``ValueError`` if there is no such method.
    """
    method = methods.load(name)
    parts = [
        f"# {name}",
        _wrap(f"*{method.title}*, {venue_in_words(method)}. Family: {method.family}.".replace("*, -.", "*.")),
        _markdown(inspect.getdoc(method) or "").partition("\n\n")[0],
        "## Formula and sources",
        _markdown(inspect.getdoc(inspect.getmodule(method)) or ""),
        "## Options",
        _list(_options(method)),
        "## Published settings",
        _list(_published(method)),
        "## What it needs",
        f"With default options; sizes are those for {EXAMPLE}.",
        _list([f"{what}: {value}" for what, value in _needs(method())]),
    ]
    return "\n\n".join(parts) + "\n"


def needs_in_words(method: Method) -> str:
    """Return in a phrase what a method needs beyond the logits of one view. The instance must be a new one."""
    needs = method.needs
    taps = sorted({*needs.student_taps, *needs.teacher_taps})
    phases = [f"{phase.epochs} epochs of {phase.name}" for phase in method.phases if phase.epochs is not None]
    refused = _build_on_example(method)
    words = {
        "no teacher": not needs.teacher,
        "teacher's batch norms in train mode": needs.teacher_batch_statistics,
        f"{1 + needs.virtual_views} views": needs.virtual_views,
        "taps " + ", ".join(taps): taps,
        "sample index": needs.index,
        "random draws": needs.draws,
        "whole batches": needs.couples_samples,
        "own optimiser": method.optimizer,
        "extra parameters": any(p.requires_grad for p in method.parameters()),
        "memory": _count_memory(method) >= 1e5,
        " and ".join(phases) + " before": phases,
        f"other networks than {EXAMPLE}": refused,
    }
    return "; ".join(word for word, wanted in words.items() if wanted) or "logits"


def explain_options(method: type[Method]) -> dict[str, str]:
    """Return the meaning of each option, from the section ``Args`` of the docstring of ``__init__``."""
    _, _, text = (inspect.getdoc(method.__init__) or "").partition("Args:\n")
    meanings: dict[str, str] = {}
    for name, meaning in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE):
        meanings[name] = " ".join(_markdown(meaning).split())
    return meanings


def _markdown(docstring: str) -> str:
    """Return a docstring in Markdown: its references and literals between single backticks."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", docstring.replace("``", "`"))


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _list(items: list[str]) -> str:
    return "\n".join(_wrap(f"- {item}", "  ") for item in items) or "None."


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    return f"`{annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else annotation}`"


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_value(below)}' for key, below in value.items())}}}"
    return (
        {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _options(method: type[Method]) -> list[str]:
    meanings = explain_options(method)
    lines = []
    for name, option in methods.options(method).items():
        line = f"`{name}` ({_type(option.annotation)}, default `{_value(option.default)}`)"
        lines.append(f"{line}: {meanings[name]}" if name in meanings else line)
    return lines


def _published(method: type[Method]) -> list[str]:
    lines = []
    for data, condition, pairs in methods.published_tables(method):
        for pair, settings in pairs.items():
            which = pair if pair != "*" else "all pairs" if len(pairs) == 1 else "all other pairs"
            values = ", ".join(f"`{name}={_value(value)}`" for name, value in settings.items()) or "the defaults"
            lines.append(f"{data}, {f'`{condition}`, ' if condition else ''}{which}: {values}")
    return lines


def _needs(method: Method) -> list[tuple[str, str]]:
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
        ("smallest batch", str(needs.min_batch)),
        ("fewest classes", str(needs.min_classes)),
        ("optimiser of its own", "yes" if method.optimizer is not None else "no"),
        ("step may be captured as a CUDA graph", "yes" if needs.capturable else "no"),
    ]


def _sizes(method: Method) -> list[tuple[str, str]]:
    """Return the extra parameters and the memory, counted on an example."""
    refused = _build_on_example(method)
    if refused is not None:
        return [("extra parameters and memory", f"unknown, as it does not work on {EXAMPLE}: {refused}")]
    parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
    memory = _count_memory(method)
    return [("extra parameters", f"{parameters:,}"), ("memory", bytes_in_words(memory) if memory else "none")]


def _count_memory(method: Method) -> int:
    return sum(b.numel() * b.element_size() for b in method.buffers())


def _build_on_example(method: Method) -> str | None:
    """Build the method on the example. Return why that is impossible, or None."""
    with torch.random.fork_rng(devices=[]):
        student, teacher, data = reference_pair()
        try:
            method.build(student, teacher if method.needs.teacher else NO_TEACHER_PROBE, data)
        except ValueError as error:
            return str(error)
    return None


def reference_pair() -> tuple[Probe, Probe, DataInfo]:
    """Return resnet8x4, resnet32x4 and CIFAR-100 as they are measured before training."""
    stages = {"stage1": (64, 32, 32), "stage2": (128, 16, 16), "stage3": (256, 8, 8)}
    pre = {f"{stage}:pre": shape for stage, shape in stages.items()}
    shapes: dict[str, tuple[int, ...]] = {"stem": (32, 32, 32), **stages, **pre, "pooled": (256,), "logits": (100,)}
    norms = {tap: Norm(torch.ones(shape[0]), torch.zeros(shape[0])) for tap, shape in pre.items()}
    student, teacher = (
        Probe(name, (32, 32), 100, shapes, frozenset({*pre, "logits"}), norms, nn.Linear(256, 100))
        for name in ("resnet8x4", "resnet32x4")
    )
    return student, teacher, DataInfo(50_000, 100, 64, torch.arange(50_000) % 100)
