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


def published_tables(method: type[Method]) -> Iterator[tuple[str, str, Mapping[str, Mapping[str, Any]]]]:
    """Yield each table of published settings: data set, condition (``base=dkd``, or empty), and settings by pair."""
    for data, table in method.published.items():
        yield data, "", {pair: settings for pair, settings in table.items() if "=" not in pair}
        for condition, below in table.items():
            if "=" in condition:
                yield data, condition, below


def published(
    method: type[Method], data: str, pair: str | None, chosen: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the published settings for a data set and a pair, the general first, each with its source.

    A source reads ``cifar100/*``, ``cifar100/resnet56/resnet20`` or ``cifar100/base=dkd/*``. The last applies if the
    option has this value among the ``chosen`` ones, or by default.
    """
    values = {name: option.default for name, option in options(method).items()} | dict(chosen or {})
    for of_data, condition, table in published_tables(method):
        option, _, value = condition.partition("=")
        if of_data == data and (not condition or values[option] == value):
            for key in ("*", pair):
                if key is not None and key in table:
                    yield "/".join(filter(None, (data, condition, key))), table[key]
