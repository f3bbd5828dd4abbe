"""Weights in files: read from what others saved, written so that no crash leaves half a file, named by their hash.

Files that are written here carry the hash of their tensors in their header, and are checked against it when read: the
format itself notices no changed bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

_PICKLED = (".pth", ".pt", ".tar")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # a PyTorch archive, a bare pickle
_SHOWN = 5  # keys of each kind that a message lists
_DEPTH = 5  # wrappings around a state dict

# ---- reading ---------------------------------------------------------------------------------------------------------


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a network's weights from a file, in place. Nothing changes unless all of it fits.

    Args:
        network: Whose state dict is to be filled.
        path: A ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.tar`` checkpoint, read with ``weights_only=True`` so
            that no code in it runs, and with ``model``, ``state_dict`` and ``module.`` wrappings removed; or a folder
            that holds ``model.safetensors``, such as a run's. If the ``model.json`` beside it tells of other weights,
            that is a warning.

    Raises:
        ValueError: The file is missing, broken or unsafe, is not what was written (by the hash in its header), or does
            not fit; the message says which keys.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"no weights at {file}; give a .safetensors, .pth, .pt or .tar file, or a run folder")
    tensors = _without_prefix(_read(file))
    _check_fit(network, tensors, file)
    _check_kinds(network, tensors, file)
    _check_card(tensors, file)
    network.load_state_dict(tensors)


def _read(file: Path) -> dict[str, Tensor]:
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: its writing or copying was cut off; copy or download it again")
    if file.suffix == ".safetensors":
        return read_tensors(file)
    if file.suffix not in _PICKLED:
        raise ValueError(f"{file} has an unknown ending; weights are read from .safetensors, .pth, .pt and .tar")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} was refused: it is broken, or holds more than tensors and plain values, and such a pickle can run "
            "any code when opened, so vrm never opens one. If you trust its origin, load it yourself and save its "
            f"state dict alone with vrm.models.save_weights. ({_first_line(error)})"
        ) from error
    except Exception as error:  # a broken archive may raise anything
        raise ValueError(
            f"{file} is truncated or no PyTorch checkpoint ({_first_line(error)}); copy or download it again"
        ) from error
    return _unwrap(loaded, file)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file. ``ValueError`` if it is none, or not what :func:`save_tensors` wrote."""
    file = Path(path)
    try:
        tensors = safetensors.torch.load_file(file)
        with safe_open(file, "pt") as opened:
            expected = (opened.metadata() or {}).get("sha256")
    except Exception as error:  # the library has errors of its own, and Python's for some types
        with contextlib.suppress(OSError), file.open("rb") as stream:
            if stream.read(4).startswith(_PICKLE_STARTS):
                raise ValueError(
                    f"{file} is no safetensors file but looks like a PyTorch checkpoint, a pickle; named .pth it is "
                    "read as far as that can be done without running code from it"
                ) from error
        raise ValueError(
            f"{file} is truncated or no safetensors file ({_first_line(error)}); copy or download it again"
        ) from error
    if expected is not None and tensors_hash(tensors) != expected:
        raise ValueError(f"{file} is damaged: its tensors do not have the SHA-256 in its header; copy it again")
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unwrap(loaded: Any, file: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: itself, or under ``model`` or ``state_dict``."""
    for _ in range(_DEPTH):
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{file} holds a {type(loaded).__name__}, not a state dict; save network.state_dict()")
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            odd = [key for key in loaded if not isinstance(key, str)]
            if odd:
                raise ValueError(f"{file} has tensors under {odd[0]!r}, which is no name; save network.state_dict()")
            return dict(loaded)
        inner = next((loaded[key] for key in ("model", "state_dict") if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            raise ValueError(
                f"{file} holds no state dict: its keys are {', '.join(map(str, list(loaded)[:_SHOWN])) or 'none'}; "
                "expected tensors by name, or such under 'model' or 'state_dict'"
            )
        loaded = inner
    raise ValueError(f"{file} holds no state dict within {_DEPTH} wrappings; save network.state_dict()")


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the ``module.`` that DataParallel and DistributedDataParallel put before every name."""
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _check_card(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A warning if these are not the weights that the card beside them tells of."""
    card = file.with_name("model.json")
    if file.name != "model.safetensors" or not card.is_file():
        return
    try:
        expected = json.loads(card.read_bytes()).get("weights_sha256")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{card} is damaged ({_first_line(error)})") from None
    if expected is not None and tensors_hash(tensors) != expected:
        warnings.warn(
            f"{file} does not hold the weights that {card} tells of: one of them was changed, or copied alone",
            stacklevel=3,
        )


def _check_fit(network: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    wrong = [name for name in own if name in given and own[name] != given[name]]
    if not (missing or unexpected or wrong):
        return
    heads = [f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if heads and heads[-1] in wrong and not missing and not unexpected and len(wrong) <= 2:
        head = heads[-1]
        if own[head][1:] == given[head][1:]:
            raise ValueError(
                f"{file} was trained for {given[head][0]} classes, this network has {own[head][0]}: "
                "set the number of classes to that of the file, or give weights for this data set"
            )
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", [f"{name} {given[name]} instead of {own[name]}" for name in wrong]),
        )
        if keys
    ]
    raise ValueError(
        f"{file} does not fit {type(network).__name__} ({len(given)} tensors for {len(own)}): {'; '.join(problems)}. "
        "Is it the weights of another network?"
    )


def _check_kinds(network: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """``ValueError`` for what could not be copied, or would be another number: sparse tensors, complex ones, .."""
    for name, own in network.state_dict().items():
        given = tensors[name]
        plain = given.layout is torch.strided and given.device.type == "cpu" and not given.is_quantized
        if not plain or own.is_floating_point() != given.is_floating_point() or own.is_complex() != given.is_complex():
            kind = str(given.dtype).removeprefix("torch.") if plain else f"{given.layout}, {given.device}"
            raise ValueError(f"{file}: {name} is {kind}, the network has {str(own.dtype).removeprefix('torch.')}")


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's state dict as safetensors: beside, fsynced, renamed, so that a reader sees all or nothing."""
    save_tensors(network.state_dict(), path)


def save_tensors(named: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """The same of any named tensors."""
    replace_file(path, serialised(named))


def serialised(named: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file whose header holds their hash; the same tensors are the same bytes."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    plain = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    # The header is written here: the library would put several keys of metadata down in a random order.
    header = {"__metadata__": {"format": "pt", "sha256": tensors_hash(tensors)}} | json.loads(plain[8:start])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[start:]


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside, flush it to the disk, and rename it. Whatever fails, ``path`` is as it was: ``OSError``."""
    file = Path(path)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write_file(beside, content)
        os.replace(beside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    fsync(file.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of ``content``: the system may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no flushing of folders: there, names are kept as far as the server keeps them.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


# ---- hashes ----------------------------------------------------------------------------------------------------------


def weights_hash(network: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the state dict, in the order of the names."""
    return tensors_hash(network.state_dict())


def tensors_hash(named: Mapping[str, Tensor]) -> str:
    """The same of any named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
