"""What the method tests share: reading reference vectors, and the case a method is tested by."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

Outcome = dict[str, Tensor]

STAGE_1 = {"student_taps": ("stage1",), "teacher_taps": ("stage1",)}
STAGE_1_PRE = {"student_taps": ("stage1:pre",), "teacher_taps": ("stage1:pre",)}


def golden_folder() -> Path:
    """``tests/goldens``, or the folder named by ``VRM_GOLDENS``."""
    return Path(os.environ.get("VRM_GOLDENS") or Path(__file__).parent.parent / "goldens")


class Golden:
    """One file of reference vectors: its spec and its tensors, the differentiable ones as leaves."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.spec: dict[str, Any] = json.loads(file.metadata()["spec"])
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.hyperparameters: dict[str, Any] = self.spec["hyperparameters"]
        for name, tensor in self.tensors.items():
            if name.startswith("in.") and tensor.is_floating_point():
                tensor.requires_grad_(any(key.startswith("grad") and key.endswith("." + name) for key in self.tensors))
        self.leaves = {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor ``in.NAME``."""
        return self.tensors[f"in.{name}"]

    def stages(self, name: str) -> list[Tensor]:
        """The tensors ``in.NAME.0``, ``in.NAME.1``, ..."""
        count = sum(key.startswith(f"in.{name}.") for key in self.tensors)
        return [self[f"{name}.{i}"] for i in range(count)]

    def load(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Fill parameters of ``module`` (made float64): ``names`` maps ``param.NAME`` in the file to the module's own.

        Batch norms get the file's ``bn_eps`` and ``bn_momentum``, where it has them.
        """
        module.double()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = self.hyperparameters.get("bn_eps", norm.eps)
                norm.momentum = self.hyperparameters.get("bn_momentum", norm.momentum)
        parameters = dict(module.named_parameters())
        for theirs, ours in names.items():
            parameters[ours].data.copy_(self.tensors[f"param.{theirs}"])
            self.leaves[f"param.{theirs}"] = parameters[ours]

    def check(self, outcome: Outcome) -> None:
        """Compare every ``out.*``, ``after.*`` and ``grad*`` of the file with ours, within the file's tolerance."""
        tolerance = self.spec.get("tolerance", {})
        rtol, atol = tolerance.get("rtol", 1e-9), tolerance.get("atol", 1e-12)
        for name, expected in self.tensors.items():
            kind, _, rest = name.partition(".")
            if kind in ("in", "param", "state"):
                continue
            if kind.startswith("grad"):
                loss = outcome["out.loss" + kind.removeprefix("grad")]
                (actual,) = torch.autograd.grad(loss, self.leaves[rest], retain_graph=True, materialize_grads=True)
            else:
                assert name in outcome, f"{name} is in the file, but our code did not report it"
                actual = outcome[name]
            error = (actual.detach().double().reshape(expected.shape) - expected.double()).abs().max().item()
            bound = atol + rtol * expected.double().abs().max().item()
            assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"


def batch_norms(prefix: str, module: nn.Module, rename: Mapping[str, str] | None = None) -> Outcome:
    """The running statistics of a module's batch norms, under a file's names: ``prefix``, parts of the path renamed."""
    outcome: Outcome = {}
    for name, norm in module.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            path = ".".join((rename or {}).get(part, part) for part in name.split("."))
            outcome[f"{prefix}{path}.running_mean"] = norm.running_mean
            outcome[f"{prefix}{path}.running_var"] = norm.running_var
    return outcome


@dataclass(frozen=True)
class Case:
    """How one method is tested.

    ``golden`` runs our code on a file's tensors and reports them under the file's names, ``check`` compares them;
    ``golden_keys`` are further names under which the method's files go. The rest steers the contract suite
    (``test_contract.py``), which runs with the method's default options and the ``small`` ones, and again with each of
    the ``variants`` on top.

    - ``small``: options that make the method small enough for a few samples (bank sizes, widths).
    - ``variants``: further options under which the whole suite runs; every code path of the method is in one.
    - ``alternatives``: for the test that no option is dead: option -> (settings before, settings after), different in
      this option alone, where the automatic change will not do (a switch turned, a number raised, in any variant).
    - ``elsewhere``: options that act where this suite cannot look -> the test that shows what they do, ``file::name``.
    - ``legal``: options at the edge of what is allowed; ``illegal``: just beyond, which ``__init__`` refuses with
      ``ValueError``.
    - ``same_channels``: needs equal channel counts of student and teacher.
    - ``refuses``: pairs of networks on which ``build`` raises ``ValueError``: key of ``worlds.PAIRS`` -> a pattern of
      the message.
    - ``invariances``: names of invariances that the method has, keys of ``worlds.INVARIANCES``.
    - ``undefined``: extreme inputs outside of the method's domain, keys of ``worlds.EXTREMES``.
    - ``constants``: functions of the module whose results are constants though they depend on the student; finite
      differences are taken with their first results.
    - ``functions``: the public functions, each of a map (3, 4, 5, 5) of the student and one of the teacher.
    - ``tolerances``: relative tolerance by test (``gradcheck``, ``half``, ``compiled``, ``processes``, ...), where the
      default is too tight.
    """

    name: str
    golden: Callable[[Golden], Outcome] | None = None
    golden_keys: tuple[str, ...] = ()
    small: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ({},)
    alternatives: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    legal: tuple[Mapping[str, Any], ...] = ()
    illegal: tuple[Mapping[str, Any], ...] = ()
    same_channels: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    invariances: tuple[str, ...] = ()
    undefined: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    functions: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
    check: Callable[[Golden, Outcome], None] = Golden.check
    tolerances: Mapping[str, float] = field(default_factory=dict)
