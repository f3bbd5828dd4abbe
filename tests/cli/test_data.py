"""vrm data: what is found, packs made, gone on with, checked and trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_cli import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders of pictures of two sizes."""
    root = tmp_path / "pictures"
    for split, count in (("train", 8), ("test", 4)):
        for number in range(count):
            file = root / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(number).integers(0, 256, (10, 12 + number % 2, 3), dtype=np.uint8)
            Image.fromarray(values).save(file)
    return root


def test_a_pack_is_made_checked_and_trained_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = tmp_path / "pack"
    words = ["data", "folder", f"data.root={pictures}", "data.size=8", "data.workers=0", f"pack={pack}"]
    assert run(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert "2 shards made" in told
    assert "8x8" in told
    assert not (tmp_path / "cache").exists(), "files are decoded as they are written"
    assert run(monkeypatch, *words) == 0
    assert "the pack is whole already" in capsys.readouterr().out
    assert run(monkeypatch, "data", "packed", f"data.root={pack}") == 0
    assert "all 2 shards are whole" in capsys.readouterr().out

    weights = []
    for number, data in enumerate(
        (
            ["data=packed", f"data.root={pack}"],
            ["data=folder", f"data.root={pack}", "data.placement=device"],
            ["data=folder", f"data.root={pictures}", "data.size=8", "data.placement=stream", "data.workers=0"],
            ["data=folder", f"data.root={pictures}", "data.size=8", "data.placement=host"],
        )
    ):
        folder = tmp_path / f"run{number}"
        few = ["model=resnet8", "epochs=1", "batch_size=4", "threads=1", f"run={folder}"]
        assert run(monkeypatch, "train", "digits", *data, *few) == 0
        capsys.readouterr()
        weights.append((folder / "metrics.jsonl").read_bytes())
    assert weights.count(weights[0]) == 4

    shard = pack / "train-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-30] ^= 1
    shard.write_bytes(content)
    assert run(monkeypatch, "data", "packed", f"data.root={pack}") == 2
    assert "train-00000.safetensors is damaged: 1 of 2 shards are" in capsys.readouterr().err
    assert run(monkeypatch, *words) == 0
    assert "1 shards made" in capsys.readouterr().out


def test_data_without_files_are_packed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "data", "digits", "data.views=none", f"pack={tmp_path / 'pack'}") == 0
    assert run(monkeypatch, "data", "packed", f"data.root={tmp_path / 'pack'}") == 0
    told = capsys.readouterr().out
    assert "1,438" in told
    assert "views: none;" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "folder"], "folder needs data.root=FOLDER"),
        (["data", "foldr"], "unknown recipe 'foldr'"),
        (["data", "folder", "data.rot=x"], "unknown key 'data.rot'.*'root'"),
        (["data", "folder", "pack="], "give pack=FOLDER once"),
        (["data", "digits", "pack=a", "pack=b"], "give pack=FOLDER once"),
        (["data", "digits", "pack=pictures"], "holds test, train; name an empty folder"),
        (["data", "folder", "data.root=pictures", "pack=new"], r"but all images must be 10 x 1[23] .*data\.size=N"),
        (["data", "packed", "data.root=pictures"], "no packed images in pictures"),
        (["data", "digits", "data.placement=stream"], "these data lie otherwise"),
        (["data", "folder", "data.root=pictures", "data.views=flip"], r"data\.views=flip: unknown view policy"),
    ],
)
def test_mistakes_are_explained(
    words: list[str],
    message: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words, *["data.workers=0"] * any(w.startswith("pack=new") for w in words)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
