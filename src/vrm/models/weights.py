"""Weights in files: checkpoints of any origin read safely, safetensors written, and the hash that names weights.

A written file carries the SHA-256 of its tensors in its header and is checked against it when read, because the
safetensors format itself does not notice a changed bit.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import logging
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from vrm.files import read_json, replace_file, user_path
from vrm.models.wrappers import unwrap
from vrm.wording import first_line, listed, nearest

_LOG = logging.getLogger(__name__)
_PICKLED = (".pth", ".pt", ".tar", ".ckpt", ".bin")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of a PyTorch archive, and of a bare pickle."""
_BESIDE = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"{module}.{flavour}Path" for module in ("pathlib", "pathlib._local") for flavour in ("Posix", "Windows")),
)
"""What checkpoints often hold beside the weights: arguments, numbers and arrays of NumPy, paths. None is made."""
_FACTORIES = ("list", "dict", "int", "float", "set", "str", "bool")
"""What a ``defaultdict`` is often made with."""
_DEPTH = 5
"""Wrappings around a state dict that are looked through; a checkpoint may hold itself."""
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that PyTorch's own wrappers add, before a whole network's names or in their middle."""

# ---- reading ---------------------------------------------------------------------------------------------------------


class SeveralWeights(ValueError):
    """A file holds several sets of weights that fit the network, and none was chosen."""

    def __init__(self, file: Path, keys: Sequence[str]) -> None:
        """Name the file, and what can be given as ``key``."""
        self.keys = tuple(keys)
        super().__init__(
            f"{file} holds several sets of weights that fit and differ: {', '.join(self.keys)}; choose with "
            + " or ".join(f"key={key!r}" for key in self.keys)
        )


def load_weights(network: nn.Module, path: str | os.PathLike[str], *, key: str | None = None) -> None:
    """Load a network's weights from a file, in place. The network changes only if all tensors fit.

    The state dict is looked for in the entries of a checkpoint, and its names may have a prefix (``model.``,
    ``backbone.``) and what DataParallel, ``torch.compile`` and the like add (``module.``, ``_orig_mod.``): what fits
    the network's own names and shapes is taken, and told to the log. As in PyTorch, the count of batches of a batch
    norm (``num_batches_tracked``) may be missing. Where nothing fits so, what PyTorch's own strict loading takes is
    taken, such as names that the network's own code brings up to date.

    Args:
        network: The network to fill.
        path: A ``.safetensors`` file; a ``.pth``, ``.pt``, ``.tar``, ``.ckpt`` or ``.bin`` checkpoint, read with
            ``weights_only=True`` so that no code in it runs, unless its content is that of a safetensors file; or a
            folder that holds ``model.safetensors``, such as a run's. Warn if the ``model.json`` beside it names other
            weights.
        key: Which weights to take if several fit, such as raw ones and their moving average: the name of their entry
            (``"state_dict_ema"``), or of their prefix.

    Raises:
        ValueError: The file is missing, broken or unsafe, does not match the hash in its header, or does not fit the
            network; the message says which keys. :class:`SeveralWeights` if several sets fit.
    """
    if told := fill_network(network, path, key=key):
        _LOG.info(told)


def fill_network(network: nn.Module, path: str | os.PathLike[str], *, key: str | None = None) -> str:
    """Do what :func:`load_weights` does; return what was taken out of which wrapping, in words, or ``""``."""
    file = user_path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"no weights at {file}; give a .safetensors, {', '.join(_PICKLED)} file, or a run folder")
    own = network.state_dict()
    fit = _choose(_list_fits(network, own, _read(file), file), network, file, key)
    _check_kinds(own, fit.state, file)
    _check_card(fit.state, file)
    if not fit.translated:
        own.update(fit.state)  # its metadata says that the layout is the current one, as the names do
    network.load_state_dict(fit.state if fit.translated else own)
    return fit.describe(file)


def _read(file: Path) -> Mapping[Any, Any]:
    """Return what a file holds: a state dict, or the entries of a checkpoint."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: its writing or copying was cut off; copy or download it again")
    if file.suffix == ".safetensors" or _looks_like_safetensors(file):
        return read_state(file)
    if file.suffix not in _PICKLED and not _looks_pickled(file):
        raise ValueError(
            f"{file} has an unknown ending; weights are read from .safetensors, {', '.join(_PICKLED[:-1])} and "
            f"{_PICKLED[-1]}"
        )
    try:
        with torch.serialization.safe_globals(_let_in()):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} was refused: it is broken, or holds more than tensors and plain values, and such a pickle can run "
            "any code when opened, so vrm never opens one. If you trust its origin, load it yourself and save its "
            f"state dict alone with vrm.models.save_weights.{_reason(error)}"
        ) from error
    except Exception as error:  # a broken archive may raise anything
        raise ValueError(
            f"{file} is truncated or not a PyTorch checkpoint ({first_line(error)}); copy or download it again"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, not a state dict; save network.state_dict()")
    return loaded


class _Left:
    """Stand for a value beside the weights: take what the file says of it, and keep and run nothing."""

    def __init__(self, *_: Any) -> None:
        """Take what its constructor would be given."""

    def __setstate__(self, _: Any) -> None:
        """Take what it would be restored from."""


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Return an empty dictionary in place of a ``defaultdict``."""
    return {}


def _let_in() -> list[Any]:
    """Return what stands for the classes and functions that a checkpoint may name besides those of PyTorch."""
    factories = [f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _FACTORIES]
    return [*((_Left, name) for name in (*_BESIDE, *factories)), (_plain_dict, "collections.defaultdict")]


def _reason(error: pickle.UnpicklingError) -> str:
    """Return what PyTorch refused, as a sentence after a space; ``""`` if its message does not name it."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f" (It names {found[1]}.)" if found else ""


def _looks_pickled(file: Path) -> bool:
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return stream.read(4).startswith(_PICKLE_STARTS)
    return False


def _looks_like_safetensors(file: Path) -> bool:
    """Return whether a file begins as the format does: with the length of a header in JSON."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        length, start = int.from_bytes(stream.read(8), "little"), stream.read(1)
        return start == b"{" and length <= file.stat().st_size - 8
    return False


# ---- what of a file fits ---------------------------------------------------------------------------------------------


@dataclass
class _Fit:
    """Values of one entry of a file, under the network's names, and how they fit."""

    entry: tuple[str, ...]
    """The keys that lead to the entry, from the top."""
    prefix: tuple[str, ...]
    """The parts of the names before those of the network."""
    state: dict[str, Any]
    """The values, by the network's names; values of unknown names by their own."""
    removed: tuple[str, ...]
    """What was removed from the names, as it stood there."""
    left_out: tuple[str, ...]
    """The names of tensors beside those with the prefix."""
    problems: tuple[str, ...]
    """Why it does not fit."""
    head: str
    """The same, if nothing but the number of classes is wrong."""
    hits: int
    """How many of the network's names are there."""
    translated: bool = False
    """Whether the network's own code for loading must bring names and shapes of ``state`` to its own."""

    @property
    def label(self) -> str:
        """What names this set of weights among those of the file."""
        return ".".join((*self.entry, *(part for part in self.prefix if part not in _WRAPPERS))) or "top"

    def describe(self, file: Path) -> str:
        """Return what was taken out of which wrapping, or ``""`` if there was none."""
        parts = [f"the entry {'.'.join(self.entry)!r}"] * bool(self.entry)
        parts += [f"names without {', '.join(map(repr, self.removed))}"] * bool(self.removed)
        parts += [f"left out {listed(self.left_out)}"] * bool(self.left_out)
        return f"{file}: {'; '.join(parts)}" if parts else ""


def _list_fits(network: nn.Module, own: Mapping[str, Any], loaded: Mapping[Any, Any], file: Path) -> list[_Fit]:
    """Return every set of tensors in the file, with the prefixes under which names of the network are found."""
    entries, odd = [], []
    for entry, content in _entries(loaded, (), ()):
        if any(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
            entries.append((entry, content))
        odd += [name for name, value in content.items() if isinstance(value, Tensor) and not isinstance(name, str)]
    if not entries and odd:
        raise ValueError(f"{file} has tensors under {odd[0]!r}, which is not a name; save network.state_dict()")
    if not entries:
        raise ValueError(
            f"{file} holds no state dict: its keys are {listed(loaded) or 'none'}; expected tensors by name, at the "
            f"top or in an entry such as 'model' or 'state_dict', at most {_DEPTH} deep"
        )
    found, expected = [], _Expected(own, network)
    for entry, content in entries:
        named = {name: value for name, value in content.items() if isinstance(name, str)}
        found += [_fit(expected, entry, prefix, names, named) for prefix, names in _by_prefix(own, named).items()]
    return found


def _entries(
    loaded: Mapping[Any, Any], path: tuple[str, ...], above: tuple[int, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield all mappings in a checkpoint, each with the keys that lead to it."""
    yield path, loaded
    if len(path) < _DEPTH:
        for key, value in loaded.items():
            if isinstance(value, Mapping) and id(value) not in (*above, id(loaded)):
                yield from _entries(value, (*path, str(key)), (*above, id(loaded)))


def _bare(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _by_prefix(own: Mapping[str, Any], named: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, str]]:
    """Return, for each prefix, which of the given names stands for which of the network's; the whole names first.

    Parts that wrappers add are looked through on both sides, unless the network's names differ in nothing else.
    """
    bare = {_bare(name.split(".")): name for name in own}
    if len(bare) < len(own):
        bare = {name: name for name in own}
    found: dict[tuple[str, ...], dict[str, str]] = {(): {name: name for name in own if name in named}}
    for name in named:
        parts = name.split(".")
        for start in range(len(parts)):
            target = None if parts[start] in _WRAPPERS else bare.get(_bare(parts[start:]))
            if target is not None:
                found.setdefault(tuple(parts[:start]), {}).setdefault(target, name)
    return found


class _Expected:
    """What a network expects of a file."""

    def __init__(self, own: Mapping[str, Any], network: nn.Module) -> None:
        """Take the network's own state, and see which names a file may lack, and which layer decides the classes."""
        self.own = own
        norms = [path for path, module in network.named_modules() if isinstance(module, _NormBase)]
        # PyTorch lets files lack counts of batches; states that are no tensors (get_extra_state) fit in few formats.
        self.optional = {f"{path}.num_batches_tracked".removeprefix(".") for path in norms}
        self.optional |= {n for n, v in own.items() if not isinstance(v, Tensor) and n.split(".")[-1] == "_extra_state"}
        heads = [f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        self.head = heads[-1] if heads else None

    def other_classes(self, state: Mapping[str, Any], wrong: Sequence[str]) -> str:
        """Return what is wrong with tensors ``wrong`` if it is the number of classes alone, else ``""``."""
        if self.head is None or self.head not in wrong or len(wrong) > 2:
            return ""
        expected, given = _shape(self.own[self.head]) or (), _shape(state[self.head]) or ()
        if expected[1:] != given[1:]:
            return ""
        return (
            f"was trained for {given[0]} classes, this network has {expected[0]}: set the number of classes to that of "
            "the file, or give weights for this data set"
        )


def _fit(
    expected: _Expected,
    entry: tuple[str, ...],
    prefix: tuple[str, ...],
    names: Mapping[str, str],
    named: Mapping[str, Any],
) -> _Fit:
    """Compare the values of an entry, ``names`` of them for those of the network, with what the network expects."""
    own = expected.own
    start = "".join(f"{part}." for part in prefix)
    taken = set(names.values())
    rest = [name for name, value in named.items() if isinstance(value, Tensor) and name not in taken]
    unexpected = [name.removeprefix(start) for name in rest if name.startswith(start)]
    state = {target: named[name] for target, name in names.items()}
    missing = [name for name in own if name not in state and name not in expected.optional]
    wrong = [name for name in state if _shape(own[name]) != _shape(state[name])]
    inner = {f"{part}." for t, n in names.items() for part in n.removeprefix(start).split(".") if part in _WRAPPERS}
    inner -= {f"{part}." for target in names for part in target.split(".")}
    return _Fit(
        entry=entry,
        prefix=prefix,
        state=state | {name: named[start + name] for name in unexpected},
        removed=(*((start,) if start else ()), *sorted(inner)),
        left_out=tuple(name for name in rest if not name.startswith(start)),
        problems=tuple(
            f"{len(keys)} {kind}: {listed(keys)}"
            for kind, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", [f"{n} {_shape(state[n])} instead of {_shape(own[n])}" for n in wrong]),
            )
            if keys
        ),
        head="" if missing or unexpected else expected.other_classes(state, wrong),
        hits=len(names),
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _choose(fits: Sequence[_Fit], network: nn.Module, file: Path, key: str | None) -> _Fit:
    """Return the one set of weights that fits. Raise ``ValueError`` if none does, or several with other values."""
    if key is not None:
        chosen = [fit for fit in fits if fit.label == key or fit.label.startswith(f"{key}.")]
        if not any(fit.hits for fit in chosen):
            labels = {fit.label for fit in fits if fit.hits and not fit.problems} or {f.label for f in fits if f.hits}
            raise ValueError(f"{file} has no weights under {key!r}; {nearest(key, labels)}")
        fits = chosen
    fitting = [fit for fit in fits if not fit.problems]
    if not fitting:
        most = max(fit.hits for fit in fits)
        candidates = [fit for fit in fits if fit.hits == most and _network_takes(network, fit.state)]
        fitting = [replace(fit, translated=True, problems=()) for fit in candidates]
    distinct: list[_Fit] = []
    for fit in fitting:
        if not any(_equal(fit.state, other.state) for other in distinct):
            distinct.append(fit)
    if len(distinct) > 1:
        raise SeveralWeights(file, [fit.label for fit in distinct])
    if distinct:
        return distinct[0]
    nearest_fit = max(fits, key=lambda fit: (fit.hits, -len(fit.state)))
    if nearest_fit.head:
        raise ValueError(f"{file} {nearest_fit.head}")
    raise ValueError(
        f"{file} does not fit {type(network).__name__} ({len(nearest_fit.state)} tensors for "
        f"{len(network.state_dict())}): {'; '.join(nearest_fit.problems)}. Are they the weights of another network?"
    )


def _network_takes(network: nn.Module, state: Mapping[str, Any]) -> bool:
    """Return whether a copy of the network loads a state strictly, such as one with names of an older version."""
    try:
        copy.deepcopy(network).load_state_dict(state, strict=True)
    except Exception:  # the code is the network's; what its copy does not take is reported as not fitting
        return False
    return bool(state)


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value is other[name]
        for name, value in one.items()
    )


def _check_kinds(own: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> None:
    """Raise ``ValueError`` for tensors that cannot be copied, or only as other numbers: sparse, complex and so on."""
    for name, value in given.items():
        mine = own.get(name, value)  # names that the network's own code translates have no tensor to compare with
        if not isinstance(mine, Tensor):
            continue
        plain = value.layout is torch.strided and value.device.type == "cpu" and value.is_quantized == mine.is_quantized
        alike = value.is_floating_point() == mine.is_floating_point() and value.is_complex() == mine.is_complex()
        if not plain or not alike or (name not in own and value.is_complex()):
            kind = str(value.dtype).removeprefix("torch.") if plain else f"{value.layout}, {value.device}"
            has = str(mine.dtype).removeprefix("torch.") if name in own else "no tensor of this name"
            raise ValueError(f"{file}: {name} is {kind}, the network has {has}")


def _check_card(state: Mapping[str, Any], file: Path) -> None:
    """Warn if the ``model.json`` beside a run's last weights names other weights by its hash."""
    card = file.with_name("model.json")
    if file.name != "model.safetensors" or not card.is_file():
        return
    expected = read_json(card).get("weights_sha256")
    if expected is not None and tensors_hash(state) != expected:
        warnings.warn(
            f"{file} does not hold the weights that {card} describes: one of them was changed, or copied alone",
            stacklevel=4,
        )


# ---- safetensors -----------------------------------------------------------------------------------------------------


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raise ``ValueError`` as :func:`read_state` does."""
    return {name: value for name, value in read_state(path).items() if isinstance(value, Tensor)}


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the tensors of a safetensors file, and the other values that :func:`serialise` put into its header.

    Raise ``ValueError`` if it is not one, or if its values do not have the hash in its header.
    """
    file = Path(path)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state: dict[str, Any] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        state |= {name: unpacked(value) for name, value in json.loads(metadata.get(_VALUES, "{}")).items()}
    except Exception as error:  # the library raises errors of its own, and Python's for some types
        if _looks_pickled(file):
            raise ValueError(
                f"{file} is not a safetensors file but looks like a PyTorch checkpoint, a pickle; rename it to "
                ".pth, and it is read as far as that is possible without running code from it"
            ) from error
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({first_line(error)}); copy or download it again"
        ) from error
    expected = metadata.get("sha256")
    if expected is not None and tensors_hash(state) != expected:
        raise ValueError(f"{file} is damaged: its tensors do not have the SHA-256 in its header; copy it again")
    return state


def save_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's state dict as safetensors; the file is replaced at once, so that readers see all or nothing.

    The names are those of the network inside a compiled or distributed one (see :func:`vrm.models.unwrap`).
    """
    save_tensors(unwrap(network).state_dict(), user_path(path))


def save_tensors(named: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state dict as safetensors; the file is replaced at once. Raise ``ValueError`` as :func:`packed` does."""
    replace_file(path, serialise(named))


def serialise(named: Mapping[str, Any]) -> bytes:
    """Return a state dict as a safetensors file whose header holds its hash. Equal content gives equal bytes.

    Values that are no tensors lie in the header, as JSON.
    """
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in named.items() if isinstance(t, Tensor)}
    values = {name: packed(value, name) for name, value in sorted(named.items()) if not isinstance(value, Tensor)}
    plain = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    # Write the header here: the library puts several keys of metadata in a random order.
    metadata = {"format": "pt", "sha256": tensors_hash(named)} | ({_VALUES: json.dumps(values)} if values else {})
    text = json.dumps({"__metadata__": metadata} | json.loads(plain[8:start]), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[start:]


# ---- values that are no tensors --------------------------------------------------------------------------------------

_VALUES = "state"
"""Where the header of a file has them."""


def packed(value: Any, name: str, *, quantised: bool = False) -> Any:
    """Return a value of a state dict as JSON holds it: plain values, containers of them, and small tensors.

    Args:
        value: What ``get_extra_state`` returned.
        name: What messages call it.
        quantised: Take quantised tensors too, to tell values apart; :func:`unpacked` does not make them again.

    Raises:
        ValueError: It is something else, which only a pickle could hold, or of which no hash can be made.
    """
    inner = partial(packed, name=name, quantised=quantised)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [inner(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [inner(item) for item in value]}
    if type(value) in (dict, OrderedDict):
        return {"dict": [[inner(key), inner(item)] for key, item in value.items()]}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor) and value.is_quantized and quantised:
        return {"quantised": [str(value.qscheme()), repr(_levels(value)), inner(value.int_repr())]}
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        return {"tensor": [inner(value.dtype), list(value.shape), base64.b64encode(_bytes(value)).decode()]}
    if isinstance(value, Tensor) and value.is_quantized:
        raise ValueError(f"{name!r} is quantised: it can teach, but not be trained or written; give the float network")
    if isinstance(value, torch.ScriptObject):
        raise ValueError(
            f"{name!r} holds packed weights, such as those of a quantised LSTM, which PyTorch does not let be read; "
            "quantise the linear layers alone (quantize_dynamic(network, {nn.Linear})), or give the float network"
        )
    if quantised:
        raise ValueError(
            f"{name!r} in the state of the network holds a {type(value).__name__}, of which no hash can be made, and a "
            "run knows its teacher by its hash; let get_extra_state return tensors, numbers, text, and lists or "
            "dictionaries of them, or None"
        )
    raise ValueError(
        f"{name!r} in the state of the network holds a {type(value).__name__}, which cannot be written without a "
        "pickle; let get_extra_state return tensors, numbers, text, and lists or dictionaries of them"
    )


def unpacked(value: Any) -> Any:
    """Return what :func:`packed` was given."""
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {unpacked(key): unpacked(item) for key, item in content}
    if kind == "tuple":
        return tuple(unpacked(item) for item in content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dtype":
        return getattr(torch, content)
    dtype, shape, data = content
    flat = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8) if data else torch.empty(0).byte()
    return flat.view(unpacked(dtype)).reshape(shape)


def _levels(value: Tensor) -> tuple[Any, ...]:
    """Return the scale and the zero point of a quantised tensor, or those of its channels."""
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return value.q_scale(), value.q_zero_point()
    return value.q_per_channel_axis(), value.q_per_channel_scales().tolist(), value.q_per_channel_zero_points().tolist()


# ---- hashes ----------------------------------------------------------------------------------------------------------


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 (hex) of a state dict: names, dtypes, shapes and bytes, in the order of the names."""
    return tensors_hash(network.state_dict())


def tensors_hash(named: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a state dict, as :func:`weights_hash` does for a network."""
    digest = hashlib.sha256()
    for name, value in sorted(named.items()):
        if isinstance(value, Tensor) and not value.is_quantized:
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(_bytes(value))
        else:
            digest.update(f"{name}\0{json.dumps(packed(value, name, quantised=True))}\0".encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
