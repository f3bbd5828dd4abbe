"""Every method on real networks whose stages do not fit: it trains, or says why not before it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from vrm import data, methods, models
from vrm.config import ConfigError, Resolved
from vrm.contract import NO_TEACHER, Batch, Progress, Views
from vrm.runs import api as runs
from vrm.runs.assembly import Assembly, assemble

from .own import settings
from .small import OPTIONS

PAIRS: Mapping[str, tuple[str, str]] = {
    "resnet/vgg": ("resnet8x4", "vgg8"),
    "vgg/resnet": ("vgg8", "resnet8x4"),
    "resnet/mobilenet": ("resnet8", "mobilenetv2"),
    "mobilenet/resnet": ("mobilenetv2", "resnet8"),
    "transformer/resnet": ("timm:vit_tiny_patch16_224", "resnet8"),
    "resnet/transformer": ("resnet8", "timm:vit_tiny_patch16_224"),
}
"""Teacher and student."""

SMALL_TRANSFORMER = {"img_size": 32, "patch_size": 4, "depth": 4, "embed_dim": 24, "num_heads": 2}
LINEAR = (
    r"has no pre-activation taps \(asked for stage.:pre.*\): its stages end without a ReLU, so their outputs are signed"
)
REFUSALS = [
    ("ofd", "resnet/mobilenet", f"mobilenetv2 {LINEAR}.*student_taps"),
    ("ab", "resnet/mobilenet", f"mobilenetv2 {LINEAR}.*student_taps"),
    ("reviewkd", "mobilenet/resnet", f"mobilenetv2 {LINEAR}.*teacher_taps"),
    ("reviewkd", "transformer/resnet", f"timm:vit_tiny_patch16_224 {LINEAR}.*teacher_taps"),
    ("ofd", "transformer/resnet", "batch norm before a stage's last ReLU, and timm:vit_tiny_patch16_224 has none"),
    ("ofd", "resnet/transformer", f"timm:vit_tiny_patch16_224 {LINEAR}.*student_taps"),
    (
        "fitnet",
        "transformer/resnet",
        "no stage of timm:vit_tiny_patch16_224 matches 'stage2' of .*; set teacher_tap, or",
    ),
    ("fsp", "resnet/vgg", "compares channels one by one, but stem of vgg8 has 64 and stem of resnet8x4 has 32"),
    ("fsp", "transformer/resnet", "timm:vit_tiny_patch16_224 has no tap 'stem'"),
    ("kdsvd", "resnet/mobilenet", "needs equal channels, but stage1 of mobilenetv2 has 12 and stage. of resnet8"),
    ("kdsvd", "resnet/transformer", "compares neighbouring maps and needs two at least"),
]
WITH_ADVICE: list[tuple[str, str, dict[str, Any]]] = [
    ("ofd", "resnet/mobilenet", {"student_taps": ("stages",)}),
    ("ab", "resnet/mobilenet", {"student_taps": ("stages",)}),
    ("reviewkd", "mobilenet/resnet", {"teacher_taps": ("stages",)}),
    ("reviewkd", "transformer/resnet", {"teacher_taps": ("stages",)}),
    ("ofd", "resnet/transformer", {"student_taps": ("stages",)}),
    ("ab", "transformer/resnet", {"teacher_taps": ("stages",)}),
    ("fitnet", "transformer/resnet", {"student_tap": "stage3"}),
    ("fitnet", "resnet/transformer", {"student_tap": "stage2", "teacher_tap": "stage3"}),
]
"""What the refusals advise, it is what helps."""

MATCHED = {
    "resnet/vgg": (("stage1", "stage2"), ("stage2", "stage3")),  # strides 2 and 4
    "vgg/resnet": (("stage2", "stage1"), ("stage3", "stage2")),
    "resnet/mobilenet": (("stage1", "stage2"), ("stage2", "stage3")),
    "transformer/resnet": (("stage3", "stage4"),),  # stride 4 alone
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.create(name, num_classes=10, **(SMALL_TRANSFORMER if name.startswith("timm:") else {}))


@cache
def digits() -> data.DataSet:
    return data.load("digits", labels_per_class=1, size=32)


def put_together(name: str, pair: str, **options: Any) -> Assembly:
    teacher, student = (network(each) for each in PAIRS[pair])
    teacher = teacher if methods.load(name)().needs.teacher else None
    words = dict(word.removeprefix("method.").split("=") for word in OPTIONS.get(name, ()))
    given = {option: int(value) for option, value in words.items()} | options
    run = settings("nowhere", student, teacher, name, batch_size=10)
    run = run.model_copy(update={"method": run.method | given})
    return assemble(run, dataset=digits(), student=student, teacher=teacher)


def train_once(assembly: Assembly) -> None:
    """One batch in each phase: loss and gradients are finite, and some reach the student."""
    distiller, images, target = assembly.distiller, digits().train.images, digits().train.targets
    views = (images,) * (1 + distiller.num_virtual)
    taught = NO_TEACHER if assembly.teacher is None else Views.of(assembly.teacher(view) for view in views)
    for phase in assembly.method.phases:
        at = Progress(torch.tensor(1), torch.tensor(0), 2, 2, phase.name)
        losses, student = distiller(
            views,
            taught,
            Batch(torch.arange(10), target),
            at,
            phase.terms,
        )
        assembly.student.network.zero_grad()
        losses.total(names=phase.terms).backward()
        grads = [p.grad for p in assembly.student.network.parameters() if p.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert any(grad.any() for grad in grads)
        assert torch.isfinite(student.real.logits).all()


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("pair", PAIRS)
def test_works_or_says_why_not(name: str, pair: str) -> None:
    try:
        assembly = put_together(name, pair)
    except ConfigError as error:
        reason = str(error)
    else:
        train_once(assembly)
        return
    assert re.match(f"method={name} cannot work on this pair: .*(; |: |choose|name)", reason)


@pytest.mark.parametrize(("name", "pair", "reason"), REFUSALS)
def test_refusals(name: str, pair: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"method={name} cannot work on this pair: .*{reason}"):
        put_together(name, pair)


@pytest.mark.parametrize(("name", "pair", "options"), WITH_ADVICE)
def test_advice_helps(name: str, pair: str, options: dict[str, Any]) -> None:
    train_once(put_together(name, pair, **options))


def introduced(assembly: Assembly) -> str:
    """What is said of a run before it starts."""
    console = Console(record=True, quiet=False, file=StringIO(), width=200)
    runs.introduce(assembly, Resolved(assembly.run, {}), console)
    return console.export_text()


def test_extra_epochs_are_told() -> None:
    assert ", 2 epochs after 1 of pretrain, " in introduced(put_together("ab", "resnet/vgg"))


def test_a_teacher_in_train_mode_is_told() -> None:
    assembly = put_together("ofd", "resnet/vgg")
    told = "the teacher's batch norms normalise by each batch: another batch size is another objective"
    assert told in introduced(assembly)
    assert told not in introduced(put_together("ofd", "resnet/vgg", teacher_batch_statistics=False))


@pytest.mark.parametrize("pair", MATCHED)
def test_stages_are_matched_by_stride_and_shown(pair: str) -> None:
    assembly = put_together("at", pair)
    assert assembly.taps["matched"] == MATCHED[pair]
    shown = [line for line in introduced(assembly).splitlines() if line.startswith("matched")]
    for line, (student, teacher) in zip(shown, MATCHED[pair], strict=True):
        sizes = [
            "x".join(map(str, assembly.taps[who][tap])) for who, tap in (("student", student), ("teacher", teacher))
        ]
        assert line == f"matched: student {student} {sizes[0]} with teacher {teacher} {sizes[1]}"
