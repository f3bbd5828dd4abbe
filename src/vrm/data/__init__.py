"""Data sets, image stores and the views (augmentations) that belong to them."""

from vrm.data.feed import place
from vrm.data.sources import SOURCES, from_dataset, load
from vrm.data.store import BadData, DataSet, ImageStore, Store, channel_statistics, epoch_batches, epoch_order
from vrm.data.views import view_policy

__all__ = [
    "SOURCES",
    "BadData",
    "DataSet",
    "ImageStore",
    "Store",
    "channel_statistics",
    "epoch_batches",
    "epoch_order",
    "from_dataset",
    "load",
    "place",
    "view_policy",
]
