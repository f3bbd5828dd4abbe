"""The recorded step: replaying the operations of one call does what calling again would do.

There are no CUDA graphs on the CPU. :class:`Tape` stands in for them: it records the operations on tensors that reach
the dispatcher, those of the backward pass and the optimiser among them, and replays these alone, on the tensors that
were there. As in a graph, no Python runs in a replay, numbers are frozen, and what was not an operation on tensors at
fixed places is lost.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.runs.small import assert_same, small, train, words_of
from vrm import methods
from vrm.config import Optimizer
from vrm.data.views import transforms
from vrm.data.views.policies import CompiledViews
from vrm.engine.cuda_graphs import WARMUP, CudaGraphRecorder, RecordedFunction
from vrm.engine.optimizers import build_optimizer
from vrm.methods.kd import KD
from vrm.runs import trainer as loop
from vrm.runs.assembly import assemble, compile_parts
from vrm.runs.phase import why_eager
from vrm.runs.trainer import Trainer


class Tape(TorchDispatchMode):
    """A recorder of operations; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self.recordings = self.replays = 0
        self.watched: Callable[[], list[Tensor]] = list  # what must be after recording as before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_flatten(result)[0]))
        return result

    def run(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        function(*inputs)

    def record(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        # A CUDA graph is recorded without being run; here the effects of recording are taken back.
        self.operations = []
        before = [(tensor, tensor.clone()) for tensor in self.watched()]
        with self:
            function(*inputs)
        for live, value in before:
            live.copy_(value)
        operations, self.operations = self.operations, []
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            made: dict[int, Any] = {}

            def now(value: Any) -> Any:
                return made.get(id(value), value)

            with torch.no_grad():
                for func, args, kwargs, outputs in operations:
                    found = tree_flatten(func(*tree_map(now, args), **tree_map(now, kwargs)))[0]
                    for old, new in zip(outputs, found, strict=True):
                        if isinstance(old, Tensor) and not any(old is x for x in tree_flatten((args, kwargs))[0]):
                            made[id(old)] = new

        return replay


def state_of(training: Trainer, step: Any) -> list[Tensor]:
    """Every tensor that a step changes and that is there before it."""
    tensors = [*training.assembly.distiller.state_dict(keep_vars=True).values()]
    tensors += [v for state in step.optimizer.state.values() for v in state.values()]
    tensors += [*step.meter.sums.values(), step.incident.step, step.incident.index, *step.incident.terms.values()]
    tensors += [step.progress.step]
    if step.loss_scale is not None:
        tensors += [step.loss_scale.value, step.loss_scale.streak]
    if step.average is not None:
        tensors += [*step.average.average.state_dict(keep_vars=True).values()]
    return [tensor.detach() for tensor in tensors]


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Makes runs record; the recorders they used."""
    used: list[Tape] = []

    def captured(self: Trainer, step: Any) -> RecordedFunction:
        tape = Tape()
        tape.watched = lambda: state_of(self, step)
        used.append(tape)
        return RecordedFunction(step, tape, variant=lambda: step.variant)

    monkeypatch.setattr(loop.Trainer, "_record", captured)
    # The CPU's views sort images by what they drew, which a recording cannot: use the accelerator's way.
    monkeypatch.setattr(transforms, "apply_operations", partial(transforms.apply_operations, static=True))
    return used


@pytest.mark.parametrize("method", methods.names())
def test_replaying_a_recorded_step_is_taking_it(
    teacher: Path, tmp_path: Path, method: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words_of(method, f"teacher={teacher}/"), "data.labels_per_class=2", "epochs=5", "log_every=3"]
    train(small(tmp_path / "recorded", *words))
    assert all(tape.recordings == 2 for tape in tapes[-1:]), "a recording for whole batches, one for the last"
    assert tapes[-1].replays > 5
    monkeypatch.undo()
    train(small(tmp_path / "eager", *words))
    assert_same(tmp_path / "recorded", tmp_path / "eager")


@pytest.mark.parametrize(
    "words",
    [
        ["ema=0.9"],
        ["accumulate=2", "batch_size=14"],
        ["optimizer=adamw"],
        ["views=2"],
        ["precision=float16"],
        ["nan=skip"],
    ],
)
def test_every_way_to_step_can_be_recorded(
    teacher: Path, tmp_path: Path, words: list[str], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=kd", f"teacher={teacher}/", "data.labels_per_class=5", "epochs=4", *words]
    train(small(tmp_path / "recorded", *words))
    assert tapes[-1].replays > 5
    monkeypatch.undo()
    train(small(tmp_path / "eager", *words))
    assert_same(tmp_path / "recorded", tmp_path / "eager")


def test_calls_of_each_kind_warm_up_and_are_recorded_once() -> None:
    tape, total, kind = Tape(), torch.zeros(()), [False]

    def add(value: Tensor) -> None:
        total.add_(value.sum())

    tape.watched = lambda: [total]
    captured = RecordedFunction(add, tape, variant=lambda: kind[0])
    for number in range(1, 7):
        captured(torch.full((2,), float(number)))
        assert float(total) == number * (number + 1)
    assert (tape.recordings, tape.replays) == (1, 6 - WARMUP)
    kind[0] = True
    captured(torch.ones(2))
    captured(torch.ones(3))
    assert tape.recordings == 1
    assert float(total) == 47


def test_a_number_that_changes_between_calls_is_frozen_by_a_recording() -> None:
    tape, total, number = Tape(), torch.zeros(()), [0.0]
    tape.watched = lambda: [total]
    captured = RecordedFunction(lambda value: total.add_(number[0]) and None, tape)
    for number[0] in range(1, 7):
        captured(torch.zeros(1))
    assert float(total) == 1 + 2 + 3 + 4 + 4 + 4


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (RuntimeError("not permitted when capturing\nmore"), r"graph \(not permitted when capturing\).* capture=off"),
        (torch.OutOfMemoryError("out of memory"), "^out of memory$"),
    ],
)
def test_what_cannot_be_recorded_says_how_to_go_on(broken: RuntimeError, told: str, *, ends: bool) -> None:
    class Refusing(Tape):
        def record(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
            try:
                raise broken
            except RuntimeError:
                if ends:
                    raise
                # as ending a broken capture does, or one with side streams that were not joined
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    captured = RecordedFunction(lambda value: None, Refusing())
    for _ in range(WARMUP):
        captured(torch.zeros(1))
    with pytest.raises(type(broken), match=told):
        captured(torch.zeros(1))


def test_a_broken_recording_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its stream as the current one, nor its memory pool as one that is recorded to."""
    told: list[tuple[object, ...]] = []
    made = itertools.count()
    outside = SimpleNamespace(device_index=1)

    @contextlib.contextmanager
    def graph(recording: object, *, pool: object, stream: object, **_: object) -> Iterator[None]:
        told.append(("recorded to", pool, stream))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream {next(made)}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(made)}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: outside)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: told.append(("current", stream)))
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: told.append(("ended", device, pool)), raising=False
    )

    recorder = CudaGraphRecorder(torch.device("cuda"))
    assert recorder.record(lambda: None, ()) == "replay"
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 // 0 and None, ())
    assert recorder.record(lambda: None, ()) == "replay"
    assert told == [
        *(("recorded to", "pool 1", "stream 0"), ("recorded to", "pool 1", "stream 0")),
        *(("current", outside), ("ended", 1, "pool 1"), ("recorded to", "pool 3", "stream 2")),
    ]


