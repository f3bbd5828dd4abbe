from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrm.data.stores.base import describe_spread
from vrm.data.stores.dataset import DataSet, channel_statistics, epoch_batches, epoch_order, few_labels
from vrm.data.stores.memory import ImageStore
from vrm.data.stores.placement import place
from vrm.data.views.policies import view_policy
from vrm.data.views.transforms import CentralCrop


def make(num_images=6, *, size=4, classes=("a", "b", "c"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_images, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageStore(images, torch.arange(num_images) % len(classes), tuple(classes))


IMAGES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
TARGETS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("images", "targets", "classes", "words"),
    [
        (IMAGES.double(), TARGETS, "ab", "uint8 or float32"),
        (IMAGES[0], TARGETS, "ab", r"\(N, 3, H, W\)"),
        (IMAGES[:, :1], TARGETS, "ab", r"\(2, 1, 4, 4\)"),
        (IMAGES.permute(0, 1, 3, 2)[..., ::2], TARGETS, "ab", "contiguous"),
        (IMAGES[:0], TARGETS[:0], "ab", "empty"),
        (IMAGES, TARGETS[:1], "ab", "2 images need as many targets, got 1"),
        (IMAGES, TARGETS.float(), "ab", r"targets must be integers of shape \(N,\), got torch.float32 \(2,\)"),
        (IMAGES, torch.zeros(2, 2).long(), "ab", r"got torch.int64 \(2, 2\)"),
        (IMAGES, [0, "b"], "ab", "label 'b'; expected an integer"),
        (IMAGES, torch.tensor([0, 2]), "ab", "image 1 has label 2, but there are 2 classes, numbered from 0 to 1"),
        (IMAGES, torch.tensor([-1, 0]), "ab", "image 0 has label -1"),
        (IMAGES, TARGETS, "abb", "class names repeat: 'b'"),
    ],
)
def test_a_store_refuses_what_does_not_fit(images, targets, classes, words):
    with pytest.raises(ValueError, match=words):
        ImageStore(images, targets, tuple(classes))


def test_store_gives_batches_and_selections_in_the_order_asked_for():
    store = make()
    index = torch.tensor([4, 0, 4])
    assert len(store) == 6
    assert (store.num_classes, store.image_size) == (3, (4, 4))
    assert torch.equal(store.batch(index), torch.stack([store.images[4], store.images[0], store.images[4]]))
    part = store.select(index)
    assert torch.equal(part.images, store.batch(index))
    assert part.targets.tolist() == [1, 0, 1]
    assert part.classes == store.classes


def test_hash_tells_content_and_nothing_else():
    store = make()
    assert store.hash == make().hash == store.to("cpu").hash == store.select(torch.arange(6)).hash
    pixel, label = store.images.clone(), store.targets.clone()
    pixel[5, 2, 3, 3] ^= 1
    label[5] = 0
    others = [
        ImageStore(pixel, store.targets, store.classes),
        ImageStore(store.images, label, store.classes),
        ImageStore(store.images, store.targets, ("a", "b", "d")),
        ImageStore(store.images, store.targets, ("a", "b", "c", "d")),
        ImageStore(store.images.reshape(6, 3, 2, 8), store.targets, store.classes),
    ]
    assert len({store.hash, *(other.hash for other in others)}) == 6


def test_channel_statistics_are_those_of_the_scaled_pixels():
    store = make(50)
    scaled = store.images.double() / 255
    mean, std = channel_statistics(store)
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


@pytest.mark.parametrize(("policy", "side"), [("cifar", 16), ("none", 16), ("imagenet", 224), ("vit", 224)])
def test_evaluation_sees_what_the_view_policy_says(policy, side):
    train, test = make(size=16), make(size=16, seed=1)
    data = DataSet("x", train, test, *channel_statistics(train), policy)
    views = view_policy(policy)(data.train.images, torch.arange(6), epoch=1, seed=0, num_virtual=0)
    index = torch.arange(6)
    assert (
        {view.shape[2:] for view in views} == {data.test.batch(index).shape[2:]} == {data.image_size} == {(side,) * 2}
    )
    crop = view_policy(policy).evaluation
    assert torch.equal(data.test.batch(index), test.images if crop is None else crop(test.images))
    assert torch.equal(data.train.batch(index), train.images)
    assert replace(data, view_policy="cifar").image_size == (16, 16)
    host = place(data, "cpu", "host")
    assert torch.equal(host.test.batch(index), data.test.batch(index))


def test_data_set_needs_a_view_policy_that_exists():
    with pytest.raises(ValueError, match="x: unknown view policy 'imagnet'; did you mean 'imagenet'"):
        DataSet("x", make(), make(), (0.5,) * 3, (0.5,) * 3, "imagnet")


def test_a_channel_that_never_varies_has_a_standard_deviation_of_one():
    images = make(50).images.clone()
    images[:, 2] = 77
    store = ImageStore(images, make(50).targets, ("a", "b", "c"))
    mean, std = channel_statistics(store)
    assert mean[2] == 77 / 255
    assert std == (*channel_statistics(make(50))[1][:2], 1.0)
    floats = ImageStore(images.float() / 255, store.targets, store.classes)
    mean_of_floats, std_of_floats = channel_statistics(floats)
    assert mean_of_floats == pytest.approx(mean, rel=1e-6)
    assert std_of_floats == pytest.approx(std, rel=1e-6)
    assert std_of_floats[2] == 1


def test_statistics_of_floats_are_those_of_their_values():
    store = ImageStore(torch.randn(50, 3, 4, 4) * 2 + 1, make(50).targets, ("a", "b", "c"))
    exact = store.images.double()
    mean, std = channel_statistics(store)
    assert mean == pytest.approx(exact.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(exact.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert channel_statistics(place(DataSet("x", store, store, mean, std, "none"), "cpu", "host").train) == (mean, std)


def test_stores_and_data_sets_are_shown_on_one_line():
    data = DataSet("toy", make(1200, classes="ab"), make(1, classes="a"), (0.5,) * 3, (0.2,) * 3, "none")
    assert repr(data.train) == "ImageStore(1,200 images of 4x4, 2 classes, for cpu)"
    assert repr(data) == (
        "DataSet('toy', train=ImageStore(1,200 images of 4x4, 2 classes, for cpu), "
        "test=ImageStore(1 image of 4x4, 2 classes, for cpu), views none)"
    )
    assert repr(data.train.with_crop(CentralCrop(2))) == (
        "ImageStore(1,200 images of 4x4 (2x2 in evaluation), 2 classes, for cpu)"
    )
    placed = place(data, "cpu", "host")
    assert repr(placed.train) == "HostStore(1,200 images of 4x4, 2 classes, for cpu)"
    assert repr(placed).endswith(", views none, images in host memory, sent batch by batch: 57.6 kB, as asked for)")


@pytest.mark.parametrize(("counts", "words"), [((2, 2), "2 images each"), ((1, 3), "from 1 image (a) to 3 (b)")])
def test_the_spread_of_the_classes_is_told(counts, words):
    targets = [0] * counts[0] + [1] * counts[1]
    assert describe_spread(ImageStore(torch.zeros(4, 3, 2, 2).byte(), targets, ("a", "b"))) == words


def test_a_test_split_may_lack_classes():
    train, test = make(6), make(4, classes=("a", "c"))
    data = DataSet("toy", train, test, (0.5,) * 3, (0.2,) * 3, "none")
    assert (data.classes, data.test.classes, data.test.targets.tolist()) == (("a", "b", "c"),) * 2 + ([0, 2, 0, 2],)
    with pytest.raises(ValueError, match=r"only in test: \['b'\]; nothing is learnt of a class that train lacks"):
        DataSet("toy", test, train, (0.5,) * 3, (0.2,) * 3, "none")


def test_floats_and_bytes_meet_on_one_scale_only():
    whole = make(6)
    unit = ImageStore(whole.images.float() / 255, whole.targets, whole.classes)
    wide = ImageStore(whole.images.float() / 64 - 1, whole.targets, whole.classes)
    statistics = ((0.5,) * 3, (0.2,) * 3)
    assert DataSet("toy", unit, whole, *statistics, "none").train.dtype == torch.float32
    for pair in ((whole, wide), (wide, whole)):
        with pytest.raises(
            ValueError, match=r"0 \.\. 1, the other floats from -1 to 2\.9\d; give both splits the same"
        ):
            DataSet("toy", *pair, *statistics, "none")


def test_data_set_needs_one_class_list_one_size_and_positive_std():
    train, statistics = make(), ((0.5,) * 3, (0.2,) * 3)
    data = DataSet("toy", train, make(3, seed=1), *statistics, "none")
    assert (data.num_classes, data.image_size, data.classes) == (3, (4, 4), ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"toy: .*only in train: \['c'\], only in test: \['x'\]"):
        DataSet("toy", train, make(3, classes=("a", "b", "x")), *statistics, "none")
    with pytest.raises(ValueError, match="same order"):
        DataSet("toy", train, make(3, classes=("b", "a", "c")), *statistics, "none")
    with pytest.raises(ValueError, match=r"train images are \(4, 4\), test images \(5, 5\)"):
        DataSet("toy", train, make(3, size=5), *statistics, "none")
    with pytest.raises(ValueError, match=r"std must be positive .* give 1 for a channel that never varies"):
        DataSet("toy", train, train, (0.5,) * 3, (0.2, 0.0, 0.2), "none")


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_fewer_labels_are_a_subset_of_more(num_classes, fewer, more):
    fewer, more = sorted((fewer, more))
    count = 5 * num_classes
    images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 3, 1, 1)
    store = ImageStore(images, torch.arange(count) % num_classes, tuple("abcd"[:num_classes]))
    small, large = few_labels(store, fewer), few_labels(store, more)
    assert small.targets.bincount().tolist() == [fewer] * num_classes
    kept_small, kept_large = small.images[:, 0, 0, 0].tolist(), large.images[:, 0, 0, 0].tolist()
    assert set(kept_small) <= set(kept_large)
    assert kept_small == sorted(kept_small)
    assert torch.equal(small.targets, store.targets[kept_small])


def test_few_labels_wants_a_possible_number():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        few_labels(make(), 0)
    with pytest.raises(ValueError, match="labels_per_class=3, but class 'a' has only 2 samples"):
        few_labels(make(), 3)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**40), st.integers(1, 500))
def test_an_epoch_visits_every_sample_once_and_drops_none(num_samples, batch_size, seed, epoch):
    batches = epoch_batches(num_samples, batch_size, seed=seed, epoch=epoch)
    assert torch.equal(torch.cat(batches), epoch_order(num_samples, seed=seed, epoch=epoch))
    assert sorted(torch.cat(batches).tolist()) == list(range(num_samples))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size


def test_the_order_depends_on_seed_and_epoch_alone():
    order = epoch_order(50, seed=3, epoch=7)
    torch.manual_seed(99)
    assert torch.equal(order, epoch_order(50, seed=3, epoch=7))
    assert not torch.equal(order, epoch_order(50, seed=3, epoch=8))
    assert not torch.equal(order, epoch_order(50, seed=4, epoch=7))


def test_batches_need_a_size():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        epoch_batches(5, 0, seed=0, epoch=1)
