"""What runs share in a process is afterwards what it was before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
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


def test_a_callers_own_flags_come_back() -> None:
    with flags_restored():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        mine = flags()
        with process_state_restored():
            set_flags(run_of("deterministic=true"), CPU)
            assert flags() != mine
        assert flags() == mine


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was(fails: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU()))
    network[1].eval()
    network[0].bias.requires_grad_(False)
    heard: list[str] = []
    network[2].register_forward_hook(lambda *_: heard.append("mine"))
    images = torch.rand(2, 3, 4, 4)

    def state() -> tuple[Any, ...]:
        hooks = [len(value) for m in network.modules() for n, value in vars(m).items() if "_hooks" in n and value]
        modes = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
        return (*modes, hooks, flags(), torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1][0])

    before = state()
    try:
        with process_state_restored(network):
            set_flags(run_of("precision=tf32", "threads=1", "deterministic=true"), CPU)
            torch.manual_seed(3), random.seed(3), np.random.seed(3)
            network.eval().requires_grad_(True)
            for part in network.modules():
                part.register_forward_hook(lambda *_: heard.append("theirs"))
                part.register_forward_pre_hook(lambda *_: heard.append("theirs"))
            network[0].weight.data.fill_(1.0)
            network(images)
            assert "theirs" in heard
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state() == before
    heard.clear()
    network(images)
    assert heard == ["mine"]
    assert bool((network[0].weight == 1).all()), "what was trained stays"
