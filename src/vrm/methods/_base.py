"""The base of a method that changes the logits which another method compares (LSKD, SDD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vrm import methods
from vrm.contract import RowLoss
from vrm.wording import nearest


def build_base(name: str, options: Mapping[str, Any]) -> RowLoss:
    """Return the method ``name`` with its options, whose distillation loss is a mean over rows of logits.

    Raise ``ValueError`` for another method, or for options that it has not or that have no effect.
    """
    method = methods.load(name)
    allowed = methods.options(method)
    if unknown := sorted(options.keys() - allowed.keys()):
        raise ValueError(f"base_options: {name} has no option {unknown[0]!r}; {nearest(unknown[0], allowed)}")
    base = method(**options)
    if not isinstance(base, RowLoss):
        fitting = [other for other in methods.names() if hasattr(methods.load(other), "row_loss")]
        raise ValueError(f"base={name} compares more than single rows of logits; give one of {', '.join(fitting)}")
    for option, reason in base.unused_options().items():
        if option in options:
            raise ValueError(f"base_options.{option}={options[option]} has no effect: {reason}; leave it out")
    return base
