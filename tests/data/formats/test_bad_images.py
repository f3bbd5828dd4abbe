"""What is wrong with an image, and what is done about it."""

import io
import itertools
import os
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vrm.data import load
from vrm.data.datasets import decode as decoding
from vrm.data.datasets.decode import read_without_bad
from vrm.data.datasets.load import find
from vrm.data.formats import images
from vrm.data.formats.images import BadImage, decode, decode_all, find_bad

SIDE = 24
RANDOM = np.random.default_rng(0)
# Smooth with a little noise, as a JPEG decoder likes it.
SLOPE = np.linspace(0, 200, SIDE)[None, :, None] * np.ones((SIDE, 1, 3))
PIXELS = (SLOPE + RANDOM.normal(20, 8, SLOPE.shape)).clip(0, 255).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def tree(root, *, classes=("a", "b"), count=3):
    """Good images, each of one colour of its own, train 000.png .. and as many for the test; the colours by file."""
    colours = {}
    level = itertools.count(1)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                file = root / split / name / f"{number:03d}.png"
                colours[file] = next(level)
                file.write_bytes(encoded(np.full((SIDE, SIDE, 3), colours[file], dtype=np.uint8)))
    return colours


def shades(store):
    """The colour of each image, if it is of one."""
    assert (store.images == store.images[:, :1, :1, :1]).all()
    return store.images[:, 0, 0, 0].tolist()


PNG, JPEG = encoded(PIXELS), encoded(PIXELS, "JPEG")
FORMATS = {
    "png": PNG,
    "jpeg": JPEG,
    "progressive": encoded(PIXELS, "JPEG", progressive=True),
    "gif": encoded(Image.fromarray(PIXELS).quantize(32), "GIF"),
    "bmp": encoded(PIXELS, "BMP"),
    "ppm": encoded(PIXELS, "PPM"),
    "tiff": encoded(PIXELS, "TIFF"),
    "tiff lzw": encoded(PIXELS, "TIFF", compression="tiff_lzw"),
    "webp": encoded(PIXELS, "WEBP"),
    "webp lossless": encoded(PIXELS, "WEBP", lossless=True),
}


