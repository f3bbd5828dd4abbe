"""Knowledge distillation for PyTorch: virtual relation matching, and the methods it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vrm.runs.api import distill

    __version__: str

__all__ = ["__version__", "distill"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import vrm`` itself loads nothing heavy."""
    if name == "distill":
        from vrm.runs.api import distill

        return distill
    if name == "__version__":
        from importlib.metadata import version

        return version("vrm")
    raise AttributeError(f"module 'vrm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
