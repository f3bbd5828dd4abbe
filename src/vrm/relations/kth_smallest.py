"""The k-th smallest of many values, exactly: in memory, or of values that are spread over tiles and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from vrm.relations.vertices import tile_size

# Up to this many values `kthvalue` is fast enough on a CPU; above, NumPy's `partition` is ten times as fast.
FEW_VALUES = 1 << 13
# Above this many values a CPU first searches near the k-th smallest of a sample, and a GPU sorts.
MANY_VALUES = 1 << 15
# The sample is every 127th value.
SAMPLE_STRIDE = 127


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value, a scalar, counting from 1."""
    if values.is_cuda and (len(values) > MANY_VALUES or torch.are_deterministic_algorithms_enabled()):
        # On CUDA kthvalue runs in one block of threads whatever the number of values, and has no deterministic mode.
        return values.sort().values[k - 1]
    if values.device.type != "cpu" or len(values) <= FEW_VALUES or torch.compiler.is_compiling():
        return values.kthvalue(k).values
    found = search_near_sample(values, k) if len(values) > MANY_VALUES else None
    return _partition(values.clone(), k) if found is None else found


# NumPy vectorises selection and comparison on a CPU, where PyTorch does not: ten and three times as fast.


def _partition(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest value; the values are reordered in place."""
    values.numpy().partition(k - 1)
    return values[k - 1]


def _less_than(values: Tensor, bound: float) -> Tensor:
    return torch.from_numpy(values.numpy() < bound)


def search_near_sample(values: Tensor, k: int) -> Tensor | None:
    """Search the k-th smallest among values close to that of a sample; return None if it is not among them."""
    sample = values[::SAMPLE_STRIDE].clone()
    expected = max(1, round(k / len(values) * len(sample)))
    pivot = float(_partition(sample, expected))
    below_pivot = _less_than(values, pivot)
    num_below = int(below_pivot.count_nonzero())
    # The distance from the pivot in ranks of the sample, and a bound four standard deviations beyond it.
    distance = (k - num_below - 0.5) / SAMPLE_STRIDE
    bound = expected + round(distance + math.copysign(4 * math.sqrt(abs(distance)) + 4, distance))
    beyond = -math.inf if bound < 1 else math.inf
    other = float(_partition(sample, bound)) if 1 <= bound <= len(sample) else beyond

    # Compare flags eight at a time, as 64-bit words W. Candidates are all eights with a value between pivot and bound,
    # and the values after the last whole word.
    whole = len(values) // 8 * 8
    flags_W, flags_of_other_W = (x[:whole].view(torch.int64) for x in (below_pivot, _less_than(values, other)))
    eights = (flags_W ^ flags_of_other_W).nonzero()[:, 0]
    candidates = torch.cat([values[:whole].view(-1, 8).index_select(0, eights).flatten(), values[whole:]])
    rank = k - num_below + int((candidates < pivot).count_nonzero())
    if not 1 <= rank <= len(candidates):
        return None
    found = _partition(candidates, rank)
    return found if min(pivot, other) <= found < max(pivot, other) else None


def kth_smallest_of_tiles(
    tiles: Callable[[], Iterable[Tensor]], k: int, like: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the k-th smallest of values that are never all in memory: those of all tiles and all processes.

    This is a radix select: each pass over ``tiles()`` counts 16 bits, starting from the highest. It takes two passes in
    float32 and four in float64. ``like`` gives their dtype and device.
    """
    integer, num_bits = (torch.int32 if like.dtype == torch.float32 else torch.int64), 8 * like.itemsize
    key = torch.zeros((), dtype=torch.int64, device=like.device)  # the high bits of the k-th smallest, as far as known
    rank = torch.full_like(key, k)
    for shift in range(num_bits - 16, -1, -16):
        counts = key.new_zeros(1 << 16)
        for values in (part for tile in tiles() for part in torch.split(tile.flatten(), tile_size(like.device))):
            keys = _ordered(values.view(integer)) >> shift
            if shift == num_bits - 16:
                digits, counted = keys.long() + (1 << 15), torch.ones_like(keys)  # signed
            else:
                digits, counted = keys.long() & 0xFFFF, keys >> 16 == key
            counts.scatter_add_(0, digits, counted.long())
        if group is not None:
            dist.all_reduce(counts, group=group)
        up_to = counts.cumsum(0)
        below = up_to < rank
        rank -= torch.where(below, up_to, 0).amax()
        key = below.sum() - (1 << 15) if shift == num_bits - 16 else (key << 16) + below.sum()
    return _ordered(key.to(integer)).view(like.dtype)


def _ordered(bits: Tensor) -> Tensor:
    """Map the bits of floats to integers of the same order, and back. Negative floats descend as their bits grow."""
    return bits ^ (bits >> (bits.itemsize * 8 - 1) & torch.iinfo(bits.dtype).max)
