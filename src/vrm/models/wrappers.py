"""The network inside what PyTorch wraps around it: compiled, parallel and averaged modules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vrm.wording import listed


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside ``torch.compile``, DataParallel, DistributedDataParallel and AveragedModel modules."""
    while (inner := _inside(network)) is not None:
        network = inner
    return network


def _inside(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper wraps; None for any other module."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # without it nothing is compiled, and it loads for seconds
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        plain: nn.Module = module.get_submodule("_orig_mod")
        return plain
    if isinstance(module, DataParallel | DistributedDataParallel | AveragedModel):
        inner: nn.Module = module.module
        return inner
    return None


@contextmanager
def unwrapped(**networks: nn.Module) -> Iterator[tuple[str, ...]]:
    """Take the wrappers out of these networks, also deep inside them; put all of them back afterwards.

    Without them hooks are called and names are the networks' own. Parts compiled in place (``module.compile()``, a
    compiled ``forward``) run uncompiled meanwhile. Yield a note on each network, by its role, in which any was found.
    """
    notes = []
    with ExitStack() as undo:
        for role, network in networks.items():
            found = [type(network).__name__] * (network is not unwrap(network))
            _open(unwrap(network), "", found, undo, set())
            if found:
                notes.append(f"{role}: used without its wrappers, {listed(found)}; compile=true compiles networks")
        yield tuple(notes)


def _open(module: nn.Module, path: str, found: list[str], undo: ExitStack, seen: set[nn.Module]) -> None:
    if module in seen:
        return
    seen.add(module)
    attributes: dict[str, Any] = vars(module)
    if attributes.get("_compiled_call_impl") is not None:
        found.append(f"{path or 'the network'} (compile())")
        undo.callback(attributes.__setitem__, "_compiled_call_impl", attributes["_compiled_call_impl"])
        attributes["_compiled_call_impl"] = None
    plain = getattr(module.forward, "_torchdynamo_orig_callable", None)
    if plain is not None:
        found.append(f"{path or 'the network'} (compiled forward)")
        if "forward" in attributes:
            undo.callback(attributes.__setitem__, "forward", attributes["forward"])
        else:
            undo.callback(attributes.pop, "forward")
        attributes["forward"] = MethodType(plain, module) if inspect.ismethod(module.forward) else plain
    children: dict[str, nn.Module | None] = module._modules
    for name, child in [*children.items()]:
        if child is None:
            continue
        where, inner = f"{path}.{name}".removeprefix("."), unwrap(child)
        if inner is not child:
            found.append(f"{where} ({type(child).__name__})")
            undo.callback(partial(children.__setitem__, name, child))
            children[name] = inner
        _open(inner, where, found, undo, seen)