def test_sums_that_wait_for_the_device_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.8's scatter_add with deterministic algorithms."""
    made = assemble(small(tmp_path / "run", "method=ce", "deterministic=true").run)
    made = replace(made, device=torch.device("cuda"))
    for version, told in (("2.8.0+cu128", "2.8"), ("2.9.0", None), ("2.15.0", None)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert (told or "") in (why_eager(made) or "")
        assert (why_eager(made) is None) == (told is None)


def test_what_cannot_be_compiled_any_more_is_no_silent_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many forms as a measurement of all methods has; beyond, an error."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        assemble(small(tmp_path / "run", "method=ce", "compile=true").run)
        assert torch._dynamo.config.recompile_limit >= 2 * len(methods.names())
        assert torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.parametrize(("device", "more"), [("cpu", []), ("cuda", ["losses", "views"])])
def test_networks_are_compiled_and_on_a_gpu_views_and_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, more: list[str]
) -> None:
    """Not on the CPU, where both leave out most of their operations by looking at values."""
    assembly = assemble(small(tmp_path / "run", "method=ce").run)
    teacher: Any = torch.nn.Identity()
    given: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: given.append(self))
    made = compile_parts(assembly.policy, assembly.distiller, teacher, torch.device(device))
    assert given == [assembly.distiller.student, teacher, *[assembly.method] * ("losses" in more)]
    assert isinstance(made, CompiledViews) if "views" in more else made is assembly.policy


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimisers_let_themselves_be_recorded(name: str) -> None:
    """PyTorch's refuse while a GPU records, unless told before; those that need no such word have none."""
    made = build_optimizer(Optimizer.model_validate({"name": name}), [torch.nn.Parameter(torch.zeros(2))], KD())
    assert all(group.get("capturable", True) for group in made.param_groups)
