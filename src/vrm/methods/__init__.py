"""Distillation methods, one file each: the name of the file is the name of the method.

Files that begin with ``_`` are not methods. Other packages add theirs by the entry-point group ``vrm.methods``, whose
entries point at a :class:`~vrm.contract.Method` class or at its module.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from vrm.contract import Method
from vrm.wording import nearest


@cache
def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="vrm.methods")}


def names() -> tuple[str, ...]:
    """Return the names of all methods in alphabetical order, without importing them."""
    own = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return tuple(sorted({*own, *_registered()}))


def _class_in(module: ModuleType) -> type[Method]:
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{module.__name__} must define exactly one Method, found {[c.__name__ for c in found]}")
    return found[0]


def load(name: str) -> type[Method]:
    """Return the class of a method. Raise ``ValueError`` with the nearest names if there is no such method."""
    if name not in names():
        raise ValueError(f"unknown method {name!r}; {nearest(name, names())} (`vrm methods` lists all)")
    registered = _registered().get(name)
    found = registered.load() if registered else importlib.import_module(f"{__name__}.{name}")
    return _class_in(found) if isinstance(found, ModuleType) else found


def options(method: type[Method]) -> Mapping[str, inspect.Parameter]:
    """Return the typed options of a method by name: the signature of its ``__init__``."""
    return {
        name: parameter
        for name, parameter in inspect.signature(method, eval_str=True).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def published(method: type[Method], data: str, pair: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the published settings for a data set and a pair, the general first, each with its source.

    A source reads ``cifar100/*`` or ``cifar100/resnet56/resnet20``.
    """
    for key in ("*", pair):
        settings = method.published.get(data, {}).get(key) if key is not None else None
        if settings is not None:
            yield f"{data}/{key}", settings
