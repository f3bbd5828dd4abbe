"""What must hold on a GPU. The same tests run on the CPU, as far as they mean something there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runs.forked import Forked, Pause
from tests.runs.small import OPTIONS, QUIET, SMALL, assert_same, interrupt, metrics, small, train
from vrm import randomness
from vrm.config import Resolved
from vrm.data import epoch_batches
from vrm.data.views import transforms
from vrm.data.views.policies import view_policy
from vrm.data.views.randaugment import apply_operations
from vrm.methods.vrm import vrm_loss
from vrm.runs import api as runs
from vrm.runs import assembly
from vrm.runs import trainer as loop
from vrm.runs.recorder import Recorder
from vrm.runs.trainer import Trainer

GPU = pytest.param("cuda", marks=pytest.mark.cuda)
devices = pytest.mark.parametrize("device", ["cpu", GPU])
KINDS = {
    "logits": ("method=kd",),
    "two views": ("method=kd", "views=2"),
    "projector": ("method=reviewkd",),
    "memory": ("method=crd", *OPTIONS["crd"]),
    "phases": ("method=ab", *OPTIONS["ab"]),
    "relations": ("method=vrm",),
    "two momenta": ("method=dot",),
    "adamw": ("method=kd", "optimizer=adamw"),
    "average, parts, half": ("method=kd", "ema=0.9", "accumulate=2", "batch_size=10", "precision=bfloat16"),
}
devices_and_kinds = pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "relations"), *(pytest.param("cuda", kind, marks=pytest.mark.cuda) for kind in KINDS)],
)
THREE = ("logits", "memory", "relations")
some_kinds = pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "relations"), *(pytest.param("cuda", x, marks=pytest.mark.cuda) for x in THREE)],
)
EPOCHS = "epochs=7"
"""A step is recorded at its fourth call; the last, smaller batch comes once an epoch."""


def words_of(device: str) -> list[str]:
    """The words that place a run on a device and make it repeat bit by bit, as a CPU always does."""
    return ["device=cpu"] if device == "cpu" else ["device=cuda", "deterministic=true"]


def on(device: str, run: Path, teacher: Path, *words: str) -> Resolved:
    """A small run on a device, which repeats bit by bit."""
    return small(run, f"teacher={teacher}/", *words_of(device), *words)


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_step_does_what_the_eager_one_does(teacher: Path, tmp_path: Path, kind: str) -> None:
    for capture in ("auto", "off"):
        train(on("cuda", tmp_path / capture, teacher, *KINDS[kind], EPOCHS, f"capture={capture}"))
    assert_same(tmp_path / "auto", tmp_path / "off")


@pytest.mark.cuda
def test_a_gpu_records_the_step(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches and the last one: two recordings, and most steps are replays."""
    made: list[Any] = []
    original = Trainer._record
    monkeypatch.setattr(Trainer, "_record", lambda self, step: made.append(original(self, step)) or made[-1])
    train(on("cuda", tmp_path / "run", teacher, "method=vrm", EPOCHS))
    assert [len(captured.recordings) for captured in made] == [2]


