"""The cache of decoded images: used, checked, made again."""

import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from vrm.data import load
from vrm.data.datasets import cache, decode

from ..layouts import hashes, write_abc, write_parquets


def no_decoding(*_, **__):
    raise RuntimeError("decoded again")


def kept(folder):
    """The visible files of the cache."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def test_what_was_decoded_is_not_decoded_again(root, cache_folder, monkeypatch):
    write_parquets(root / "one")
    first = load("cifar10", root=root / "one")
    (root / "one").rename(root / "moved")
    monkeypatch.setattr(decode, "decode_all", no_decoding)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    again = load("cifar10", root=root / "moved")
    assert hashes(again) == hashes(first)
    assert again.classes == first.classes
    assert [file.suffix for file in kept(cache_folder)] == [".safetensors"]


@pytest.mark.parametrize("change", ["pixels", "name", "size", "class"])
def test_other_content_is_decoded_anew(root, monkeypatch, change):
    write_abc(root)
    load("folder", root=root)
    monkeypatch.setattr(decode, "decode_all", no_decoding)
    load("folder", root=root)
    file = root / "train" / "a" / "000.png"
    if change == "pixels":
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
    elif change == "name":
        file.rename(file.with_name("zzz.png"))
    elif change == "class":
        file.rename(root / "train" / "b" / "zzz.png")
    with pytest.raises(RuntimeError, match="decoded again"):
        load("folder", root=root, size=4 if change == "size" else None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.clear(),
        lambda content: content.__delitem__(slice(-100, None)),
        lambda content: content.__setitem__(slice(0, 8), struct.pack("<Q", 2**40)),
        lambda content: content.__setitem__(slice(None), content.replace(b'"vrm"', b'"mrv"')),
    ],
)
def test_a_damaged_file_is_made_again_with_a_warning(root, cache_folder, damage):
    write_parquets(root)
    expected = hashes(load("cifar10", root=root))
    (file,) = kept(cache_folder)
    whole = file.read_bytes()
    content = bytearray(whole)
    damage(content)
    assert content != whole
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{file.name} cannot be used \(.*made again"):
        assert hashes(load("cifar10", root=root)) == expected
    assert file.read_bytes() == whole


def test_a_flipped_bit_anywhere_in_the_cache_is_seen(root, cache_folder):
    write_abc(root)
    (root / "train" / "a" / "zzz.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 bad image"):
        expected = load("folder", root=root, bad_images="skip")
    (file,) = kept(cache_folder)
    whole = file.read_bytes()
    generator = random.Random(0)
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [generator.randrange(8 * head) for _ in range(40)]
    for place in places + [generator.randrange(8 * len(whole)) for _ in range(20)]:
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            data = load("folder", root=root, bad_images="skip")
        assert (hashes(data), data.train.skipped) == (hashes(expected), expected.train.skipped)
        # What is not seen is what safetensors does not read, such as blanks behind its header.
        assert any("made again" in str(warning.message) for warning in told) or file.read_bytes() == bytes(content)
        file.write_bytes(whole)


def test_without_a_writable_cache_loading_goes_on(root, tmp_path, monkeypatch):
    write_abc(root)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("VRM_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*a file/cache .*another folder in VRM_CACHE"):
        assert len(load("folder", root=root).train) == 9


LOAD = """
import os, signal, sys
from vrm.data import load
from vrm.data.datasets import cache, decode

root, act = sys.argv[1:]
decode_all, save = decode.decode_all, cache.save_file


def waiting(*arguments, **options):
    print("decodes", flush=True)
    if act == "wait":
        sys.stdin.readline()
    return decode_all(*arguments, **options)


def dying(tensors, file, **options):
    save(tensors, file, **options)
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)


decode.decode_all, cache.save_file = waiting, dying
if act == "full":
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
print(load("folder", root=root).train.hash, flush=True)
"""


def start(root, act):
    words = [sys.executable, "-c", LOAD, str(root), act]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, **pipes)


def test_two_processes_decode_once(root, cache_folder):
    write_abc(root)
    first = start(root, "wait")
    assert first.stdout.readline() == "decodes\n"
    second = start(root, "wait")
    assert "waiting for the cache" in second.stderr.readline()
    results = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], results
    assert results[0][0] == results[1][0]  # and nothing was decoded by the second
    assert load("folder", root=root).train.hash == results[0][0].strip()


def test_a_process_killed_while_it_writes_leaves_nothing_forever(root, cache_folder):
    write_abc(root / "one")
    write_abc(root / "two", side=5)
    killed = start(root / "one", "die")
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    assert list(cache_folder.glob(".*.tmp"))
    for name in ("two", "one"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load("folder", root=root / name)
        assert not list(cache_folder.glob(".*.tmp"))
    assert [file.suffix for file in kept(cache_folder)] == [".safetensors"] * 2


def test_on_a_full_disk_loading_goes_on(root, cache_folder):
    write_abc(root)
    process = start(root, "full")
    out, trouble = process.communicate(timeout=120)
    assert process.returncode == 0, trouble
    assert "decoded data cannot be kept" in trouble
    assert kept(cache_folder) == []
    assert out.split()[-1] == load("folder", root=root).train.hash


def test_what_cannot_be_decoded_is_not_kept(root, cache_folder):
    write_abc(root)
    (root / "train" / "a" / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        load("folder", root=root)
    assert kept(cache_folder) == []


def test_the_cache_lies_at_home_by_default(monkeypatch):
    monkeypatch.delenv("VRM_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.cache_folder() == Path("/home/someone/.cache/vrm")
