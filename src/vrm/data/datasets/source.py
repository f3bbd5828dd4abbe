"""What is known of a data set that can be loaded by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vrm.data.datasets.download import Remote
from vrm.data.formats.layout import Found
from vrm.data.stores.dataset import ChannelValues


@dataclass(frozen=True)
class Source:
    """A data set that can be loaded by name.

    ``title``: its name in words. ``layouts``: what its folder must hold, or where the data come from. ``find`` returns
    what is in the folder ``data.root`` (``None`` if none was named), or ``None`` if nothing of this data set is.
    ``statistics``: the literature's mean and standard deviation of each channel; without, they are measured on the
    train split. ``remote``: where it can be downloaded.
    """

    title: str
    layouts: str
    view_policy: str
    find: Callable[[Path | None], Found | None]
    statistics: tuple[ChannelValues, ChannelValues] | None = None
    remote: Remote | None = None
