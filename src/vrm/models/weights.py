"""Weights in files: checkpoints of any origin read safely, safetensors written, and the hash that names weights.

A written file carries the SHA-256 of its tensors in its header and is checked against it when read, because the
safetensors format itself does not notice a changed bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from vrm.files import read_json, replace_file, user_path
from vrm.wording import first_line, listed

_PICKLED = (".pth", ".pt", ".tar")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of a PyTorch archive, and of a bare pickle."""
_DEPTH = 5
"""Wrappings around a state dict that are looked through; a checkpoint may hold itself."""

# ---- reading ---------------------------------------------------------------------------------------------------------


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a network's weights from a file, in place. The network changes only if all tensors fit.

    Args:
        network: The network to fill.
        path: A ``.safetensors`` file; a ``.pth``, ``.pt`` or ``.tar`` checkpoint, read with ``weights_only=True`` so
            that no code in it runs, and with ``model``, ``state_dict`` and ``module.`` wrappings removed; or a folder
            that holds ``model.safetensors``, such as a run's. Warn if the ``model.json`` beside it names other weights.

    Raises:
        ValueError: The file is missing, broken or unsafe, does not match the hash in its header, or does not fit the
            network; the message says which keys.
    """
    file = user_path(path)
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
            f"state dict alone with vrm.models.save_weights. ({first_line(error)})"
        ) from error
    except Exception as error:  # a broken archive may raise anything
        raise ValueError(
            f"{file} is truncated or not a PyTorch checkpoint ({first_line(error)}); copy or download it again"
        ) from error
    return _unwrap(loaded, file)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raise ``ValueError`` if it is not one, or if its tensors do not have the hash in its header.
    """
    file = Path(path)
    try:
        with safe_open(file, "pt") as opened:
            expected = (opened.metadata() or {}).get("sha256")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises errors of its own, and Python's for some types
        with contextlib.suppress(OSError), file.open("rb") as stream:
            if stream.read(4).startswith(_PICKLE_STARTS):
                raise ValueError(
                    f"{file} is not a safetensors file but looks like a PyTorch checkpoint, a pickle; rename it to "
                    ".pth, and it is read as far as that is possible without running code from it"
                ) from error
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({first_line(error)}); copy or download it again"
        ) from error
    if expected is not None and tensors_hash(tensors) != expected:
        raise ValueError(f"{file} is damaged: its tensors do not have the SHA-256 in its header; copy it again")
    return tensors


def _unwrap(loaded: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint: the checkpoint itself, or what lies under ``model`` or ``state_dict``."""
    for _ in range(_DEPTH):
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{file} holds a {type(loaded).__name__}, not a state dict; save network.state_dict()")
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            odd = [key for key in loaded if not isinstance(key, str)]
            if odd:
                raise ValueError(f"{file} has tensors under {odd[0]!r}, which is not a name; save network.state_dict()")
            return dict(loaded)
        inner = next((loaded[key] for key in ("model", "state_dict") if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            raise ValueError(
                f"{file} holds no state dict: its keys are {listed(loaded) or 'none'}; expected tensors by name, at "
                "the top or under 'model' or 'state_dict'"
            )
        loaded = inner
    raise ValueError(f"{file} holds no state dict within {_DEPTH} wrappings; save network.state_dict()")


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the ``module.`` that DataParallel and DistributedDataParallel put before every name."""
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _check_card(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Warn if the ``model.json`` beside a run's last weights names other weights by its hash."""
    card = file.with_name("model.json")
    if file.name != "model.safetensors" or not card.is_file():
        return
    expected = read_json(card).get("weights_sha256")
    if expected is not None and tensors_hash(tensors) != expected:
        warnings.warn(
            f"{file} does not hold the weights that {card} describes: one of them was changed, or copied alone",
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
        f"{len(keys)} {kind}: {listed(keys)}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", [f"{name} {given[name]} instead of {own[name]}" for name in wrong]),
        )
        if keys
    ]
    raise ValueError(
        f"{file} does not fit {type(network).__name__} ({len(given)} tensors for {len(own)}): {'; '.join(problems)}. "
        "Are they the weights of another network?"
    )


def _check_kinds(network: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise ``ValueError`` for tensors that cannot be copied, or only as other numbers: sparse, complex and so on."""
    for name, own in network.state_dict().items():
        given = tensors[name]
        plain = given.layout is torch.strided and given.device.type == "cpu" and not given.is_quantized
        if not plain or own.is_floating_point() != given.is_floating_point() or own.is_complex() != given.is_complex():
            kind = str(given.dtype).removeprefix("torch.") if plain else f"{given.layout}, {given.device}"
            raise ValueError(f"{file}: {name} is {kind}, the network has {str(own.dtype).removeprefix('torch.')}")


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's state dict as safetensors; the file is replaced at once, so that readers see all or nothing."""
    save_tensors(network.state_dict(), user_path(path))


def save_tensors(named: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write named tensors as safetensors; the file is replaced at once."""
    replace_file(path, serialise(named))


def serialise(named: Mapping[str, Tensor]) -> bytes:
    """Return tensors as a safetensors file whose header holds their hash. Equal tensors give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    plain = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    # Write the header here: the library puts several keys of metadata in a random order.
    header = {"__metadata__": {"format": "pt", "sha256": tensors_hash(tensors)}} | json.loads(plain[8:start])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[start:]


# ---- hashes ----------------------------------------------------------------------------------------------------------


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 (hex) of a state dict: names, dtypes, shapes and bytes, in the order of the names."""
    return tensors_hash(network.state_dict())


def tensors_hash(named: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of named tensors, as :func:`weights_hash` does for a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
