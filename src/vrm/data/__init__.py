"""Data sets: the formats they come in, the stores that keep their images, the views (augmentations) made of them."""

from vrm.data.datasets.load import SOURCES, load
from vrm.data.datasets.own import from_dataset
from vrm.data.errors import BadData
from vrm.data.stores.base import Store, describe_spread
from vrm.data.stores.dataset import DataSet, channel_statistics, epoch_batches, epoch_order
from vrm.data.stores.memory import ImageStore
from vrm.data.stores.placement import place
from vrm.data.views.policies import view_policy

__all__ = [
    "SOURCES",
    "BadData",
    "DataSet",
    "ImageStore",
    "Store",
    "channel_statistics",
    "describe_spread",
    "epoch_batches",
    "epoch_order",
    "from_dataset",
    "load",
    "place",
    "view_policy",
]