def png_of(width, height):
    """A PNG that announces this size and holds next to nothing."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100))
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello, I am no image", r"it begins with b'hello, I am '"),
    "zeros": (bytes(1000), "UnidentifiedImageError"),
    "html": (b"<html><body>404</body></html>", "UnidentifiedImageError"),
    "signature alone": (PNG[:8], "no readable image"),
    "half a png": (PNG[: len(PNG) // 2], "no readable image"),
    "all but a byte of a png": (PNG[:-1], "truncated"),
    "png without its end": (PNG[:-12], "truncated"),
    "png with a flipped bit": (flipped(PNG, len(PNG) // 2), "no readable image"),
    "png with a flipped checksum": (flipped(PNG, -14), "the checksum of its chunk IDAT differs"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "no readable image"),
    "jpeg with a broken head": (JPEG[:4] + bytes(100) + JPEG[104:], "no readable image"),
    "floating point": (encoded(PIXELS[..., 0].astype(np.float32), "TIFF"), "floating-point pixels have no known range"),
    "a bomb": (png_of(50_000, 50_000), "DecompressionBombError"),
    "a small bomb": (png_of(10_000, 10_000), r"10000 x 10000 pixels .* more than PIL.Image.MAX_IMAGE_PIXELS"),
    "another format": (encoded(PIXELS, "PCX"), "UnidentifiedImageError"),
    "a program": (encoded(PIXELS, "EPS"), "UnidentifiedImageError"),
}
ignore_small_bombs = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


# One image ------------------------------------------------------------------------------------------------------------


@ignore_small_bombs
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_with_the_reason_and_the_fix(kind):
    content, words = BAD[kind]
    with pytest.raises(
        BadImage, match=rf"^here: .*{words}.*; expected one of BMP, .* get this image again, .*data\.bad_images=skip"
    ) as caught:
        decode(content, "here", size=None)
    assert (caught.value.origin, "0x" in caught.value.reason) == ("here", False)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75, 0.99, -1])
def test_a_truncated_image_is_bad(kind, part):
    whole = FORMATS[kind]
    decode(whole, "here", size=None)
    cut = whole[:-1] if part == -1 else whole[: int(len(whole) * part)]
    if kind == "gif" and len(cut) > len(whole) - 3:
        assert np.array_equal(decode(cut, "here", size=None), decode(whole, "here", size=None))  # the end mark alone
    else:
        with pytest.raises(BadImage):
            decode(cut, "here", size=None)


@given(st.integers(0, len(PNG) - 1), st.integers(0, 7))
def test_a_flipped_bit_of_a_png_is_seen_or_harmless(position, bit):
    content = bytearray(PNG)
    content[position] ^= 1 << bit
    try:
        found = decode(bytes(content), "here", size=None)
    except BadImage:
        return
    assert np.array_equal(found, PIXELS.transpose(2, 0, 1))


@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_whatever_is_done_to_an_image_it_is_decoded_or_bad(kind, data):
    content = bytearray(FORMATS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = decode(bytes(content[:cut]), "here", size=16)
        except BadImage:
            return
        assert (found.shape, found.dtype) == ((3, 16, 16), np.uint8)


def test_lack_of_memory_is_not_the_images_fault(monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", none)
    with pytest.raises(MemoryError):
        decode(PNG, "here", size=None)


def test_a_strip_that_would_grow_beyond_bounds_is_bad():
    strip = encoded(np.zeros((1, 60_000, 3), np.uint8))
    assert decode(strip, "here", size=None).shape == (3, 1, 60_000)
    assert decode(strip, "here", size=1).shape == (3, 1, 1)
    with pytest.raises(BadImage, match=r"13440000 x 224 pixels .* are more than"):
        decode(strip, "here", size=224)


@ignore_small_bombs
def test_the_bound_is_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE)
    decode(PNG, "here", size=None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
    with pytest.raises(BadImage, match=r"MAX_IMAGE_PIXELS, 575"):
        decode(PNG, "here", size=None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    decode(PNG, "here", size=None)


RED = np.zeros((SIDE, SIDE, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
GREY = np.full((SIDE, SIDE), 100, np.uint8)


def animation(kind):
    frames = [Image.fromarray(RED), Image.fromarray(RED[..., ::-1].copy())]
    return encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    return encoded(Image.fromarray(RED[: SIDE // 2]), "PNG", exif=exif)


ODD = {
    "cmyk jpeg": (encoded(Image.fromarray(RED).convert("CMYK"), "JPEG"), RED),
    "grey jpeg": (encoded(GREY, "JPEG"), np.stack([GREY] * 3, 2)),
    "animated gif": (animation("GIF"), RED),
    "animated png": (animation("PNG"), RED),
    "animated webp": (animation("WEBP"), RED),
    "rotated by exif": (rotated(), RED[: SIDE // 2]),
    "of one pixel": (encoded(RED[:1, :1]), RED[:1, :1]),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_good(kind):
    content, expected = ODD[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(content, "here", size=None).transpose(1, 2, 0)
        assert decode(content, "here", size=SIDE).shape == (3, SIDE, SIDE)
    assert np.abs(found.astype(int) - expected).max() <= (1 if "jpeg" in kind else 0)


# Many images ----------------------------------------------------------------------------------------------------------

ROWS = [encoded(np.full((4, 4, 3), row, np.uint8)) for row in range(20)]


@given(st.sets(st.integers(0, 19), max_size=18), st.integers(0, 4), st.integers(1, 7))
def test_the_good_ones_stay_in_order_and_the_bad_ones_are_told(bad, num_workers, chunk):
    rows = [b"broken" if row in bad else content for row, content in enumerate(ROWS)]
    origins = [f"row {row}" for row in range(20)]
    kept = images._CHUNK
    images._CHUNK = chunk
    try:
        found, reasons = decode_all(rows, origins, leave_out=True, num_workers=num_workers)
        assert find_bad(rows, origins, num_workers=num_workers) == reasons
        if bad:
            with pytest.raises(BadImage, match=f"^row {min(bad)}: "):
                decode_all(rows, origins, num_workers=num_workers)
        else:
            assert torch.equal(decode_all(rows, origins, num_workers=num_workers)[0], found)
    finally:
        images._CHUNK = kept
    assert found.is_contiguous()
    assert found[:, 0, 0, 0].tolist() == [row for row in range(20) if row not in bad]
    assert list(reasons) == sorted(bad)


def test_an_image_of_another_size_than_most_is_bad():
    rows = [encoded(np.zeros(shape, np.uint8)) for shape in [(4, 4, 3), (1, 1, 3), (4, 4, 3), (6, 4, 3), (4, 4, 3)]]
    found, bad = decode_all(rows, "abcde", leave_out=True)
    assert bad == {
        1: "1x1 pixels (height x width), not 4x4",
        3: "6x4 pixels (height x width), not 4x4",
    }
    assert found.shape == (3, 3, 4, 4)
    assert decode_all(rows, "abcde", size=4, leave_out=True)[1] == {}
    assert list(decode_all(rows, "abcde", expected=(1, 1), leave_out=True)[1]) == [0, 2, 3, 4]
    assert find_bad(rows, "abcde") == {}
    with pytest.raises(ValueError, match=r"2 sizes, and most have none in common: .* size of 1 in 2; .*data\.size=N"):
        decode_all(rows[:2], "ab", leave_out=True)
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        decode_all([b"", b"x"], "ab", leave_out=True)


# A data set -----------------------------------------------------------------------------------------------------------


@ignore_small_bombs
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("kind", ["empty", "png with a flipped checksum", "a small bomb"])
def test_every_bad_image_is_refused_listed_or_left_out(root, kind, num_workers):
    colours = tree(root)
    bad = [root / "train" / "a" / "001.png", root / "test" / "b" / "000.png"]
    for file in bad:
        file.write_bytes(BAD[kind][0])
    with pytest.raises(ValueError, match=rf"train/a/001\.png: .*{BAD[kind][1]}") as caught:
        load("folder", root=root, num_workers=num_workers)
    assert "000.png" not in str(caught.value)
    with pytest.raises(ValueError, match=r"2 of 12 images are bad; get them again") as caught:
        load("folder", root=root, bad_images="report", num_workers=num_workers)
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()[1:]] == list(map(str, bad))
    with pytest.warns(UserWarning, match=r"2 bad images left out .*train/a/001\.png: .*; test/b/000\.png: "):
        data = load("folder", root=root, bad_images="skip", num_workers=num_workers)
    good = [file for file in colours if file not in bad]
    assert shades(data.train) + shades(data.test) == [colours[file] for file in good]
    classes = [data.classes[target] for store in (data.train, data.test) for target in store.targets.tolist()]
    assert classes == [file.parent.name for file in good]
    assert [line.partition(": ")[0] for line in data.train.skipped + data.test.skipped] == [
        "train/a/001.png",
        "test/b/000.png",
    ]


def test_without_bad_images_every_policy_gives_the_same(root):
    tree(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {policy: load("folder", root=root, bad_images=policy) for policy in ("error", "skip", "report")}
    assert len({(data.train.hash, data.test.hash, data.train.skipped) for data in found.values()}) == 1


def test_an_unknown_policy_is_refused(root):
    tree(root)
    with pytest.raises(ValueError, match="bad_images must be one of error, skip, report, got 'ignore'"):
        load("folder", root=root, bad_images="ignore")
    with pytest.raises(ValueError, match="got 'ignore'"):
        load("digits", bad_images="ignore")


def test_what_was_left_out_is_told_from_the_cache_too_and_no_other_policy_takes_it(
    root, tmp_path, monkeypatch, cache_folder
):
    tree(root)
    (root / "test" / "a" / "002.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 bad image"):
        first = load("folder", root=root, bad_images="skip")
    root.rename(tmp_path / "moved")
    monkeypatch.setattr(decoding, "decode_all", None)
    with pytest.warns(UserWarning, match=r"test/a/002\.png"):
        again = load("folder", root=tmp_path / "moved", bad_images="skip")
    assert again.test.skipped == first.test.skipped == (next(iter(first.test.skipped)),)
    assert (again.train.hash, again.test.hash) == (first.train.hash, first.test.hash)
    monkeypatch.undo()
    monkeypatch.setenv("VRM_CACHE", str(cache_folder))
    for policy in ("error", "report"):
        with pytest.raises(ValueError, match=r"test/a/002\.png"):
            load("folder", root=tmp_path / "moved", bad_images=policy)


def test_many_bad_images_are_told_in_part_and_kept_in_full(root):
    tree(root, count=20)
    for file in (root / "train" / "a").iterdir():
        if file.stem != "019":
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"19 bad images .*a/000.*a/009[^/]*; and 9 more$") as caught:
        data = load("folder", root=root, bad_images="skip")
    assert "010.png" not in str(caught[0].message)
    assert len(data.train.skipped) == 19
    with pytest.raises(ValueError, match="19 of 80 images") as error:
        load("folder", root=root, bad_images="report")
    assert len(str(error.value).splitlines()) == 20


def test_nothing_but_bad_images_is_refused(root):
    tree(root)
    for file in (root / "train" / "a").iterdir():
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="3 bad images"),
        pytest.raises(ValueError, match=r"the bad images left out, no image of 1 of the 2 classes .*\(a\)"),
    ):
        load("folder", root=root, bad_images="skip")
    for file in (root / "train" / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"all of the 6 train images are bad, such as .*train/a/000\.png"):
        load("folder", root=root, bad_images="skip")


def test_a_bad_image_of_a_parquet_file_is_left_out_by_its_row(root):
    for split, count in (("train", 12), ("test", 10)):
        blobs = [encoded(np.full((32, 32, 3), row, np.uint8)) for row in range(count)]
        blobs[10:11] = [b"broken"] * (split == "train")
        table = pa.table({"image": blobs, "label": [row % 10 for row in range(count)]})
        pq.write_table(table, root / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet, row 10: no readable image"):
        load("cifar10", root=root)
    with pytest.warns(UserWarning, match=r"left out .*: train\.parquet, row 10: no readable"):
        data = load("cifar10", root=root, bad_images="skip")
    assert shades(data.train) == [*range(10), 11]
    assert data.train.targets.tolist() == [*range(10), 1]


# Those who decode later -----------------------------------------------------------------------------------------------


def test_images_that_are_decoded_later_are_looked_through_once(root, tmp_path, monkeypatch):
    colours = tree(root)
    bad = root / "train" / "b" / "000.png"
    bad.write_bytes(b"broken")
    found = find("folder", root=root)
    train, test = read_without_bad("folder", found, "error")
    assert (len(train.images), train.skipped) == (6, ())
    with pytest.raises(ValueError, match=r"1 of 12 images are bad.*\n.*train/b/000\.png: no readable"):
        read_without_bad("folder", found, "report")
    told = []
    for again in range(2):
        if again:
            monkeypatch.setattr(decoding, "find_bad", None)
        with pytest.warns(UserWarning, match=r"1 bad image left out .*train/b/000\.png"):
            train, test = read_without_bad("folder", found, "skip", progress=lambda *done: told.append(done))
        assert list(train.images) == [file for file in colours if file.parts[-3] == "train" and file != bad]
        assert train.targets == [0, 0, 0, 1, 1]
        assert [decode(file, "", size=None)[0, 0, 0] for file in train.images] == [1, 2, 3, 5, 6]
        assert train.skipped[0].startswith("train/b/000.png: no readable image")
        assert test.skipped == ()
    bad.write_bytes(b"")
    with pytest.raises(TypeError):  # other content: looked through anew
        read_without_bad("folder", found, "skip")


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff", b'{"train": {"x": ""}, "test": {}}'])
def test_a_damaged_list_of_bad_images_is_made_again(root, cache_folder, damage):
    tree(root)
    (root / "train" / "b" / "000.png").write_bytes(b"broken")
    found = find("folder", root=root)
    with pytest.warns(UserWarning, match="1 bad image"):
        expected = read_without_bad("folder", found, "skip")
    (file,) = cache_folder.glob("*.json")
    whole = file.read_bytes()
    file.write_bytes(damage)
    with pytest.warns(UserWarning, match="made again"), pytest.warns(UserWarning, match="1 bad image"):
        assert read_without_bad("folder", found, "skip") == expected
    assert file.read_bytes() == whole


# Files that are none --------------------------------------------------------------------------------------------------


def forbid(forbidden, function):
    def call(path, *arguments, **options):
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *arguments, **options)

    return call


@pytest.mark.parametrize("kind", ["broken link", "link to itself", "pipe", "link to a pipe", "forbidden"])
def test_what_is_no_file_is_a_bad_image(root, kind, monkeypatch):
    tree(root)
    file = root / "train" / "a" / "odd.png"
    if kind == "broken link":
        file.symlink_to(root / "nowhere.png")
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link to a pipe":
        os.mkfifo(root / "pipe")
        file.symlink_to(root / "pipe")
    else:  # chmod does not keep root out
        file.write_bytes(PNG)
        for name in ("open", "read_bytes"):
            monkeypatch.setattr(Path, name, forbid(file, getattr(Path, name)))
    with pytest.raises(ValueError, match=r"train/a/odd\.png: no readable image"):
        load("folder", root=root)
    with pytest.warns(UserWarning, match=r"1 bad image left out .*train/a/odd\.png: no readable image"):
        data = load("folder", root=root, bad_images="skip")
    assert len(data.train) == 6
    assert str(root) not in data.train.skipped[0]


def test_links_to_files_and_folders_are_followed(root, tmp_path):
    tree(root / "one")
    expected = load("folder", root=root / "one")
    (root / "two" / "train").mkdir(parents=True)
    (root / "two" / "test").symlink_to(root / "one" / "test")
    (root / "two" / "train" / "a").symlink_to(root / "one" / "train" / "a")
    (root / "two" / "train" / "b").mkdir()
    (root / "two" / "train" / "b" / "deeper").symlink_to(root / "one" / "train" / "b")
    assert load("folder", root=root / "two").train.hash == expected.train.hash
    (root / "three").symlink_to(root / "two")
    assert load("folder", root=root / "three").test.hash == expected.test.hash


@pytest.mark.parametrize("target", ["train/a", "train", "."])
def test_a_link_that_leads_around_is_refused(root, target):
    tree(root)
    (root / "train" / "a" / "around").symlink_to(root / target)
    with pytest.raises(ValueError, match=r"train/a/around.* is a link to a folder that holds it; remove the link"):
        load("folder", root=root)


# Names ----------------------------------------------------------------------------------------------------------------

NAMES = ["x.png", "x.jpg", "x.PNG", "X.png", "x.tar.png", "a b.png", " .png", "a\nb.png", "ж.png", "-rf.png", "*.png",
         "'\".png", "x" * 251 + ".png", "é.png", unicodedata.normalize("NFD", "é.png"), "日本.png", "\u202eb.png",
         "🐈.png", "a;b.png", "%s{}.png", "nul\x01.png"]  # fmt: skip


def test_every_name_is_a_sample_of_its_own(root):
    """Same stem, same but for case or Unicode form, same in another class, and stranger ones."""
    tree(root, count=1)
    for level, name in enumerate([*NAMES, os.fsdecode(b"\xff.png")]):
        (root / "train" / "a" / name).write_bytes(encoded(np.full((SIDE, SIDE, 3), 100 + level, np.uint8)))
        (root / "train" / "b" / name).write_bytes(encoded(np.full((SIDE, SIDE, 3), 200 + level, np.uint8)))
    data = load("folder", root=root)
    of_a, of_b = shades(data.train)[: len(NAMES) + 2], shades(data.train)[len(NAMES) + 2 :]
    assert sorted(of_a) == [1, *range(100, 101 + len(NAMES))]
    assert [level + 100 for level in of_a if level > 1] == [level for level in of_b if level > 2]
    for name in [*NAMES, os.fsdecode(b"\xff.png")]:
        (root / "train" / "a" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{len(NAMES) + 1} of .* images are bad") as caught:
        load("folder", root=root, bad_images="report")
    text = str(caught.value)
    text.encode()  # can be printed
    assert len(text.splitlines()) == 2 + len(NAMES)
    assert "train/a/a\\nb.png: " in text


def test_the_order_is_that_of_the_composed_names(root):
    """A copy on a file system that decomposes names has the same order, and so the same content."""
    names = ["é.png", "ez.png", "f.png", "e.png"]
    for form in ("NFC", "NFD"):
        colours = tree(root / form, count=1)
        for level, name in enumerate(names):
            image = encoded(np.full((SIDE, SIDE, 3), 100 + level, np.uint8))
            (root / form / "train" / "b" / unicodedata.normalize(form, name)).write_bytes(image)
    one, two = (load("folder", root=root / form) for form in ("NFC", "NFD"))
    assert one.train.hash == two.train.hash
    assert shades(one.train)[1:] == [2, 103, 101, 102, 100]
    assert len(colours) == 4


def test_a_class_may_be_called_anything_that_is_text(root):
    names = ["A", "a", "a b", " a", "a\nb", "ж", "x" * 255, "..a", "*", "🐈"]
    names.remove("..a")  # hidden
    tree(root, classes=names, count=1)
    data = load("folder", root=root)
    assert data.classes == tuple(sorted(names))
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / os.fsdecode(b"\xff"))
    with pytest.raises(ValueError, match=r"the class folder .*train/\\udcff is not UTF-8; rename it"):
        load("folder", root=root)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:1 file in .* left out for not being images, such as .*notes.txt")
@pytest.mark.parametrize("held", [None, "notes.txt", ".hidden.png", "deeper/"])
def test_an_empty_class_folder_is_named(root, held):
    tree(root)
    (root / "train" / "c").mkdir()
    if held == "deeper/":
        (root / "train" / "c" / "deeper").mkdir()
    elif held is not None:
        (root / "train" / "c" / held).write_bytes(PNG)
    with pytest.raises(ValueError, match=r"train/c holds no image \([^)]*\); add images to learn the class from, or"):
        load("folder", root=root)


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    tree(root)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("train/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"the folder .*train/b cannot be read \(Permission denied\)"):
        load("folder", root=root)


def test_a_root_that_cannot_be_reached_is_told(root):
    with pytest.raises(ValueError, match=r"data\.root=.* cannot be read \(File name too long"):
        load("folder", root=root / ("x" * 5000))
