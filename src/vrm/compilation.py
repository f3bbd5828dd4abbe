"""Options of ``torch.compile`` under which compiled code computes what the source says."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compile_options() -> dict[str, Any]:
    """Return the options for the default backend of ``torch.compile``.

    Without ``emulate_precision_casts`` the compiler fuses multiplications with additions, which changes bytes of views
    and the last bits of losses. Some versions of PyTorch do not pass this on to Triton, so its environment variable is
    set as well, unless the user has set it. Without ``constant_and_index_propagation=False`` Triton refuses kernels in
    which the 64-bit factors of random draws meet 32-bit indices.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
    return {"emulate_precision_casts": True, "constant_and_index_propagation": False}


def constant(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Cache a function's results as ``functools.cache`` does; compiled callers treat them as constants."""
    kept = cache(function)

    @wraps(function)
    def constant(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return kept(*args, **kwargs)  # type: ignore[arg-type]

    # The same as torch.compiler.assume_constant_result, without importing the compiler.
    vars(constant)["_dynamo_marked_constant"] = True
    return constant
