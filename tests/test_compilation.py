"""The compiler's options, and functions whose results it treats as constants."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from vrm.compilation import compile_options, constant


def test_the_options_are_the_compilers() -> None:
    for name, value in compile_options().items():
        assert getattr(config, name) is not value, f"{name} is so by default: it need not be said"


def test_triton_is_told_but_not_against_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TRITON_DEFAULT_FP_FUSION"
    monkeypatch.setenv(name, "1")
    compile_options()
    assert os.environ[name] == "1"
    monkeypatch.delenv(name)
    compile_options()
    assert os.environ[name] == "0"


def test_a_constant_is_made_once_and_held_by_compiled_code() -> None:
    made: list[int] = []

    @constant
    def numbers(count: int) -> Tensor:
        made.append(count)
        return torch.arange(count)

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    double = torch.compile(lambda x: 2 * x + numbers(3), fullgraph=True, backend=keep)
    x = torch.ones(3)
    assert torch.equal(double(x), double(x))
    assert torch.equal(double(x), 2 * x + numbers(3))
    assert made == [3]
    assert not any(node.target is torch.arange for node in graphs[0].graph.nodes)
