"""Weights in files: read from what others saved, written so that no crash leaves half a file, named by their hash."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

_PICKLED = (".pth", ".pt", ".tar")
_SHOWN = 5  # keys of each kind that a message lists


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a network's weights from a file, in place. Nothing changes unless all of it fits.

    Args:
        network: Whose state dict is to be filled.
        path: A ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.tar`` checkpoint, read with ``weights_only=True`` so
            that no code in it runs, and with ``model``, ``state_dict`` and ``module.`` wrappings removed; or a folder
            that holds ``model.safetensors``, such as a run's.

    Raises:
        ValueError: The file is missing, broken or unsafe, or does not fit; the message says which keys.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"no weights at {file}; give a .safetensors, .pth, .pt or .tar file, or a run folder")
    tensors = _without_prefix(_read(file))
    _check_fit(network, tensors, file)
    network.load_state_dict(tensors)


def _read(file: Path) -> dict[str, Tensor]:
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: its writing or copying was cut off; copy or download it again")
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is truncated or no safetensors file ({error}); copy or download it again"
            ) from error
    if file.suffix not in _PICKLED:
        raise ValueError(f"{file} has an unknown ending; weights are read from .safetensors, .pth, .pt and .tar")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} was refused: it is broken, or holds more than tensors and plain values, and such a pickle can run "
            "any code when opened, so vrm never opens one. If you trust its origin, load it yourself and save its "
            f"state dict alone with vrm.models.save_weights. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated or no PyTorch checkpoint ({error}); copy or download it again"
        ) from error
    return _unwrap(loaded, file)


def _unwrap(loaded: Any, file: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: itself, or under ``model`` or ``state_dict``."""
    while isinstance(loaded, Mapping):
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            return dict(loaded)
        inner = next((loaded[key] for key in ("model", "state_dict") if key in loaded), None)
        if inner is None:
            raise ValueError(
                f"{file} holds no state dict: its keys are {', '.join(map(str, list(loaded)[:_SHOWN])) or 'none'}; "
                "expected tensors by name, or such under 'model' or 'state_dict'"
            )
        loaded = inner
    raise ValueError(f"{file} holds a {type(loaded).__name__}, not a state dict; save network.state_dict()")


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the ``module.`` that DataParallel and DistributedDataParallel put before every name."""
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


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


def save_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's state dict as safetensors: beside, fsynced, renamed, so that a reader sees all or nothing."""
    save_tensors(network.state_dict(), path)


def save_tensors(named: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """The same of any named tensors."""
    file = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def weights_hash(network: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the state dict, in the order of the names."""
    return tensors_hash(network.state_dict())


def tensors_hash(named: Mapping[str, Tensor]) -> str:
    """The same of any named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
