"""The frozen teacher, and the road from bytes to a network's own normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vrm.models import FrozenTeacher, Preprocess, TappedNetwork, check_separate, create

VIEWS = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def test_teacher_never_changes() -> None:
    network = create("resnet8", num_classes=10)
    before = copy.deepcopy(network.state_dict())
    teacher = FrozenTeacher(TappedNetwork(network, ("stage1",), Preprocess(MEAN, STD)))
    holder = nn.ModuleList([teacher]).train()
    outputs = holder[0](VIEWS)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not outputs.logits.requires_grad
    assert not outputs.taps["stage1"].requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_batch_statistics_are_those_of_train_mode_and_move_nothing() -> None:
    """Dropout drops nothing; afterwards the teacher is as before. Compiled too."""
    network = nn.Sequential(create("resnet8", num_classes=10), nn.BatchNorm1d(10), nn.Dropout(0.5))
    trained = copy.deepcopy(network).train()
    trained[2].eval()
    before = copy.deepcopy(network.state_dict())
    preprocess = Preprocess(MEAN, STD)
    teacher = FrozenTeacher(TappedNetwork(network, ("stage1",), preprocess, input_size=(16, 16)))
    evaluated = teacher(VIEWS).logits
    for compiled in (False, True):
        if compiled:
            teacher.compile(backend="eager")
        outputs = teacher(VIEWS, batch_statistics=True)
        assert torch.equal(outputs.logits, trained(preprocess(VIEWS)))
        assert set(outputs.taps) == {"stage1"}
        assert not outputs.logits.requires_grad
        assert not any(module.training for module in teacher.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        assert torch.equal(teacher(VIEWS).logits, evaluated)
    assert not torch.equal(outputs.logits, evaluated)


def test_teacher_and_student_must_be_separate() -> None:
    student = create("resnet8", num_classes=10)
    check_separate(student, create("resnet8", num_classes=10))
    check_separate(student, copy.deepcopy(student))
    with pytest.raises(ValueError, match="the same network"):
        check_separate(TappedNetwork(student), TappedNetwork(student))
    tied = create("resnet8", num_classes=10)
    tied.fc.weight = student.fc.weight
    with pytest.raises(ValueError, match=r"'fc\.weight' .* are the same memory"):
        check_separate(student, tied)


def test_preprocess_is_the_textbook_formula() -> None:
    x = Preprocess(MEAN, STD)(VIEWS)
    expected = (VIEWS.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert x.dtype == torch.float32
    assert torch.equal(x, expected)
    assert Preprocess(MEAN, STD).double()(VIEWS).dtype == torch.float64
    assert not Preprocess(MEAN, STD).state_dict()


def test_preprocess_keeps_channels_last() -> None:
    x = Preprocess(MEAN, STD)(VIEWS.contiguous(memory_format=torch.channels_last))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, Preprocess(MEAN, STD)(VIEWS))


def test_preprocess_resizes_to_the_networks_own_size() -> None:
    flat = torch.full((2, 3, 16, 16), 51, dtype=torch.uint8)
    x = Preprocess((0.0,) * 3, (1.0,) * 3, size=(24, 20))(flat)
    assert x.shape == (2, 3, 24, 20)
    torch.testing.assert_close(x, torch.full_like(x, 0.2))
    halves = Preprocess((0.0,) * 3, (1.0,) * 3, size=(8, 8))(VIEWS)
    assert halves.shape == (4, 3, 8, 8)
    assert torch.equal(Preprocess(MEAN, STD, size=(16, 16))(VIEWS), Preprocess(MEAN, STD)(VIEWS))


def test_preprocess_refuses_what_is_not_a_view() -> None:
    with pytest.raises(ValueError, match=r"uint8 or float32 batches, got torch\.float64"):
        Preprocess(MEAN, STD)(VIEWS.double())
    with pytest.raises(ValueError, match="1 channels, the normalisation 3"):
        Preprocess(MEAN, STD)(VIEWS[:, :1])
    with pytest.raises(ValueError, match="std must be positive"):
        Preprocess((0.5,), (0.0,))
    with pytest.raises(ValueError, match="one entry a channel"):
        Preprocess((0.5,), (0.2, 0.2))
