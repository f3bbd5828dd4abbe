"""Data that go bad while a run trains: one sentence, no worker left, and nothing that was learned is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vrm.data import BadData, DataSet, load
from vrm.data.formats.images import BadImage
from vrm.data.formats.pack import DamagedPack
from vrm.data.stores.decoding import DecodingError
from vrm.data.stores.pack import write_pack
from vrm.runs.errors import RunError
from vrm.runs.trainer import Trainer

from .own import Net, checked, own
from .small import assert_same, final_state, go_on, opened


def tree(root: Path, count: int = 20) -> Path:
    """Two classes of small images of noise."""
    noise = np.random.default_rng(0)
    for split, number in (("train", count), ("test", 6)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    return root


def streamed(root: Path) -> DataSet:
    return load("folder", root=root, placement="stream", num_workers=0)


def go(run: Path, dataset: DataSet, *, at: int = -1, then: Callable[[], object] = lambda: None) -> None:
    """Train two epochs of eight steps; ``then`` happens before step ``at``."""
    torch.manual_seed(0)
    assembly = own(run, Net(2, dropout=0.2), None, dataset=dataset, batch_size=5, log_every=3)
    with opened(assembly) as trainer:
        original = trainer._set_rate

        def rate(*arguments: object) -> None:
            original(*arguments)
            if trainer.state.step == at:
                then()

        trainer._set_rate = rate
        go_on(trainer)


@pytest.mark.parametrize(("place", "step"), [("train/b/07.png", 9), ("test/b/03.png", 10), ("test/a/00.png", 3)])
@pytest.mark.parametrize("damage", ["cut off", "of another size"])
def test_an_image_that_goes_bad_ends_a_run_that_goes_on_once_it_is_back(
    place: str, step: int, damage: str, tmp_path: Path
) -> None:
    root = tree(tmp_path / "data")
    go(tmp_path / "whole", streamed(root))
    file = root / place
    good = file.read_bytes()

    def spoil() -> None:
        if damage == "cut off":
            file.write_bytes(good[:50])
        else:
            Image.new("RGB", (9, 8)).save(file)

    words = rf"{place}: no readable image" if damage == "cut off" else rf"{place} is 8x9 pixels, but all .*data\.size"
    with pytest.raises(BadData, match=words) as caught:
        go(tmp_path / "run", streamed(root), at=step, then=spoil)
    assert caught.value.exit_code == 1
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert int(newest.name.removeprefix("step-")) >= (step if place.startswith("train") else -(-step // 8) * 8)
    file.write_bytes(good)
    go(tmp_path / "run", streamed(root))
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_before_the_first_step_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint would tie the run to the damaged data."""
    root = tree(tmp_path / "data")
    data = streamed(root)
    monkeypatch.setattr(Trainer, "_check", lambda self: (root / "train/a/00.png").write_bytes(b""))
    monkeypatch.setattr("vrm.runs.trainer.epoch_batches", lambda *a, **k: (torch.arange(5),) * 8)
    with pytest.raises(BadImage):
        go(tmp_path / "run", data)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_checks_before_a_run_name_the_image(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", count=60)
    data = streamed(root)
    bad = root / "train" / "b" / "59.png"
    bad.write_bytes(b"")
    report = checked(own(tmp_path / "run", Net(2), None, dataset=data, batch_size=120))
    assert [row.name for row in report.failures] == ["one step"]
    with pytest.raises(RunError, match=r"forward and backward: .*b/59\.png: no readable image.*leave it out"):
        report.require()
    for file in (root / "test" / "b").iterdir():
        file.write_bytes(b"")
    bad.write_bytes((root / "train" / "b" / "58.png").read_bytes())
    (root / "test" / "b" / "00.png").write_bytes(b"")
    found = checked(own(tmp_path / "run", Net(2), Net(2), dataset=data, batch_size=4))
    assert {row.name for row in found.failures} == {"test data"}
    assert all("test/b/00.png: no readable image (ValueError: the file is empty)" in row.text for row in found.failures)


def test_a_damaged_pack_ends_a_run_in_one_sentence(tmp_path: Path) -> None:
    data = load("folder", root=tree(tmp_path / "data", count=60), placement="stream", num_workers=0, views="none")
    write_pack(data, tmp_path / "pack")
    data = load("packed", root=tmp_path / "pack")
    file = tmp_path / "pack" / "train-00000.safetensors"

    def flip() -> None:
        with file.open("r+b") as stream:  # the last image, which no check before the run looks at
            stream.seek(-1, 2)
            byte = stream.read(1)[0]
            stream.seek(-1, 1)
            stream.write(bytes([byte ^ 1]))

    flip()
    with pytest.raises(DamagedPack, match=r"train-00000.*image 119 differs; repeat the command") as caught:
        go(tmp_path / "run", data)
    assert caught.value.exit_code == 1
    assert final_state(tmp_path / "run")


@pytest.mark.parametrize("kind", [BadImage("x", "y"), DamagedPack(Path("x"), "y"), DecodingError("x")])
def test_every_kind_is_told_in_a_sentence(kind: Exception) -> None:
    assert kind.exit_code == 1
