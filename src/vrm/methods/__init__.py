"""Distillation methods, one a file: a method's name is its file's name.

Files that begin with ``_`` are no methods. Other packages add theirs through the entry-point group
``vrm.methods``, whose names point at a :class:`~vrm.contract.Method` class or at its module.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from vrm.contract import Method


def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="vrm.methods")}


def names() -> tuple[str, ...]:
    """The names of all methods, in alphabetical order. Imports none of them."""
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
    """The class of a method. ``ValueError`` for an unknown name, with the near ones."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ValueError(f"unknown method {name!r}; nearest: {', '.join(near)}. `vrm methods` lists all.")
    registered = _registered().get(name)
    found = registered.load() if registered else importlib.import_module(f"{__name__}.{name}")
    return _class_in(found) if isinstance(found, ModuleType) else found


def options(method: type[Method]) -> Mapping[str, inspect.Parameter]:
    """The typed options of a method: the signature of its ``__init__``."""
    return {
        name: parameter
        for name, parameter in inspect.signature(method, eval_str=True).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def published(method: type[Method], data: str, pair: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Published settings that apply, the general first, each with its source (``"cifar100/*"``)."""
    for key in ("*", pair):
        settings = method.published.get(data, {}).get(key) if key is not None else None
        if settings is not None:
            yield f"{data}/{key}", settings
