"""vrm data: what is found, packs made, gone on with, checked and trained on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
    assert "4 images each" in told
    assert not (tmp_path / "cache").exists(), "files are decoded as they are written"
    assert run(monkeypatch, *words) == 0
    assert "the pack is complete already" in capsys.readouterr().out
    assert run(monkeypatch, "data", "packed", f"data.root={pack}") == 0
    assert "all 2 shards are undamaged" in capsys.readouterr().out

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
    assert "1 shard made" in capsys.readouterr().out


def test_the_folders_that_were_taken_are_told(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "test").rename(pictures / "valid")
    (pictures / "test").mkdir()
    (pictures / "valid" / "b" / "1.png").unlink()
    assert run(monkeypatch, "data", "folder", f"data.root={pictures}", "data.size=8") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"trained on train/ and evaluated on valid/ of {pictures}; not used: test/" in told
    assert "from 1 image (b) to 2 (a)" in told


def test_data_without_files_are_packed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "data", "digits", "data.views=none", f"pack={tmp_path / 'pack'}") == 0
    assert run(monkeypatch, "data", "packed", f"data.root={tmp_path / 'pack'}") == 0
    told = capsys.readouterr().out
    assert "1,438" in told
    assert "views: none; mean (0.3054, 0.3054, 0.3054); std (0.3759, 0.3759, 0.3759)" in told
    assert run(monkeypatch, "data", "digits", "data.views=cifar") == 0
    assert "views: cifar;" in capsys.readouterr().out


def test_who_asks_for_a_pack_is_told_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "data", "pack", "data.root=pictures") == 2
    assert "vrm data folder data.root=PATH data.size=256 pack=FOLDER" in " ".join(capsys.readouterr().err.split())


def test_a_streamed_run_stopped_by_a_signal_to_all_goes_on_with_other_workers(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler or Ctrl-C sends it: to the workers too, which leave it to the process that trains."""
    words = ["train", "digits", "data=folder", f"data.root={pictures}", "data.size=8", "data.placement=stream"]
    words += ["model=resnet8", "epochs=100", "batch_size=4", "threads=1", "schedule.name=step"]
    command = [
        sys.executable,
        "-c",
        "from vrm.cli import main; main()",
        *words,
        "data.workers=2",
        "checkpoint.every=1000",
    ]
    with subprocess.Popen(
        [*command, f"run={tmp_path / 'stopped'}"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 3/"):
                os.killpg(process.pid, signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait(120) == 75
    settings = tmp_path / "stopped" / "config.yaml"
    settings.write_text(settings.read_text().replace("workers: 2", "workers: 0"))
    assert run(monkeypatch, "resume", str(tmp_path / "stopped")) == 0
    assert run(monkeypatch, *words, "data.workers=0", "checkpoint.every=1000", f"run={tmp_path / 'whole'}") == 0
    folders = [tmp_path / "stopped", tmp_path / "whole"]
    one, other = ((folder / "metrics.jsonl").read_bytes() for folder in folders)
    assert one == other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "folder"], "folder needs data.root=FOLDER"),
        (["data", "foldr"], "unknown recipe or data set 'foldr'; did you mean 'folder'"),
        (["data", "folder", "data.rot=x"], "unknown key 'data.rot'.*'data.root'"),
        (["data", "folder", "pack="], "give pack=FOLDER once"),
        (["data", "digits", "pack=a", "pack=b"], "give pack=FOLDER once"),
        (["data", "digits", "pack=pictures"], "holds test, train; name an empty folder"),
        (["data", "folder", "data.root=pictures", "pack=new"], r"but all images must be 10x1[23] .*data\.size=N"),
        (["data", "packed", "data.root=pictures"], "no packed images in pictures"),
        (["data", "digits", "data.placement=stream"], "these data are kept otherwise"),
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
