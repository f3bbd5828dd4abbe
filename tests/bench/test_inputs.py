"""Images and teachers that are made up where none are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vrm import models
from vrm.bench.inputs import load_images, make_images, with_weights
from vrm.bench.subjects import resolve_run
from vrm.config import ConfigError

from .small import QUIET, settings


def test_made_up_images_differ_and_have_every_class() -> None:
    store = make_images(300, 10, 12)
    assert store.images.shape == (300, 3, 12, 12)
    assert torch.equal(store.targets.bincount(), torch.full((10,), 30))
    means = store.images.float().mean((2, 3))
    assert len(torch.unique(store.images.flatten(1), dim=0)) == 300
    assert float(means.std(0).min()) > 10
    assert torch.equal(store.images, make_images(300, 10, 12).images)


def test_made_up_data_are_those_of_the_recipe() -> None:
    run = resolve_run("cifar100", ["pair=resnet8/resnet8"], "kd")
    chosen = settings("samples=500")
    data = load_images(run.data, chosen, QUIET)
    assert (len(data.train), data.num_classes, data.image_size, data.view_policy) == (500, 100, (32, 32), "cifar")
    wider = run.data.model_copy(update={"size": 20, "labels_per_class": 2})
    data = load_images(wider, settings("samples=60", "classes=7"), QUIET)
    assert (len(data.train), data.num_classes, data.image_size) == (14, 7, (20, 20))
    cropped = run.data.model_copy(update={"views": "imagenet", "size": 256})
    assert load_images(cropped, settings("samples=3", "classes=3"), QUIET).image_size == (224, 224)
    with pytest.raises(ConfigError, match="has only"):
        load_images(wider, settings("samples=10", "classes=7"), QUIET)
    with pytest.raises(ConfigError, match=r"data\.root"):
        load_images(run.data.model_copy(update={"name": "folder"}), settings(), QUIET)
    assert load_images(run.data.model_copy(update={"name": "folder"}), settings("classes=3", "samples=9"), QUIET)


def test_a_random_teacher_has_different_finite_logits(tmp_path: Path) -> None:
    run = resolve_run("cifar100", ["pair=resnet20/resnet8"], "kd")
    data = load_images(run.data, settings("samples=64"), QUIET)
    teacher = with_weights(run.teacher, data, tmp_path)  # type: ignore[arg-type]
    network = models.create("resnet20", num_classes=100)
    assert teacher.weights is not None
    models.load_weights(network, teacher.weights)
    logits = network.eval()(models.Preprocess(data.mean, data.std)(data.train.images)).detach()
    assert torch.isfinite(logits).all()
    assert 0.1 < float(logits.std(0).mean()) < 100
    assert with_weights(teacher, data, tmp_path) is teacher
