"""What errors, tables and progress lines are made of: the nearest name, and quantities in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LISTED = 40
"""Names beyond this many are counted instead of listed."""


def closest(word: str, allowed: Iterable[str], similarity: float = 0.5) -> list[str]:
    """Return up to three of ``allowed`` that resemble ``word`` by at least ``similarity``, the most similar first."""
    by_lower = {name.lower(): name for name in sorted(allowed)}
    return [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=similarity)]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``did you mean 'a'?`` with up to three of ``allowed`` that resemble ``word``, else what is allowed."""
    names = sorted(set(allowed))
    if quoted := [repr(name) for name in closest(word, names)]:
        return f"did you mean {', '.join(quoted[:-1])}{' or ' * (len(quoted) > 1)}{quoted[-1]}?"
    if len(names) > _LISTED:
        return f"none of the {len(names):,} known names resembles it"
    return f"allowed: {', '.join(names)}" if names else "there is none"


def listed(items: Iterable[object], *, limit: int = 5) -> str:
    """Return ``a, b and 3 more``: at most ``limit`` items, and how many are left out."""
    texts = [str(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit:,} more"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 thread``, ``2,000 threads``: a number with its noun in the right form."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def bytes_in_words(count: float) -> str:
    """Return a size in decimal units with three digits: ``17 B``, ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds_in_words(seconds: float) -> str:
    """Return a duration in the unit that suits it: ``0.4 s``, ``12 min``, ``3.1 h``."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def shape_in_words(shape: Sequence[int]) -> str:
    """Return ``64x32x32`` for ``(64, 32, 32)``."""
    return "x".join(map(str, shape))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