class _NoReading(TorchDispatchMode):
    """Reading a number off a tensor is an error: on a GPU it would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number was read off a tensor between two log intervals")
        return func(*args, **(kwargs or {}))


class _Watch:
    """Makes waiting for the device an error, from :meth:`start` to :meth:`stop`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.mode: _NoReading | None = None
        self.epochs = 0

    def start(self) -> None:
        self.epochs += 1
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        else:
            self.mode = _NoReading()
            self.mode.__enter__()

    def stop(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        elif self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None


@contextmanager
def watched(device: str, patch: pytest.MonkeyPatch, first: int) -> Iterator[_Watch]:
    """From epoch ``first`` on, all between the start of an epoch and its log is watched."""
    watch, read = _Watch(device), Recorder.read

    def batches(*arguments: Any, epoch: int, **options: Any) -> Any:
        if epoch >= first:
            watch.start()
        return epoch_batches(*arguments, epoch=epoch, **options)

    def read_unwatched(self: Recorder, *arguments: Any) -> None:
        watch.stop()
        read(self, *arguments)

    patch.setattr(loop, "epoch_batches", batches)
    patch.setattr(Recorder, "read", read_unwatched)
    try:
        yield watch
    finally:
        watch.stop()


@pytest.mark.parametrize(
    ("device", "kind", "words"),
    [
        ("cpu", "relations", ["device=cpu"]),
        *(
            pytest.param("cuda", kind, ["device=cuda", f"capture={capture}"], marks=pytest.mark.cuda)
            for kind in KINDS
            for capture in ("auto", "off")
        ),
    ],
)
def test_nothing_waits_for_the_device_between_two_logs(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, device: str, words: list[str]
) -> None:
    words = [*KINDS[kind], EPOCHS, "log_every=1000", *words]
    with watched(device, monkeypatch, first=6) as watch:  # by then all is recorded
        train(small(tmp_path / "run", f"teacher={teacher}/", *words))
    assert watch.epochs >= 2


@devices
def test_the_watch_sees_a_step_that_waits(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    original = Trainer._set_rate

    def reads(self: Trainer, step: Any, *arguments: Any) -> None:
        original(self, step, *arguments)
        float(step.progress.step)

    monkeypatch.setattr(Trainer, "_set_rate", reads)
    words = ["method=kd", f"teacher={teacher}/", f"device={device}", *["capture=off"] * (device == "cuda")]
    with watched(device, monkeypatch, first=1), pytest.raises(RuntimeError, match=r"read off|synchroniz"):
        train(small(tmp_path / "run", *words))


# ---- the run ---------------------------------------------------------------------------------------------------------


@devices_and_kinds
def test_stopped_and_resumed_is_bitwise_the_same(teacher: Path, tmp_path: Path, kind: str, device: str) -> None:
    """Stopped behind the recordings: what follows is eager, and recorded again."""
    words = [*KINDS[kind], EPOCHS]
    train(on(device, tmp_path / "whole", teacher, *words))
    interrupt(on(device, tmp_path / "stopped", teacher, *words), 18)
    runs.resume(tmp_path / "stopped", console=QUIET, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@devices
def test_killed_and_resumed_is_bitwise_the_same(teacher: Path, tmp_path: Path, device: str) -> None:
    words = ["method=vrm", EPOCHS, f"teacher={teacher}/", *words_of(device)]
    line = [*{word.partition("=")[0]: word for word in (*SMALL, *words)}.values()]
    whole = Forked("distill", "digits", *line, f"run={tmp_path / 'whole'}", output=tmp_path / "whole.txt")
    assert whole.wait() == 0, whole.text
    for command in (["distill", "digits", *line, f"run={tmp_path / 'killed'}"], ["resume", str(tmp_path / "killed")]):
        pause = Pause("vrm.runs.folder:RunFolder.save", 3)
        process = Forked(*command, output=tmp_path / "killed.txt", pause=pause)
        process.wait_for_pause()
        assert process.kill()
    process = Forked("resume", str(tmp_path / "killed"), output=tmp_path / "killed.txt")
    assert process.wait() == 0, process.text
    assert_same(tmp_path / "whole", tmp_path / "killed")


@devices
def test_where_images_lie_changes_nothing(teacher: Path, tmp_path: Path, device: str) -> None:
    for placement in ("device", "host"):
        train(on(device, tmp_path / placement, teacher, "method=vrm", EPOCHS, f"data.placement={placement}"))
    assert_same(tmp_path / "device", tmp_path / "host")


@devices
def test_kept_logits_are_those_of_the_teacher(teacher: Path, tmp_path: Path, device: str) -> None:
    words = ["method=vrm", EPOCHS]
    train(on(device, tmp_path / "without", teacher, *words))
    for name in ("filling", "reading"):
        train(on(device, tmp_path / name, teacher, *words, f"teacher.cache={tmp_path / 'cache'}"))
    assert len([*(tmp_path / "cache").glob("epoch-*.safetensors")]) == 14
    for name in ("filling", "reading"):
        assert_same(tmp_path / "without", tmp_path / name)


@pytest.mark.parametrize(
    ("precision", "near"), [("float16", 1e-2), ("bfloat16", 5e-2), pytest.param("tf32", 1e-2, marks=pytest.mark.cuda)]
)
@some_kinds
def test_every_precision_stays_finite(
    teacher: Path, tmp_path: Path, kind: str, precision: str, near: float, device: str
) -> None:
    if precision == "tf32" and device == "cpu":
        pytest.skip("tf32 is a mode of GPUs")
    losses = {}
    for name in ("float32", precision):
        train(on(device, tmp_path / name, teacher, *KINDS[kind], EPOCHS, "log_every=1", f"precision={name}"))
        lines = metrics(tmp_path / name)
        losses[name] = [line["value"] for line in lines if (line["split"], line["name"]) == ("train", "loss")]
        assert all(map(math.isfinite, losses[name]))
        assert not [line for line in lines if line["name"] == "nonfinite_steps"]
    assert losses[precision] != losses["float32"]
    # A float16 run skips its first steps until the loss scale fits; their losses are not logged.
    if len(losses[precision]) == len(losses["float32"]):
        assert losses[precision][0] == pytest.approx(losses["float32"][0], rel=near)


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """All is compiled that is on a GPU, and then executed operation by operation."""
    modules, functions, every = nn.Module.compile, torch.compile, assembly.compile_parts
    patch.setattr(nn.Module, "compile", lambda self, **_: modules(self, dynamic=False, backend="aot_eager"))
    patch.setattr(torch, "compile", lambda made, **_: functions(made, fullgraph=True, dynamic=False, backend="eager"))
    patch.setattr(assembly, "compile_parts", lambda *given: every(*given[:-1], torch.device("cuda")))


@some_kinds
def test_a_compiled_step_agrees_with_the_plain_one(
    teacher: Path, tmp_path: Path, kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for word in ("compile=false", "compile=true"):
        if device == "cpu" and word == "compile=true":
            as_on_a_gpu(monkeypatch)
        words = [*KINDS[kind], EPOCHS, "log_every=1", "data.views=cifar", word]
        train(on(device, tmp_path / word, teacher, *words))
        lines = metrics(tmp_path / word)
        losses.append([line["value"] for line in lines if (line["split"], line["name"]) == ("train", "loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# ---- the same numbers as on the CPU ----------------------------------------------------------------------------------


def images(count: int, side: int) -> Tensor:
    """Smooth and rough ones."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randint(0, 256, (count, 3, side, side), generator=generator).float()
    smooth = torch.nn.functional.avg_pool2d(rough, 3, stride=1, padding=1)
    return torch.cat([rough[::2], smooth[1::2]]).round().to(torch.uint8)


@pytest.mark.parametrize("policy", ["cifar", "digits", "imagenet", "vit"])
@devices
def test_views_are_those_of_the_cpu(policy: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte; on the CPU, where the accelerator's way is compared with its own."""
    made = view_policy(policy, **({"size": 24} if policy in ("imagenet", "vit") else {}))
    pixels, index = images(256, 32), torch.arange(256) * 7919

    def views(place: str) -> list[Tensor]:
        epoch = torch.tensor(3, device=place)
        found = made(pixels.to(place), index.to(place), epoch=epoch, seed=5, num_virtual=2)
        return [view.cpu() for view in found]

    expected = views("cpu")
    if device == "cpu":
        monkeypatch.setattr(transforms, "apply_operations", partial(apply_operations, static=True))
    found = views(device)
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        apart = int((one != other).sum())
        # timm's magnitudes are normal draws, whose last bits are the device's own: a pixel may round the other way.
        allowed = one.numel() * 1e-4 if policy == "vit" and number else 0
        assert apart <= allowed, f"view {number}: {apart} of {one.numel()} bytes differ"


@devices
def test_draws_are_those_of_the_cpu(device: str) -> None:
    index = torch.arange(5000) * 31 - 2500
    draws: list[Callable[[Tensor], Tensor]] = [
        lambda x: randomness.bits(3, "purpose", 7, x),
        lambda x: randomness.bits(3, "purpose", torch.tensor(7, device=x.device), x[:, None], x[None, :5]),
        lambda x: randomness.uniform(3, "purpose", x),
        lambda x: randomness.permutation(1001, 3, "purpose", 2, device=x.device),
    ]
    for draw in draws:
        assert torch.equal(draw(index), draw(index.to(device)).cpu())
    one, other = (randomness.normal(3, "purpose", index.to(place)).cpu() for place in ("cpu", device))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    expected, found = (epoch_batches(1001, 64, seed=3, epoch=2, device=place) for place in ("cpu", device))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True))


@devices
def test_relations_give_the_value_and_gradient_of_the_cpu(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [4 * torch.randn(64, 100, generator=generator) for _ in range(4)]

    def run(place: str, dtype: torch.dtype) -> list[Tensor]:
        students = [x.to(place, dtype).requires_grad_() for x in logits[:2]]
        value = sum(vrm_loss(*students, *(x.to(place, dtype) for x in logits[2:])))
        assert isinstance(value, Tensor)
        value.backward()
        return [value.detach().cpu().double(), *(x.grad.cpu().double() for x in students if x.grad is not None)]

    for one, other in zip(run("cpu", torch.float64), run(device, torch.float32), strict=True):
        torch.testing.assert_close(other, one, rtol=2e-6, atol=2e-6 * float(one.abs().max()))


def _peak(device: str, call: Callable[[], object]) -> int:
    """Bytes by which a call raised memory at most."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    except OSError:
        pytest.skip("this system does not tell a process's peak memory")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


@devices
def test_relations_take_no_memory_of_the_size_of_the_explicit_form(device: str) -> None:
    """A single tensor of explicit differences of 1,000 classes in a batch of 512 would take 2 GiB in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(512, 1000, generator=generator).to(device) for _ in range(4)]
    students = [x.requires_grad_() for x in logits[:2]]

    def call() -> None:
        value = sum(vrm_loss(*students, *logits[2:], joint_entropy="collision"))
        assert isinstance(value, Tensor)
        value.backward()

    assert _peak(device, call) < 2**29
