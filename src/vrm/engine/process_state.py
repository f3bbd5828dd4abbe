"""The state of the process that runs share: threads, flags, random generators, and the modules given to a run.

Each piece has one context manager that puts it back: what ran inside leaves no trace in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vrm.config import Run


def set_flags(run: Run, device: torch.device) -> None:
    """Set what a run sets for the whole process: threads, TF32, deterministic algorithms, cuDNN's search."""
    tf32, cuda = run.precision == "tf32", device.type == "cuda"
    _set_flags(
        threads=run.threads or torch.get_num_threads(),
        matmul_tf32=tf32,
        convolution_tf32=tf32,
        benchmark=not run.deterministic,  # batches have few shapes: try all algorithms once
        deterministic=run.deterministic and cuda,
        warn_only=False,
    )


def _set_flags(
    *, threads: int, matmul_tf32: bool, convolution_tf32: bool, benchmark: bool, deterministic: bool, warn_only: bool
) -> None:
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.backends.cudnn.allow_tf32 = convolution_tf32
    torch.backends.cudnn.benchmark = benchmark
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if now != (deterministic, warn_only):  # the call itself imports the compiler
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def flags_restored() -> Iterator[None]:
    """Restore everything that :func:`set_flags` sets."""
    before = {
        "threads": torch.get_num_threads(),
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "convolution_tf32": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
    }
    try:
        yield
    finally:
        _set_flags(**before)


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Restore the random generators of Python, numpy and torch, on the CPU and on every CUDA device."""
    python, numpy = random.getstate(), np.random.get_state()
    cuda = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if not cuda:  # its generators would have started with the CPU's seed
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def modes_restored(*modules: nn.Module) -> Iterator[None]:
    """Restore the training mode of every submodule, and ``requires_grad`` and gradient of every parameter."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    required = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, requires_grad, gradient in required:
            parameter.requires_grad_(requires_grad).grad = gradient


@contextmanager
def hooks_restored(*modules: nn.Module) -> Iterator[None]:
    """Restore the hooks of every submodule."""
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    hooks = [
        value for part in parts for name, value in vars(part).items() if "_hooks" in name and isinstance(value, dict)
    ]
    before = [(each, each.copy()) for each in hooks]
    try:
        yield
    finally:
        for each, content in before:
            each.clear()
            each.update(content)


@contextmanager
def process_state_restored(*modules: nn.Module) -> Iterator[None]:
    """Leave the caller's process as it was, apart from the values of parameters and buffers of ``modules``.

    Restore threads, flags and random generators; of the modules also training modes, ``requires_grad`` and hooks.
    """
    with flags_restored(), random_state_restored(), modes_restored(*modules), hooks_restored(*modules):
        yield


@contextmanager
def undisturbed(*networks: nn.Module) -> Iterator[None]:
    """Restore networks and random generators completely: what happens inside leaves no trace in them.

    Restored are parameters, buffers and other tensors that modules hold, bit by bit; gradients, ``requires_grad`` and
    modes; all attributes of modules, hooks included, and the contents of their lists, dictionaries and sets. The copies
    wait in the host's memory.
    """
    parts = dict.fromkeys(part for network in networks for part in network.modules())
    spaces: list[Any] = []
    for part in parts:
        spaces += [part.__dict__, *(v for v in part.__dict__.values() if isinstance(v, dict | list | set))]
    before = [(space, space.copy()) for space in spaces]
    held = {id(value): value for space in spaces for value in _values(space) if isinstance(value, Tensor)}
    saved = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in held.values() if _writable(tensor)]
    gradients = [(p, p.grad, p.requires_grad) for p in held.values() if isinstance(p, nn.Parameter)]
    try:
        with random_state_restored():
            yield
    finally:
        for space, content in before:
            if [*map(id, _values(space))] != [*map(id, _values(content))]:
                space.clear()
                (space.extend if isinstance(space, list) else space.update)(content)
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        for parameter, gradient, requires_grad in gradients:
            parameter.requires_grad_(requires_grad).grad = gradient


def _values(space: Any) -> Iterable[Any]:
    return space.values() if isinstance(space, dict) else space


def _writable(tensor: Tensor) -> bool:
    """Return whether each element has a place of its own in memory, so that the tensor can be written to."""
    return tensor.layout is torch.strided and all(
        stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
