"""The networks of a run: as other tools leave them, and what is said where they cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.runs.own import DIGITS
from vrm import config
from vrm.config import ConfigError
from vrm.models import create, weights_hash
from vrm.runs.networks import load_network


def teacher(weights: Path, key: str | None = None) -> config.Teacher:
    return config.Teacher(name="resnet8", weights=weights, weights_key=key)


def test_a_file_with_raw_and_averaged_weights_names_the_setting_that_chooses(tmp_path: Path) -> None:
    raw, average = create("resnet8", num_classes=10), create("resnet8", num_classes=10)
    averaged = {"n_averaged": torch.tensor(1)} | {f"module.{n}": t for n, t in average.state_dict().items()}
    torch.save({"model": raw.state_dict(), "model_ema": averaged}, tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match=r"give teacher\.weights_key=model or teacher\.weights_key=model_ema"):
        load_network(teacher(tmp_path / "w.ckpt"), DIGITS, role="teacher")
    for key, expected in (("model", raw), ("model_ema", average)):
        loaded = load_network(teacher(tmp_path / "w.ckpt", key), DIGITS, role="teacher")
        assert weights_hash(loaded.network) == weights_hash(expected)
    told = f"teacher.weights={tmp_path / 'w.ckpt'}: the entry 'model_ema'; names without 'module.'; left out n_averaged"
    assert loaded.notes == (told,)


def test_a_network_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match=r"teacher=resnet8: .*w\.ckpt does not fit ResNet"):
        load_network(teacher(tmp_path / "w.ckpt"), DIGITS, role="teacher")
