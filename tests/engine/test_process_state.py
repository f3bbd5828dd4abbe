"""What runs share in a process is afterwards what it was before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vrm.config import Run, resolve
from vrm.engine.process_state import flags_restored, process_state_restored, set_flags

CPU = torch.device("cpu")


def run_of(*words: str) -> Run:
    return resolve("distill", "digits", ["method=ce", "student=resnet8", "run=nowhere", *words]).run


def flags() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def test_a_runs_flags_last_as_long_as_their_context() -> None:
    before = threads, *_ = flags()
    with flags_restored():
        set_flags(run_of("precision=tf32", f"threads={threads + 1}"), CPU)
        assert flags() == (threads + 1, True, True, True, False, False)
        with flags_restored():  # a step that repeats bit by bit takes no other algorithms
            set_flags(run_of("deterministic=true"), torch.device("cuda"))
            assert flags() == (threads + 1, False, False, False, True, False)
        assert flags() == (threads + 1, True, True, True, False, False)
    assert flags() == before


def test_attributes_that_are_called_like_hooks_are_left_alone() -> None:
    """Networks traced by torch.fx have such a list."""
    network = nn.Sequential(nn.Linear(2, 3))
    network.my_hooks = ["mine"]
    with process_state_restored(network):
        network[0].register_forward_hook(lambda *_: None)
        network.my_hooks.append("also mine")
    assert not network[0]._forward_hooks
    assert network.my_hooks == ["mine", "also mine"]
