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

Such networks have no ``stem`` and no ``:pre``. Maps with the channels last, (B, height, width, channels), are permuted
to (B, channels, height, width). Of what convolutions and norms over channels take and return, the axis of the channels
is known; of other maps it is measured on images of another size: its length stays.
Where the network takes one size alone, the kind of module says it (a convolution, a linear layer, or what a block ends
with), or timm's ``output_fmt``, or that no map is larger than the image. Where nothing does, the maps cannot be read,
and a method that asks for them is refused.

A network may return its logits in a tuple, a dictionary or an object, see :func:`find_logits`. These rules suit
networks with one trunk. If branches run in parallel at several scales, or blocks return tuples, name module paths
instead, or declare the taps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from vrm.contract import Norm, Outputs, Probe
from vrm.models.modes import evaluation_mode
from vrm.wording import first_line, listed, nearest, shape_in_words


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


class NetworkError(RuntimeError):
    """A network raised an error on images."""

    exit_code = 2

    def __init__(self, network: nn.Module, images: Tensor, error: Exception) -> None:
        """Name the network, the shape of its input, and the error's own words."""
        text = type(error).__name__ + (f": {first_line(error)}" if str(error).strip() else "")
        self.reason = f"failed on images of {shape_in_words(images.shape[1:])} (a batch of {len(images)}): {text}"
        super().__init__(f"{type(network).__name__} {self.reason}")


class _TapError(ValueError):
    """A value that is no tap, found while the network runs."""


