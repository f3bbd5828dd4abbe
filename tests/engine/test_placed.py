"""The step on a GPU that is not there: every operation of every method, as shapes, types and devices alone.

PyTorch's fake tensors have a device without needing one. So the code takes its way for a GPU, and what would stall it,
or break its recording, shows: a number read off a tensor, a shape that depends on values, a tensor of the host among
those of the device, which would have to be sent there. The backward pass alone is left out; it needs a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.runs.small import small, words_of
from vrm import methods, models, randomness
from vrm.bench.step_time import build_step_of_phase
from vrm.data.views import pixels
from vrm.engine.step import Step
from vrm.runs.assembly import assemble

GPU = torch.device("cuda", 0)

# At the first backward pass autograd starts threads for the devices there are: none, before fakes pretend a GPU.
# A process with such threads could not be forked, as other tests do.
torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]


def fakes_work() -> bool:
    """Whether fakes can be indexed without a GPU: some versions of PyTorch look for one."""
    with FakeTensorMode():
        index = torch.empty(1, dtype=torch.int64, device=GPU)
        try:
            index[index]
        except RuntimeError:
            return False
    return True


pytestmark = pytest.mark.skipif(not fakes_work(), reason="this version of PyTorch indexes no fake of a GPU without one")


class Faking(TorchFunctionMode):
    """Copies are fakes on the GPU."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:  # of parameters, which copy themselves by it
            return self._fake(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo[id(tensor)] if id(tensor) in memo else memo.setdefault(id(tensor), self._fake(tensor))
        return func(*args, **(kwargs or {}))

    def _fake(self, tensor: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


class OnHost(TorchDispatchMode):
    """Notes the operations that a tensor of the host takes part in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if any(tensor.device.type != "cuda" for tensor in tensors):
            self.found.append(str(func))
        return result


def placed(step: Step, mode: FakeTensorMode) -> Step:
    """The step with all its tensors faked on the GPU."""
    with Faking(mode):
        found = deepcopy(step)
    found.meter.device = GPU
    found.autocast = nullcontext()  # it would look for the GPU
    return found


def operations_on_host(step: Step, mode: FakeTensorMode, patch: pytest.MonkeyPatch) -> list[str]:
    """Those of a step, behind a first one."""

    def backward(loss: Tensor) -> None:
        for parameter in step.parameters:
            parameter.grad = torch.empty_like(parameter)

    def fused(*lists: Sequence[Tensor], lr: Tensor, found_inf: Tensor, **options: Any) -> None:
        assert {tensor.device for tensor in (*tree_leaves(lists), lr, found_inf)} == {GPU}

    patch.setattr(torch.autograd, "backward", backward)
    patch.setattr(torch.autograd, "grad", lambda loss, inputs, **options: [torch.empty_like(x) for x in inputs])
    for name in ("_fused_sgd_", "_fused_adamw_"):  # which have no fakes
        patch.setattr(torch, name, fused)
    for module, name in ((pixels, "constant"), (randomness, "_keys")):  # which shall keep none of these
        patch.setattr(module, name, cache(getattr(module, name).__wrapped__))
    with mode:
        index = torch.empty(8, dtype=torch.int64, device=GPU)
        step(index)
        with OnHost() as host:
            step(index)
    return host.found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "resnet8.safetensors"
    models.save_weights(models.create("resnet8", num_classes=10), path)
    return path


CASES = [
    *((name, ()) for name in methods.names()),
    ("vrm", ("data.views=cifar",)),
    ("vrm", ("data.views=vit", "method.joint_entropy=collision", "batch_size=8")),
    ("kd", ("data.views=imagenet", "views=2", "precision=float16", "ema=0.9", "accumulate=2", "batch_size=10")),
    ("kd", ("optimizer=adamw", "precision=bfloat16", "channels_last=true")),
]


@pytest.mark.parametrize(("method", "words"), CASES, ids=[" ".join((name, *words)) for name, words in CASES])
def test_all_of_the_step_stays_on_the_device(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, words: tuple[str, ...]
) -> None:
    chosen = words_of(method, "teacher=resnet8", f"teacher.weights={teacher}")
    assembly = assemble(small(tmp_path / "run", *chosen, *words).run)
    for position in range(len(assembly.method.phases)):
        mode = FakeTensorMode()
        step = placed(build_step_of_phase(assembly, position), mode)
        assert operations_on_host(step, mode, monkeypatch) == []
        monkeypatch.undo()


def test_what_does_not_stay_there_is_seen(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble(small(tmp_path / "run", "method=kd", "teacher=resnet8", f"teacher.weights={teacher}").run)
    mode = FakeTensorMode()
    original = type(assembly.policy).__call__

    def sends(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Any:
        return original(self, images + torch.tensor(0, dtype=torch.uint8, device=images.device), *arguments, **options)

    def reads(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Any:
        return original(self, images[: int(images.amax())], *arguments, **options)

    monkeypatch.setattr(type(assembly.policy), "__call__", sends)
    with monkeypatch.context() as patch:
        assert operations_on_host(placed(build_step_of_phase(assembly), mode), mode, patch)
    monkeypatch.setattr(type(assembly.policy), "__call__", reads)
    with pytest.raises(DataDependentOutputException):
        operations_on_host(placed(build_step_of_phase(assembly), mode), mode, monkeypatch)
