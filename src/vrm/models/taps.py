"""Taps: named places in a network where features are read, and the wrapper that reads them.

Logical names are ``stem``, ``stage1`` to ``stageN``, ``map`` (whose mean over the pixels is ``pooled``), ``pooled``
(the vector that feeds the classifier), ``logits``, and ``stageK:pre`` for a stage's value before its last ReLU. Any
module path is a name too: it means that module's output.

A network with a method ``declared_taps() -> dict[str, Tap]`` says itself where these are; all networks of
:func:`vrm.models.names` have one. In any other network they are found by running it once:

- ``pooled`` is the input of the linear layer that makes the logits, and ``map`` the last map with as many channels.
- A map's *scale* is the input size divided by the map's size, rounded to a power of two. Each scale has one stage, the
  output of the last block at that scale. A block is a module that halves its map at most once. A module that halves it
  more often is replaced by its children, and so is an ``nn.Sequential`` that halves it at all. Pooling layers, and
  modules that work on a single pixel, are not blocks.
- If the modules in a timm network's ``feature_info`` all return maps or tokens, these modules are the blocks.
- A transformer of one scale has four stages, the blocks at each quarter of its depth, as tokens (B, length, D).

Such networks have no ``stem`` and no ``:pre``. Maps with the channels last are permuted to (B, channels, height,
width). These rules suit networks with one trunk. If branches run in parallel at several scales, or blocks return
tuples, name module paths instead, or declare the taps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from vrm.contract import Norm, Outputs, Probe
from vrm.models.modes import evaluation_mode
from vrm.wording import nearest, shape_in_words


@dataclass(frozen=True)
class Tap:
    """One place: the input or the output of the module at ``path`` (``""`` is the network itself)."""

    path: str
    side: Literal["input", "output"] = "output"
    norm: str | None = None
    """The path of the batch norm just before a ``:pre`` tap, whose weight and bias some methods read."""
    channels_last: bool = False
    """Whether the value is (B, height, width, channels) there."""


@runtime_checkable
class DeclaresTaps(Protocol):
    """A network that knows where its taps are."""

    def declared_taps(self) -> dict[str, Tap]:
        """Return the places of ``stem, stage1 .., map, pooled, logits, stage1:pre ..``, in this order."""
        ...


class TappedNetwork(nn.Module):
    """A network whose forward pass also returns the values at its taps.

    The constructor registers forward hooks and :meth:`close` removes them; the network itself is not changed, and
    ``.network`` has its plain state dict. Wrap a network before compiling or distributing it: a graph that was compiled
    before a hook was added never calls it, but a graph compiled later (such as that of a smaller last batch) does. If a
    module is called several times in one pass, its last call is read.

    Args:
        network: Any module from images (B, channels, H, W) to logits (B, C).
        taps: Names of taps to return; selectors such as ``stages`` are resolved by :meth:`vrm.contract.Probe.resolve`.
        preprocess: Applied to the images first, usually a :class:`vrm.models.Preprocess`.
        input_size: (height, width) of the network's input. Needed to find the taps of a network that declares none.
        in_channels: Channels of the input, for the same purpose.

    Raises:
        ValueError: A tap is unknown; the message has the nearest names.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Sequence[str] = (),
        preprocess: nn.Module | None = None,
        *,
        input_size: tuple[int, int] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.taps = tuple(taps)
        known = known_taps(network, input_size=input_size, in_channels=in_channels)
        self._has_pooled = "pooled" in known
        self._recorder = _Recorder()
        self._handles: list[RemovableHandle] = []
        for name in dict.fromkeys((*self.taps, *(["pooled"] if self._has_pooled else []))):
            tap = known.get(name) or _module_tap(network, name, known)
            module = network.get_submodule(tap.path)
            hook = partial(_catch, self._recorder, name, tap)
            if tap.side == "input":
                self._handles.append(module.register_forward_pre_hook(hook))
            else:
                self._handles.append(module.register_forward_hook(hook))

    def forward(self, images: Tensor) -> Outputs:
        """Return logits (B, C), pooled features (B, D) if the network has them, and the taps, for a batch of images."""
        if self.preprocess is not None:
            images = self.preprocess(images)
        caught: dict[str, Tensor] = {}
        self._recorder.caught = caught
        try:
            logits = self.network(images)
        finally:
            self._recorder.caught = None
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.network).__name__} returns {type(logits).__name__}, not a tensor of logits (B, C); "
                "switch its auxiliary outputs off, or wrap it in a module that returns the logits alone"
            )
        for name in self.taps:
            if name not in caught:
                raise ValueError(
                    f"the module of tap {name!r} was not called in the forward pass; tap one that is called"
                )
        return Outputs(
            logits, caught["pooled"] if self._has_pooled else None, {name: caught[name] for name in self.taps}
        )

    def close(self) -> None:
        """Remove the hooks, which leaves the network as it was before it was wrapped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Recorder:
    """What the hooks of one wrapper write to; ``caught`` is ``None`` except during its forward pass."""

    def __init__(self) -> None:
        self.caught: dict[str, Tensor] | None = None


def _catch(recorder: _Recorder, name: str, tap: Tap, module: nn.Module, inputs: Any, output: Any = None) -> None:
    if recorder.caught is None:
        return
    value = inputs[0] if tap.side == "input" else output
    if tap.path == "" and not isinstance(value, Tensor):
        return  # these are the logits, about which the wrapper raises a clearer error
    if not isinstance(value, Tensor):
        raise ValueError(f"tap {name!r} is a {type(value).__name__}, not a tensor; tap a module inside it")
    recorder.caught[name] = value.permute(0, 3, 1, 2) if tap.channels_last else value


def _module_tap(network: nn.Module, name: str, known: Mapping[str, Tap]) -> Tap:
    paths = [path for path, _ in network.named_modules() if path]
    if name not in paths:
        raise ValueError(
            f"{type(network).__name__} has no tap {name!r}; {nearest(name, [*known, *paths])} "
            f"(logical names: {', '.join(known)}; any module path is allowed as well)"
        )
    return Tap(name)


def known_taps(
    network: nn.Module, *, input_size: tuple[int, int] | None = None, in_channels: int = 3
) -> dict[str, Tap]:
    """Return the logical taps of a network: those it declares, or those found by running it once (see above).

    Raise ``ValueError`` if the network declares none and ``input_size`` is not given.
    """
    if isinstance(network, DeclaresTaps):
        return network.declared_taps()
    if input_size is None:
        raise ValueError(
            f"{type(network).__name__} does not declare its taps, so they have to be found by running it: "
            "pass input_size=(height, width)"
        )
    return _find_taps(network, input_size, in_channels)


def probe(
    network: nn.Module,
    *,
    name: str,
    input_size: tuple[int, int],
    in_channels: int = 3,
    extra_taps: Sequence[str] = (),
) -> Probe:
    """Measure a network's taps on noise, in eval mode and without gradient; its buffers and modes stay as they are.

    Args:
        network: From images (B, in_channels, height, width) to logits (B, C).
        name: What messages call it.
        input_size: (height, width) of its input.
        in_channels: Channels of its input.
        extra_taps: Module paths to measure besides the logical taps.

    Returns:
        Shapes of ``stem, stage1 .. stageN, map, pooled, logits``, of the ``:pre`` taps and of ``extra_taps``, in this
        order. A tap is ``signed`` if any of its values was negative. ``map`` is there if the classifier of its mean
        gives the logits.

    Raises:
        ValueError: A tap is unknown (the message has the nearest names); a later in-place operation overwrites the
            output of a module path; or the network does not return logits (B, C).
    """
    known = known_taps(network, input_size=input_size, in_channels=in_channels)
    names = tuple(dict.fromkeys((*known, *extra_taps)))
    tapped = TappedNetwork(network, names, input_size=input_size, in_channels=in_channels)
    versions: dict[str, int] = {}
    try:
        for path in (name for name in names if name not in known):
            hook = partial(_note_version, versions, path)
            tapped._handles.append(network.get_submodule(path).register_forward_hook(hook))
        outputs: Outputs = _run_undisturbed(tapped, _noise(network, input_size, in_channels))
    finally:
        tapped.close()
    for path, version in versions.items():
        if outputs.taps[path]._version != version:
            raise ValueError(
                f"the output of {path!r} is overwritten by a later in-place operation of {name}; tap the module that "
                "follows it, or build the network with inplace=False"
            )
    if outputs.logits.ndim != 2:
        raise ValueError(f"{name} returns a tensor of {shape_in_words(outputs.logits.shape)}; vrm needs logits (B, C)")
    module = network.get_submodule(known["pooled"].path) if "pooled" in known else None
    classifier = module if isinstance(module, nn.Linear) else None
    taps = dict(outputs.taps)
    if "map" in taps and not (classifier is not None and _classifies_mean(classifier, taps["map"], outputs.logits)):
        del taps["map"]
    return Probe(
        name=name,
        input_size=input_size,
        num_classes=outputs.logits.shape[1],
        shapes={tap: tuple(value.shape[1:]) for tap, value in taps.items()},
        signed=frozenset(tap for tap, value in taps.items() if tap == "logits" or bool((value < 0).any())),
        norms={name: _affine(network, tap.norm) for name, tap in known.items() if tap.norm is not None},
        classifier=classifier,
    )


def _classifies_mean(classifier: nn.Linear, features: Tensor, logits: Tensor) -> bool:
    """Return whether the logits are the classifier's of the mean over a map's pixels, as far as rounding allows."""
    if features.ndim != 4 or features.shape[1] != classifier.in_features:
        return False
    with torch.no_grad():
        found = classifier(features.mean((2, 3)))
    return torch.allclose(found, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))


def _note_version(versions: dict[str, int], path: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    versions[path] = output._version


def _affine(network: nn.Module, path: str) -> Norm:
    norm = network.get_submodule(path)
    return Norm(norm.get_parameter("weight").detach().clone(), norm.get_parameter("bias").detach().clone())


def _noise(network: nn.Module, input_size: tuple[int, int], in_channels: int) -> Tensor:
    """Return the same two images of noise (2, in_channels, height, width) every time, in the network's dtype."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(2, in_channels, *input_size, generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype)