class TappedNetwork(nn.Module):
    """A network whose forward pass also returns the values at its taps.

    The constructor registers forward hooks and :meth:`close` removes them; the network itself is not changed, and
    ``.network`` has its plain state dict. Wrap a network before compiling or distributing it: a graph that was compiled
    before a hook was added never calls it, but a graph compiled later (such as that of a smaller last batch) does. If a
    module is called several times in one pass, its last call is read.

    Args:
        network: Any module from images (B, channels, H, W) to logits (B, C), or to what holds them.
        taps: Names of taps to return; selectors such as ``stages`` are resolved by :meth:`vrm.contract.Probe.resolve`.
        preprocess: Applied to the images first, usually a :class:`vrm.models.Preprocess`.
        input_size: (height, width) of the network's input. Needed to find the taps of a network that declares none, and
            to measure the layout of a module path, whose output is otherwise returned as it is.
        in_channels: Channels of the input, for the same purpose.
        logits_key: Which entry of what the network returns are the logits, see :func:`find_logits`.
        num_classes: C, which tells logits from other entries.
        survey: What was found of the network before, by :func:`probe`.
        probabilities: Whether the network ends in a softmax; its logits are then the logarithms of what it returns.

    Raises:
        ValueError: A tap is unknown (the message has the nearest names), or its layout cannot be told.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Sequence[str] = (),
        preprocess: nn.Module | None = None,
        *,
        input_size: tuple[int, int] | None = None,
        in_channels: int = 3,
        logits_key: str | None = None,
        num_classes: int | None = None,
        survey: _Survey | None = None,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.probabilities = probabilities
        self.preprocess = preprocess
        self.taps = tuple(taps)
        self.logits_key, self.num_classes = logits_key, num_classes
        survey = survey or _Survey(network, input_size, in_channels, self._pick)
        self._has_pooled = "pooled" in survey.taps
        self._recorder = _Recorder()
        self._handles: list[RemovableHandle] = []
        self._whole: list[str] = []
        for name in dict.fromkeys((*self.taps, *(["pooled"] if self._has_pooled else []))):
            tap = survey.place(name)
            if tap.path == "" and tap.side == "output":
                self._whole.append(name)
                continue
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
            if torch.compiler.is_compiling():
                returned = self.network(images)
            else:
                returned = _call(self.network, self.network, images)
        finally:
            self._recorder.caught = None
        logits = self._pick(returned)
        logits = log_probabilities(logits) if self.probabilities else logits
        caught |= dict.fromkeys(self._whole, logits)
        for name in self.taps:
            if name not in caught:
                raise ValueError(
                    f"the module of tap {name!r} was not called in the forward pass; tap one that is called"
                )
        return Outputs(
            logits, caught["pooled"] if self._has_pooled else None, {name: caught[name] for name in self.taps}
        )

    def _pick(self, returned: Any) -> Tensor:
        return _pick(self.network, returned, self.logits_key, self.num_classes)

    def close(self) -> None:
        """Remove the hooks, which leaves the network as it was before it was wrapped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Return logits whose softmax is these probabilities, at least in float32; finite also for a probability of 0."""
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    return wide.clamp(min=torch.finfo(torch.float32).tiny).log()


class _Recorder:
    """What the hooks of one wrapper write to; ``caught`` is ``None`` except during its forward pass."""

    def __init__(self) -> None:
        self.caught: dict[str, Tensor] | None = None


def _catch(recorder: _Recorder, name: str, tap: Tap, module: nn.Module, inputs: Any, output: Any = None) -> None:
    if recorder.caught is None:
        return
    value = inputs[0] if tap.side == "input" else output
    if not isinstance(value, Tensor):
        raise _TapError(f"tap {name!r} is a {type(value).__name__}, not a tensor; tap a module inside it")
    recorder.caught[name] = value.permute(0, 3, 1, 2) if tap.channels_last else value


def _call(function: Callable[[Tensor], Any], network: nn.Module, images: Tensor) -> Any:
    """Return what a network returns on images. Raise :class:`NetworkError` for any error but a lack of memory."""
    try:
        return function(images)
    except (torch.OutOfMemoryError, NetworkError, _TapError):
        raise
    except Exception as error:  # a user's network may raise anything
        raise NetworkError(network, images, error) from error


def find_logits(network: nn.Module, returned: Any, *, key: str | None = None, num_classes: int | None = None) -> str:
    """Return the key of the logits in what a network returns, if that is no tensor.

    The entries of a dictionary are called by their keys, those of a tuple by their positions (``"0"``) and, where they
    have any, by their names, those of another object by the names of its attributes. The logits are the entry ``key``;
    else the entry ``logits``; else the only one of shape (B, C), with C = ``num_classes`` if that is given and there
    are several. Raise ``ValueError`` if none is, or several are.
    """
    entries = _list_entries(returned)
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if key is not None and key in tensors:
        return key
    if key is None and "logits" in tensors:
        return "logits"
    rows = [name for name, value in tensors.items() if value.ndim == 2 and value.is_floating_point()]
    if len(rows) > 1:
        rows = [name for name in rows if tensors[name].shape[1] == num_classes]
    if key is None and len({id(tensors[name]) for name in rows}) == 1:
        return rows[0]
    shown = [f"{name} ({shape_in_words(value.shape)})" for name, value in tensors.items()]
    what = f"{type(network).__name__} returns a {type(returned).__name__}, not a tensor of logits (B, C)"
    if key is not None:
        raise ValueError(f"{what}, and it has no tensor {key!r} (logits_key); {nearest(key, tensors)}")
    raise ValueError(
        f"{what}; its tensors are {listed(shown) or 'none'}: name the logits among them by logits_key, or wrap the "
        "network in a module that returns the logits alone"
    )


def _pick(network: nn.Module, returned: Any, key: str | None = None, num_classes: int | None = None) -> Tensor:
    if isinstance(returned, Tensor):
        return returned
    logits: Tensor = _list_entries(returned)[find_logits(network, returned, key=key, num_classes=num_classes)]
    return logits


def _list_entries(returned: Any) -> dict[str, Any]:
    if isinstance(returned, Mapping):
        return {str(key): value for key, value in returned.items()}
    if isinstance(returned, tuple | list):
        names = getattr(returned, "_fields", range(len(returned)))
        return {str(name): value for name, value in zip(names, returned, strict=True)}
    return dict(getattr(returned, "__dict__", {}))


class _Survey:
    """Where the taps of a network are: those it declares, or those found by running it, and any module path."""

    def __init__(
        self,
        network: nn.Module,
        input_size: tuple[int, int] | None,
        in_channels: int,
        pick: Callable[[Any], Tensor],
    ) -> None:
        """Find the logical taps. ``pick`` returns the logits in what the network returns."""
        self.network, self.input_size, self.in_channels, self.pick = network, input_size, in_channels, pick
        self.problem = ""
        """Why the network has no stages, if its maps cannot be read."""
        if isinstance(network, DeclaresTaps):
            self.taps = network.declared_taps()
        elif input_size is None:
            raise ValueError(
                f"{type(network).__name__} does not declare its taps, so they have to be found by running it: "
                "pass input_size=(height, width)"
            )
        else:
            self.taps, self.problem = _find_taps(network, self.trace)

    @cached_property
    def trace(self) -> _Trace:
        """The calls of all modules, with the layouts of what they take and return."""
        assert self.input_size is not None
        return _trace_layouts(self.network, self.input_size, self.in_channels, self.pick)

    def place(self, name: str) -> Tap:
        """Return where a tap is. Raise ``ValueError`` if it is unknown, or if its layout cannot be told."""
        if name in self.taps:
            return self.taps[name]
        paths = [path for path, _ in self.network.named_modules() if path]
        if name not in paths:
            hint = self.problem or nearest(name, [*self.taps, *paths])
            raise ValueError(
                f"{type(self.network).__name__} has no tap {name!r}; {hint} "
                f"(logical names: {', '.join(self.taps)}; any module path is allowed as well)"
            )
        call = None if self.input_size is None else self.trace.calls.get(name)
        if call is None or not call.output.is_map:  # or not called, which the forward pass tells
            return Tap(name)
        if call.output.channels_last is None:
            raise ValueError(_unknown_layout(call, self.trace.input_size))
        return Tap(name, channels_last=call.output.channels_last)


def known_taps(
    network: nn.Module, *, input_size: tuple[int, int] | None = None, in_channels: int = 3
) -> dict[str, Tap]:
    """Return the logical taps of a network: those it declares, or those found by running it once (see above).

    Raise ``ValueError`` if the network declares none and ``input_size`` is not given.
    """
    return _Survey(network, input_size, in_channels, partial(_pick, network)).taps


def probe(
    network: nn.Module,
    *,
    name: str,
    input_size: tuple[int, int],
    in_channels: int = 3,
    extra_taps: Sequence[str] = (),
    logits_key: str | None = None,
    num_classes: int | None = None,
) -> Probe:
    """Measure a network's taps on noise, in eval mode and without gradient; its buffers and modes stay as they are.

    Args:
        network: From images (B, in_channels, height, width) to logits (B, C), or to what holds them.
        name: What messages call it.
        input_size: (height, width) of its input.
        in_channels: Channels of its input.
        extra_taps: Module paths to measure besides the logical taps.
        logits_key: Which entry of what the network returns are the logits, see :func:`find_logits`.
        num_classes: C, which tells logits from other entries.

    Returns:
        Shapes of ``stem, stage1 .. stageN, map, pooled, logits``, of the ``:pre`` taps and of ``extra_taps``, in this
        order. A tap is ``signed`` if any of its values was negative. ``map`` is there if the classifier of its mean
        gives the logits.

    Raises:
        NetworkError: The network raises an error on such images.
        ValueError: A tap is unknown (the message has the nearest names); a later in-place operation overwrites the
            output of a module path; or the network does not return logits (B, C).
    """
    taken: list[str] = []

    def pick(returned: Any) -> Tensor:
        if not isinstance(returned, Tensor):
            key = find_logits(network, returned, key=logits_key, num_classes=num_classes)
            taken[:] = [f"the logits are the entry {key!r} of the {type(returned).__name__} that the network returns"]
        return _pick(network, returned, logits_key, num_classes)

    survey = _Survey(network, input_size, in_channels, pick)
    known = survey.taps
    names = tuple(dict.fromkeys((*known, *extra_taps)))
    tapped = TappedNetwork(
        network, names, input_size=input_size, logits_key=logits_key, num_classes=num_classes, survey=survey
    )
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
        unreadable=survey.problem,
        note=taken[0] if taken else "",
    )


def _classifies_mean(classifier: nn.Linear, features: Tensor, logits: Tensor) -> bool:
    """Return whether the logits are the classifier's of the mean over a map's pixels, as far as rounding allows."""
    if features.ndim != 4 or features.shape[1] != classifier.in_features:
        return False
    with torch.no_grad():
        found = classifier(features.mean((2, 3)))
    scale = float(logits.abs().max())
    return math.isfinite(scale) and torch.allclose(found, logits, rtol=1e-3, atol=1e-3 * scale)


def accepts(network: nn.Module, *, input_size: tuple[int, int], in_channels: int) -> bool:
    """Return whether a network runs on images of this size with so many channels."""
    try:
        with torch.random.fork_rng(devices=[]):
            _run_undisturbed(network, _noise(network, input_size, in_channels))
    except Exception:  # a network may raise anything on images that it does not take
        return False
    return True


def _note_version(versions: dict[str, int], path: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    versions[path] = output._version


def _affine(network: nn.Module, path: str) -> Norm:
    norm = network.get_submodule(path)
    return Norm(norm.get_parameter("weight").detach().clone(), norm.get_parameter("bias").detach().clone())


def _noise(network: nn.Module, input_size: tuple[int, int], in_channels: int) -> Tensor:
    """Return the same two images of noise (2, in_channels, height, width) every time, in the network's dtype."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(_IMAGES, in_channels, *input_size, generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype)


