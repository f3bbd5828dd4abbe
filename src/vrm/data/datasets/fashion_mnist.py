"""Fashion-MNIST: 70,000 grey pictures of clothes."""

from __future__ import annotations

from pathlib import Path

from vrm.data.datasets.download import Remote, RemoteFile
from vrm.data.datasets.source import Source
from vrm.data.formats.idx import read_idx
from vrm.data.formats.layout import Found

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""The folder of Debian's package ``dataset-fashion-mnist``."""

_ZALANDO = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
_REMOTE = Remote(
    "FashionMNIST/raw",  # torchvision's folder
    tuple(
        RemoteFile(f"{_ZALANDO}{name}-ubyte.gz", sha256, num_bytes)
        for name, sha256, num_bytes in (
            ("train-images-idx3", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
            ("train-labels-idx1", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
            ("t10k-images-idx3", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
            ("t10k-labels-idx1", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
        )
    ),
)


def find_fashion_mnist(root: Path | None) -> Found | None:
    """Read the IDX files in ``root``; if none was named, in Debian's folder."""
    if root is None and DEBIAN_FOLDER.is_dir():
        root = DEBIAN_FOLDER
    if root is None:
        return None
    return read_idx(root, folders=(_REMOTE.folder, "raw"), classes=FASHION_MNIST_CLASSES)


FASHION_MNIST = Source(
    "Fashion-MNIST",
    "the IDX files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-.., gzipped or not, as Debian's package "
    "dataset-fashion-mnist has them, or torchvision's folder FashionMNIST/raw "
    "(torchvision.datasets.FashionMNIST(root, download=True) makes it)",
    "cifar",
    find_fashion_mnist,
    ((0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530)),
    _REMOTE,
)
