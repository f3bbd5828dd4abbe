"""Data sets, image stores and the views (augmentations) that belong to them."""

from vrm.data.datasets.sources import SOURCES, from_dataset, load
from vrm.data.stores.host import place
from vrm.data.stores.store import BadData, DataSet, ImageStore, Store, channel_statistics, epoch_batches, epoch_order
from vrm.data.views.policies import view_policy

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