def _run_undisturbed(network: nn.Module, images: Tensor) -> Any:
    """Run in eval mode without gradient; buffers that the pass changes are copies, attributes are put back."""
    spaces = [(vars(module), vars(module).copy()) for module in network.modules()]
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        with evaluation_mode(network), torch.no_grad():
            return functional_call(network, buffers, (images,))
    finally:
        for space, content in spaces:
            if [*map(id, space.values())] != [*map(id, content.values())]:
                space.clear()
                space.update(content)


# ---- finding the taps of a network that does not declare them --------------------------------------------------------


@dataclass
class _Value:
    """The shape of a tensor that a module takes or returns, () of anything else, and its layout if it is a map."""

    shape: tuple[int, ...]
    channels_last: bool | None = None
    """Whether a map is (B, height, width, channels) rather than (B, channels, height, width); None is not known."""

    @staticmethod
    def of(value: Any) -> _Value:
        return _Value(tuple(value.shape) if isinstance(value, Tensor) else ())

    @property
    def is_map(self) -> bool:
        """Whether it has the axes of a map of the images."""
        return len(self.shape) == 4 and self.shape[0] == _IMAGES

    @property
    def channels(self) -> int:
        """The number of channels of a map whose layout is known; 0 of anything else."""
        if not self.is_map or self.channels_last is None:
            return 0
        return self.shape[3] if self.channels_last else self.shape[1]

    @property
    def pixels(self) -> int:
        """The number of pixels of a map, or of tokens; 0 of anything else."""
        if self.is_map:
            return self.shape[1] * self.shape[2] if self.channels_last else self.shape[2] * self.shape[3]
        return self.shape[1] if len(self.shape) == 3 else 0

    def find_layout(self, changed: Iterable[int]) -> None:
        """Tell the layout from the axes whose lengths change with the size of the images."""
        if 3 in changed and 1 not in changed:
            self.channels_last = False
        elif 1 in changed and 3 not in changed:
            self.channels_last = True


