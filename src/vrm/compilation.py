"""What ``torch.compile`` has to be told, so that compiled code computes what is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def exact() -> dict[str, Any]:
    """Options of the default backend of ``torch.compile``.

    Without ``emulate_precision_casts`` it fuses multiplications with additions, which changes bytes of views and last
    bits of losses. Triton itself is told, too, for this process, as some versions of PyTorch do not pass that on.
    Without the other 64-bit factors of draws meet 32-bit indices, which Triton refuses.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
    return {"emulate_precision_casts": True, "constant_and_index_propagation": False}


def constant(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes each result once, as ``functools.cache`` does, and compiled callers hold it as a constant."""
    kept = cache(function)

    @wraps(function)
    def constant(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return kept(*args, **kwargs)  # type: ignore[arg-type]

    # What torch.compiler.assume_constant_result does, without importing the compiler.
    vars(constant)["_dynamo_marked_constant"] = True
    return constant
