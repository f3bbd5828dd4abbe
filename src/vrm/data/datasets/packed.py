"""The data set in a pack, its images left in their files."""

from __future__ import annotations

from pathlib import Path

from vrm.data.datasets.source import Source
from vrm.data.formats.layout import shown
from vrm.data.formats.pack import MANIFEST, DamagedPack, Manifest, shard_file
from vrm.data.stores.base import check_classes
from vrm.data.stores.dataset import DataSet
from vrm.data.stores.host import HostStore
from vrm.data.stores.pack import RowsInPack
from vrm.wording import counted

PACKED = Source(
    "packed images",
    f"{MANIFEST} and its shards, as vrm data RECIPE .. pack=FOLDER makes them",
    "cifar",
    lambda root: None,
)


def open_pack(folder: Path | str, *, views: str | None = None) -> DataSet:
    """Open the data set in a pack. Raise ``ValueError`` if the pack is unfinished or damaged.

    ``views`` names the view policy to be used, if not the data's own.
    """
    folder = Path(folder).expanduser()
    manifest = Manifest.read(folder)
    stores = []
    for name, split in manifest.splits.items():
        if not split.hash:
            made = sum(sha256 is not None for each in manifest.splits.values() for sha256 in each.sha256)
            total = sum(len(each.sha256) for each in manifest.splits.values())
            raise ValueError(
                f"the pack in {shown(folder)} is unfinished ({made} of {counted(total, 'shard')} made); repeat the "
                "command that began it: it goes on where it stopped"
            )
        rows = RowsInPack(folder, name, split, manifest.size)
        try:
            check_classes(rows.targets, manifest.classes)
        except ValueError as error:
            raise DamagedPack(shard_file(folder, name, 0), f"of the {name} images, {error}") from None
        stores.append(HostStore(rows, rows.targets, manifest.classes, split.skipped))
    train, test = stores
    return DataSet(manifest.name, train, test, manifest.mean, manifest.std, views or manifest.view_policy)


def load_packed(name: str, folder: Path, *, size: int | None, views: str | None) -> DataSet:
    """Open a pack as the data set ``name``. Raise ``ValueError`` if it is another, or of another size."""
    data = open_pack(folder, views=views)
    if name not in ("packed", data.name):
        raise ValueError(
            f"data.root={folder} is a pack of {data.name}, not of {name}; give data={data.name} or data=packed"
        )
    height, width = data.train.stored_size
    if size is not None and (height, width) != (size, size):
        raise ValueError(
            f"data.size={size}, but the images in {folder} are packed at {height} x {width} pixels; leave it out, or "
            "pack the data again at another size"
        )
    return data