@dataclass
class _Call:
    """The last call of a module: its number among all calls, how often the module was called, and what it took."""

    path: str
    order: int
    input: _Value
    output: _Value
    times: int


@dataclass
class _Trace:
    """The calls of all modules in one forward pass, and the logits."""

    input_size: tuple[int, int]
    calls: dict[str, _Call] = field(default_factory=dict)
    count: int = 0
    logits: Tensor | None = None
    _seen: dict[int, tuple[Any, _Value]] = field(default_factory=dict)
    """All that modules took and returned, which is held so that no other has its id, and what is known of it."""

    def note(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.count += 1
        times = self.calls[path].times + 1 if path in self.calls else 1
        first = inputs[0] if inputs else None
        taken, given = (  # one tensor has one layout
            self._seen.setdefault(id(value), (value, _Value.of(value)))[1] for value in (first, output)
        )
        if isinstance(module, _FIRST):
            taken.channels_last = given.channels_last = False
        elif _keeps_layout(module):
            given.channels_last = taken.channels_last
        self.calls[path] = _Call(path, self.count, taken, given, times)

    def forget(self) -> None:
        """Let go of all tensors."""
        self._seen.clear()

    def scale(self, value: _Value) -> int:
        """Return log2 of the input size divided by the map's size, rounded."""
        return round(math.log2(self.input_size[0] * self.input_size[1] / value.pixels) / 2)


_IMAGES = 2
"""The images of a probe."""

_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
"""Modules whose maps have the channels first."""

_LAST = (nn.Linear, nn.LayerNorm)
"""Modules whose maps have the channels last, as they work on the last axis."""

_ELEMENTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
"""Where modules are defined that return maps as they take them."""


def _keeps_layout(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or type(module).__module__ in _ELEMENTWISE


def _trace(network: nn.Module, input_size: tuple[int, int], in_channels: int, trace: _Trace) -> Any:
    """Run a network with hooks that fill ``trace``, as far as it comes; return what it returns."""
    handles = [
        module.register_forward_hook(partial(trace.note, path)) for path, module in network.named_modules() if path
    ]
    try:
        images = _noise(network, input_size, in_channels)
        return _call(partial(_run_undisturbed, network), network, images)
    finally:
        trace.forget()
        for handle in handles:
            handle.remove()


def _trace_layouts(
    network: nn.Module, input_size: tuple[int, int], in_channels: int, pick: Callable[[Any], Tensor]
) -> _Trace:
    """Return the calls in one forward pass, with the layouts of maps: see the module's docstring."""
    trace = _Trace(input_size)
    trace.logits = pick(_trace(network, input_size, in_channels, trace))
    height, width = input_size
    sizes = [(height // 2, width // 2)] * (height % 2 == width % 2 == 0) + [(2 * height, 2 * width)]
    for size in sizes:
        pairs = [(call, value) for call in trace.calls.values() for value in (call.input, call.output)]
        if all(value.channels_last is not None for _, value in pairs if value.is_map):
            return trace
        other = _Trace(size)
        with contextlib.suppress(NetworkError):  # of a network that takes one size alone, its first modules are told
            _trace(network, size, in_channels, other)
        for call in trace.calls.values():
            twin = other.calls.get(call.path)
            if twin is not None and twin.times == call.times:
                for mine, theirs in ((call.input, twin.input), (call.output, twin.output)):
                    if mine.is_map and theirs.is_map and mine.channels_last is None:
                        axes = (axis for axis in range(4) if mine.shape[axis] != theirs.shape[axis])
                        mine.find_layout(set(axes))
    for call in sorted(trace.calls.values(), key=lambda call: call.order):
        for value in (call.input, call.output):
            if value.is_map and value.channels_last is None:
                value.channels_last = _told_layout(network, trace, call, value)
    return trace


def _told_layout(network: nn.Module, trace: _Trace, call: _Call, value: _Value) -> bool | None:
    """Return the layout of a map of a network that takes one size alone, as far as its modules tell it."""
    module = network.get_submodule(call.path)
    if isinstance(module, (*_FIRST, *_LAST)):
        return isinstance(module, _LAST)
    if _keeps_layout(module):
        return call.input.channels_last
    listed = {str(info["module"]) for info in getattr(network, "feature_info", ())}
    declared = getattr(network if call.path in listed and value is call.output else module, "output_fmt", None)
    if str(getattr(declared, "value", declared)) in ("NHWC", "NCHW"):
        return str(getattr(declared, "value", declared)) == "NHWC"
    _, one, two, three = value.shape
    if value is call.output and one != three:  # the last part of a block tells, if it returns the same shape
        inner = [c for path, c in trace.calls.items() if path.startswith(f"{call.path}.") and c.output.is_map]
        inner = [c for c in inner if isinstance(network.get_submodule(c.path), (*_FIRST, *_LAST))]
        last = max(inner, key=lambda c: c.order, default=None)
        if last is not None and last.output.shape == value.shape:
            return isinstance(network.get_submodule(last.path), _LAST)
    height, width = trace.input_size
    fits = {False: two <= height and three <= width, True: one <= height and two <= width}
    return None if fits[False] == fits[True] else fits[True]


def _unknown_layout(call: _Call, input_size: tuple[int, int]) -> str:
    return (
        f"{call.path!r} returns maps of {shape_in_words(call.output.shape[1:])}, and which axis has the channels "
        f"cannot be told, as the network takes images of {shape_in_words(input_size)} alone: let it declare its taps "
        "(declared_taps), or name the path of a module that tells it, such as a convolution"
    )


def _find_taps(network: nn.Module, trace: _Trace) -> tuple[dict[str, Tap], str]:
    """Return the logical taps, and why there are no stages if their maps cannot be read."""
    blocks, columns = _find_blocks(network, trace)
    stages = _stages(blocks, columns, trace)
    unknown = [call for call in blocks if call.output.is_map and call.output.channels_last is None]
    # One that a later block of its scale stands for does no harm, if the number of its pixels is certain.
    unknown = [call for call in unknown if call in stages or call.output.shape[1] != call.output.shape[3]]
    stages = [] if unknown else stages
    taps = {f"stage{k}": Tap(c.path, channels_last=bool(c.output.channels_last)) for k, c in enumerate(stages, start=1)}
    heads = [
        call
        for path, call in trace.calls.items()
        if _is_linear(network.get_submodule(path))
        and len(call.input.shape) == 2
        and trace.logits is not None
        and call.output.shape == tuple(trace.logits.shape)
    ]
    if heads:
        head = max(heads, key=lambda call: call.order)
        earliest = stages[-1].order if stages else 0
        maps = [
            call
            for call in trace.calls.values()
            if earliest <= call.order < head.order
            and call.output.channels == head.input.shape[1]
            and call.output.pixels > 1
        ]
        if maps:
            last = max(maps, key=lambda call: call.order)
            taps["map"] = Tap(last.path, channels_last=bool(last.output.channels_last))
        taps["pooled"] = Tap(head.path, "input")
    return taps | {"logits": Tap("")}, _unknown_layout(unknown[0], trace.input_size) if unknown else ""


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: PyTorch's, or a quantised or adapted one, which have its sizes."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _find_blocks(network: nn.Module, trace: _Trace) -> tuple[list[_Call], list[_Call]]:
    """Return the calls of the blocks, and of the longest list of modules that return tokens."""
    listed = [trace.calls.get(str(info["module"])) for info in getattr(network, "feature_info", ())]
    blocks = [call for call in listed if call is not None and call.output.pixels]
    if blocks and len(blocks) == len(listed):
        return blocks, blocks
    return sorted(_blocks(network, "", trace), key=lambda call: call.order), _longest_column(network, trace)


def _stages(blocks: Sequence[_Call], columns: Sequence[_Call], trace: _Trace) -> list[_Call]:
    """Return the last call at each scale, or those at the quarters of a transformer of one scale."""
    last_at_scale = {trace.scale(call.output): call for call in blocks}
    if len(last_at_scale) == 1 and columns and len(columns[0].output.shape) == 3:
        quarters = [math.ceil(len(columns) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)]
        return [columns[i] for i in dict.fromkeys(quarters)]
    return list(last_at_scale.values())


def _blocks(module: nn.Module, path: str, trace: _Trace) -> Iterator[_Call]:
    """Yield the calls of the blocks inside a module (see the module's docstring for what a block is)."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        call = trace.calls.get(child_path)
        if call is None or not call.output.pixels:  # not called itself, or not a map: look inside
            yield from _blocks(child, child_path, trace)
            continue
        halvings = trace.scale(call.output) - trace.scale(call.input) if call.input.pixels else 0
        opens = halvings > 1 or (halvings and isinstance(child, nn.Sequential))
        if opens and any(True for _ in child.children()):
            yield from _blocks(child, child_path, trace)
            continue
        shrinks = call.output.pixels < call.input.pixels
        pools = "Pool" in type(child).__name__ or (shrinks and not any(True for _ in child.parameters()))
        if not pools and call.input.pixels != 1:
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
        if all(call is not None and len(call.output.shape) == 3 for call in column)
    ]
    return max(of_tokens, key=len, default=[])
