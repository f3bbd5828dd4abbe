"""Knowledge distillation for PyTorch: virtual relation matching, and the methods it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vrm.runs.api import distill

__all__ = ["distill"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first asked for: ``import vrm`` itself loads nothing heavy."""
    if name == "distill":
        from vrm.runs.api import distill

        return distill
    raise AttributeError(f"module 'vrm' has no attribute {name!r}")