def _run_undisturbed(network: nn.Module, images: Tensor) -> Any:
    """Run in eval mode without gradient; buffers that the pass changes are copies."""
    with evaluation_mode(network), torch.no_grad():
        return functional_call(network, {name: buffer.clone() for name, buffer in network.named_buffers()}, (images,))


# ---- finding the taps of a network that does not declare them --------------------------------------------------------


@dataclass
class _Call:
    """The last call of a module: its number among all calls, and the shapes of its first input and its output."""

    path: str
    order: int
    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass
class _Trace:
    """The calls of all modules in one forward pass."""

    input_size: tuple[int, int]
    calls: dict[str, _Call] = field(default_factory=dict)
    count: int = 0

    def note(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        first = inputs[0] if inputs else None
        self.count += 1
        self.calls[path] = _Call(
            path,
            self.count,
            tuple(first.shape) if isinstance(first, Tensor) else (),
            tuple(output.shape) if isinstance(output, Tensor) else (),
        )

    def channels_last(self, shape: tuple[int, ...]) -> bool:
        """Return whether axes 1 and 2 have the proportions of the image, and axes 2 and 3 do not."""
        height, width = self.input_size
        return len(shape) == 4 and height * shape[2] == width * shape[1] and height * shape[3] != width * shape[2]

    def is_map(self, shape: tuple[int, ...], head: _Call) -> bool:
        """Return whether this is a map of more than one pixel with as many channels as a classifier takes."""
        channels = shape[-1] if self.channels_last(shape) else shape[1] if len(shape) == 4 else 0
        return channels == head.input[1] and self.pixels(shape) > 1

    def pixels(self, shape: tuple[int, ...]) -> int:
        """Return the number of pixels of a map, or of tokens; 0 for anything else."""
        if len(shape) == 4:
            return shape[1] * shape[2] if self.channels_last(shape) else shape[2] * shape[3]
        return shape[1] if len(shape) == 3 else 0

    def scale(self, shape: tuple[int, ...]) -> int:
        """Return log2 of the input size divided by the map's size, rounded."""
        return round(math.log2(self.input_size[0] * self.input_size[1] / self.pixels(shape)) / 2)


def _find_taps(network: nn.Module, input_size: tuple[int, int], in_channels: int) -> dict[str, Tap]:
    trace = _Trace(input_size)
    handles = [
        module.register_forward_hook(partial(trace.note, path)) for path, module in network.named_modules() if path
    ]
    try:
        logits = _run_undisturbed(network, _noise(network, input_size, in_channels))
    finally:
        for handle in handles:
            handle.remove()
    stages = _stages(network, trace)
    taps = {
        f"stage{k}": Tap(c.path, channels_last=trace.channels_last(c.output)) for k, c in enumerate(stages, start=1)
    }
    heads = [
        call
        for path, call in trace.calls.items()
        if isinstance(network.get_submodule(path), nn.Linear)
        and len(call.input) == 2
        and isinstance(logits, Tensor)
        and call.output == tuple(logits.shape)
    ]
    if heads:
        head = max(heads, key=lambda call: call.order)
        earliest = stages[-1].order if stages else 0
        maps = [
            call
            for call in trace.calls.values()
            if earliest <= call.order < head.order and trace.is_map(call.output, head)
        ]
        if maps:
            last = max(maps, key=lambda call: call.order)
            taps["map"] = Tap(last.path, channels_last=trace.channels_last(last.output))
        taps["pooled"] = Tap(head.path, "input")
    return taps | {"logits": Tap("")}


def _stages(network: nn.Module, trace: _Trace) -> list[_Call]:
    """Return the last call at each scale, or those at the quarters of a transformer of one scale."""
    listed = [trace.calls.get(str(info["module"])) for info in getattr(network, "feature_info", ())]
    blocks = [call for call in listed if call is not None and trace.pixels(call.output)]
    if blocks and len(blocks) == len(listed):
        columns = blocks
    else:
        blocks = sorted(_blocks(network, "", trace), key=lambda call: call.order)
        columns = _longest_column(network, trace)
    last_at_scale = {trace.scale(call.output): call for call in blocks}
    if len(last_at_scale) == 1 and columns and len(columns[0].output) == 3:
        quarters = [math.ceil(len(columns) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        return [columns[i] for i in dict.fromkeys(quarters)]
    return list(last_at_scale.values())


def _blocks(module: nn.Module, path: str, trace: _Trace) -> Iterator[_Call]:
    """Yield the calls of the blocks inside a module (see the module's docstring for what a block is)."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        call = trace.calls.get(child_path)
        if call is None or not trace.pixels(call.output):  # not called itself, or not a map: look inside
            yield from _blocks(child, child_path, trace)
            continue
        halvings = trace.scale(call.output) - trace.scale(call.input) if trace.pixels(call.input) else 0
        opens = halvings > 1 or (halvings and isinstance(child, nn.Sequential))
        if opens and any(True for _ in child.children()):
            yield from _blocks(child, child_path, trace)
            continue
        shrinks = trace.pixels(call.output) < trace.pixels(call.input)
        pools = "Pool" in type(child).__name__ or (shrinks and not any(True for _ in child.parameters()))
        if not pools and trace.pixels(call.input) != 1:
            yield call


def _longest_column(network: nn.Module, trace: _Trace) -> list[_Call]:
    """Return the calls of the longest list of sibling modules that all return tokens."""
    columns = [
        [trace.calls.get(f"{path}.{name}" if path else name) for name, _ in module.named_children()]
        for path, module in network.named_modules()
    ]
    of_tokens = [
        [call for call in column if call is not None]
        for column in columns
        if all(call is not None and len(call.output) == 3 for call in column)
    ]
    return max(of_tokens, key=len, default=[])
