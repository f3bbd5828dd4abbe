"""Downloads, from a server of our own that does everything wrong that a server can do."""

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrm.data import SOURCES, load
from vrm.data.datasets import fashion_mnist
from vrm.data.datasets.download import RemoteFile, download_data_set, download_file, unpack

CONTENT = np.random.default_rng(0).bytes(300_000)
WHOLE = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """What it offers by path, how it behaves, and what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = {"/file": CONTENT}
        self.ranges = True  # honoured
        self.sends = []  # bytes after which each next answer breaks; then no more breaks
        self.status = None  # instead of an answer
        self.tells_length = True
        self.hangs = 0.0  # seconds before it answers
        self.asked = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def remote(self, path="/file", content=CONTENT):
        return RemoteFile(self.address + path, hashlib.sha256(content).hexdigest(), len(content))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        time.sleep(server.hangs)
        if server.status:
            return self.send_error(server.status)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content, start = server.content[self.path], 0
        if server.ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(asked[1])
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            first = server.ranges if server.ranges is not True else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if server.tells_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        until = start + server.sends.pop(0) if server.sends else len(content)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[start:until])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("VRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "archive.bin"


def partial_of(target):
    return target.with_name(target.name + ".partial")


def held(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(".lock"))


# One file -------------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_and_told_of(server, target):
    told = []
    assert download_file(server.remote(), target, progress=lambda *done: told.append(done)) == target
    assert target.read_bytes() == CONTENT
    assert told[-1] == (300_000, 300_000)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert server.asked == [("/file", None)]
    assert held(target.parent) == ["archive.bin"]


def test_a_file_that_is_there_needs_no_server(target):
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    before = target.stat()
    download_file(RemoteFile("http://127.0.0.1:9/none", WHOLE, len(CONTENT)), target)
    assert target.stat() == before


@pytest.mark.parametrize("start", [1, 150_000, 299_999])
def test_a_partial_download_goes_on(server, target, start):
    target.parent.mkdir()
    partial_of(target).write_bytes(CONTENT[:start])
    download_file(server.remote(), target)
    assert target.read_bytes() == CONTENT
    assert server.asked == [("/file", f"bytes={start}-")]
    assert held(target.parent) == ["archive.bin"]


def test_a_whole_partial_file_gets_its_name_without_a_server(target):
    target.parent.mkdir()
    partial_of(target).write_bytes(CONTENT)
    download_file(RemoteFile("http://127.0.0.1:9/none", WHOLE, len(CONTENT)), target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_gone_on_with(server, target, ranges):
    server.ranges = ranges
    server.sends = [100_000, 150_000, 40_000]
    download_file(server.remote(), target)
    assert target.read_bytes() == CONTENT
    starts = [None, "bytes=100000-", "bytes=250000-", "bytes=290000-"]
    assert [asked for _, asked in server.asked] == (
        starts if ranges else [None, "bytes=100000-", "bytes=150000-", "bytes=40000-"]
    )


def test_a_connection_that_keeps_breaking_leaves_what_came_for_the_next_start(server, target):
    server.sends = [100_000, 0]
    with pytest.raises(
        ValueError,
        match=r"/file cannot be downloaded \(the connection ended early\); 100,000 of 300,000 bytes are kept",
    ):
        download_file(server.remote(), target)
    assert held(target.parent) == ["archive.bin.partial"]
    download_file(server.remote(), target)
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=100000-"]
    assert target.read_bytes() == CONTENT


def test_only_so_many_requests_are_made(server, target):
    server.sends = [1] * 100
    with pytest.raises(ValueError, match="5 of 300,000 bytes are kept"):
        download_file(server.remote(), target)
    assert len(server.asked) == 5


WRONG = {"short": b"x" * 1000, "long": CONTENT + b"x", "other": b"x" * 300_000, "nearly right": CONTENT[:-1] + b"x"}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("ranges", [True, False])
def test_a_wrong_partial_file_is_started_anew(server, target, wrong, ranges):
    server.ranges = ranges
    target.parent.mkdir()
    partial_of(target).write_bytes(wrong)
    download_file(server.remote(), target)
    assert target.read_bytes() == CONTENT
    assert server.asked[-1] == ("/file", None if ranges or len(wrong) > 1000 else "bytes=1000-")
    assert held(target.parent) == ["archive.bin"]


@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("there", [None, b"mine", CONTENT[:-1] + b"y"], ids=["none", "short", "nearly right"])
def test_a_wrong_file_is_never_kept(server, target, start, there):
    server.content["/file"] = CONTENT[:-1] + b"x"
    target.parent.mkdir()
    if start:
        partial_of(target).write_bytes(CONTENT[:start])
    if there:
        target.write_bytes(there)
    with (
        warnings.catch_warnings() if there is None else pytest.warns(UserWarning, match="is another file than"),
        pytest.raises(
            ValueError,
            match=rf"/file cannot be downloaded \(its SHA-256 is [0-9a-f]{{64}}, expected {WHOLE}: another file; "
            rf"it was not kept\); get http.*/file \(SHA-256 {WHOLE}\) by other means and put it at .*archive\.bin",
        ),
    ):
        download_file(server.remote(), target)
    assert held(target.parent) == (["archive.bin"] if there else [])
    assert there is None or target.read_bytes() == there
    assert server.asked == ([("/file", "bytes=1000-")] if start else []) + [("/file", None)]


def test_another_file_of_this_name_is_replaced_by_the_right_one(server, target):
    target.parent.mkdir()
    target.write_bytes(b"mine")
    with pytest.warns(UserWarning, match="archive.bin is another file than .* will be replaced"):
        download_file(server.remote(), target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("tells_length", [True, False])
@pytest.mark.parametrize("length", [10, 299_999, 300_001, 2_000_000])
def test_a_file_of_another_length_is_refused(server, target, length, tells_length):
    server.tells_length = tells_length
    server.content["/file"] = (CONTENT * 7)[:length]
    with pytest.raises(ValueError, match=r"has 10 bytes, expected 300,000|has [\d,]+ bytes|more than|ended early"):
        download_file(server.remote(), target)
    assert not target.exists()
    if tells_length or length > 300_000:
        assert held(target.parent) == []
    server.content["/file"] = CONTENT
    download_file(server.remote(), target)
    assert target.read_bytes() == CONTENT


def test_a_page_in_the_files_place_does_not_cost_what_was_there(server, target):
    """As a hotel's network sends one."""
    target.parent.mkdir()
    partial_of(target).write_bytes(CONTENT[:200_000])
    server.content["/file"], server.ranges = b"<html>", False
    with pytest.raises(ValueError, match="the server has 6 bytes, expected 300,000, another file"):
        download_file(server.remote(), target)
    assert partial_of(target).read_bytes() == CONTENT[:200_000]


def test_a_server_that_sends_another_range_is_refused(server, target):
    server.ranges = 7
    target.parent.mkdir()
    partial_of(target).write_bytes(CONTENT[:1000])
    with pytest.raises(ValueError, match=r"status 206, bytes 7-299999/300000"):
        download_file(server.remote(), target)


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_refusal_is_told(server, target, status):
    server.status = status
    with pytest.raises(
        ValueError, match=rf"cannot be downloaded \(status {status}, .*; get .* put it at .*archive\.bin"
    ):
        download_file(server.remote(), target)
    assert held(target.parent) == []
    assert len(server.asked) == 1


def test_an_unreachable_host_is_told(target):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
        with pytest.raises(
            ValueError, match=r"cannot be downloaded \(.*refused.*; get .* by other means and put it at"
        ):
            download_file(RemoteFile(url, WHOLE, len(CONTENT)), target)
    with pytest.raises(ValueError, match=r"cannot be downloaded \("):
        download_file(RemoteFile("http://no-such-host.invalid/file", WHOLE, len(CONTENT)), target)


def test_a_server_that_does_not_answer_is_given_up(server, target):
    server.hangs = 2.0
    with pytest.raises(ValueError, match=r"cannot be downloaded \(timed out\)"):
        download_file(server.remote(), target, timeout=0.1)


def test_an_answer_that_is_none_is_told(target):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ValueError, match=r"cannot be downloaded \(SSH-2\.0"):
            download_file(RemoteFile(f"http://127.0.0.1:{server.getsockname()[1]}/", WHOLE, 9), target)
        thread.join()


def test_a_move_is_followed(server, target):
    download_file(server.remote("/moved/file"), target)
    assert target.read_bytes() == CONTENT


@given(st.lists(st.integers(0, 300_000), max_size=6), st.booleans(), st.integers(0, 300_001), st.booleans())
def test_whatever_breaks_the_file_is_right_or_not_there(breaks, ranges, start, right):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.001})
    thread.start()
    server.sends, server.ranges = breaks, ranges
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            partial_of(target).write_bytes((CONTENT if right else b"x" * 300_000)[:start])
            failure = None
            for _ in range(1 + len(breaks)):
                try:
                    download_file(server.remote(), target)
                    break
                except ValueError as error:
                    failure = error
                    assert not target.exists()
            assert target.read_bytes() == CONTENT, failure
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_disk_that_refuses_is_told_and_not_taken_for_the_network(server, target, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"archive\.bin cannot be written \(No space left on device\); make room"):
        download_file(server.remote(), target)
    assert not target.exists()
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (target.parent / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be written"):
        download_file(server.remote(), target.parent / "file" / "below")


FETCH = """
import sys
from pathlib import Path
from vrm.data.datasets.download import RemoteFile, download_file
url, sha256, num_bytes, target = sys.argv[1:]
told = lambda done, total: print(done, flush=True)
download_file(RemoteFile(url, sha256, int(num_bytes)), Path(target), progress=told)
"""


def in_a_process(server, target):
    remote = server.remote()
    words = [sys.executable, "-c", FETCH, remote.url, remote.sha256, str(remote.num_bytes), str(target)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_download_goes_on(server, target):
    server.content["/file"] = content = np.random.default_rng(1).bytes(4_000_000)
    server.remote = lambda: RemoteFile(server.address + "/file", hashlib.sha256(content).hexdigest(), len(content))
    first = in_a_process(server, target)
    first.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    if not target.exists():
        assert 0 < partial_of(target).stat().st_size <= len(content)
    download_file(server.remote(), target)
    assert target.read_bytes() == content
    assert held(target.parent) == ["archive.bin"]


# Archives -------------------------------------------------------------------------------------------------------------


def entry(name, content=b"content", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive_of(*entries, kind="w:gz"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=kind) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


FOLDER = entry("set", b"", type=tarfile.DIRTYPE)
GOOD = [FOLDER, entry("set/one", b"1" * 5000), entry("set/notes~", b"n"), entry("./set/two", b"22")]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def write_archive(place, content):
    file = place / "set.tar.gz"
    file.write_bytes(content)
    return file


def test_the_expected_members_are_taken_and_nothing_else(place):
    unpack(write_archive(place, archive_of(*GOOD)), place / "set", members=("one", "two"))
    assert held(place) == ["set", "set.tar.gz", "set/one", "set/two"]
    assert (place / "set" / "one").read_bytes() == b"1" * 5000
    assert (place / "set" / "two").read_bytes() == b"22"


EVIL = {
    "absolute": entry("/tmp/vrm-evil"),
    "absolute link": entry("set/evil", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "out": entry("../evil"),
    "out and in": entry("set/../../evil"),
    "out at the end": entry("set/deeper/.."),
    "link out": entry("set/evil", b"", type=tarfile.SYMTYPE, linkname="../.."),
    "link in a member's place": entry("set/one", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": entry("set/one", b"", type=tarfile.LNKTYPE, linkname="set/two"),
    "device": entry("set/one", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "disk": entry("set/evil", b"", type=tarfile.BLKTYPE),
    "pipe": entry("set/one", b"", type=tarfile.FIFOTYPE),
    "broken sparse": entry("set/one", b"", type=tarfile.GNUTYPE_SPARSE),
    "sparse": entry(
        "set/one",
        b"1\n0\n1\n".ljust(512, b"\0") + b"x".ljust(512, b"\0"),  # a map: one piece, at 0, of one byte
        pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)},
    ),
    "unknown kind": entry("set/one", b"", type=b"Z"),
}


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("kind", EVIL)
def test_an_archive_that_holds_evil_is_refused_whole(place, kind, position):
    entries = [*GOOD[:position], EVIL[kind], *GOOD[position:]]
    file = write_archive(place, archive_of(*entries))
    with pytest.raises(ValueError, match=r"set\.tar\.gz cannot be unpacked to .*set \(") as caught:
        unpack(file, place / "set", members=("one", "two"))
    assert re.search("refused|File exists|unexpected|header|invalid|lacks", str(caught.value))
    assert held(place) == ["set.tar.gz"]
    assert held(place.parent) == ["in", "in/set.tar.gz"]
    assert not Path("/tmp/vrm-evil").exists()


DAMAGED = {
    "without a member": (archive_of(*GOOD[:2]), r"it lacks two\)"),
    "with one twice": (archive_of(*GOOD, entry("set/one", b"again")), "File exists"),
    "in no folder": (archive_of(FOLDER, entry("one"), entry("two")), "it lacks one, two"),
    "a folder for a file": (archive_of(entry("set/one", b"", type=tarfile.DIRTYPE), entry("set/two")), "it lacks one"),
    "without its end": (archive_of(*GOOD)[:-20], "ended before"),
    "with little but its head": (archive_of(*GOOD)[:30], "ended before"),
    "not zipped": (archive_of(*GOOD, kind="w"), "gzip"),
    "zipped otherwise": (archive_of(*GOOD, kind="w:xz"), "gzip"),
    "empty": (b"", "empty"),
    "no archive": (gzip.compress(b"no tar" * 1000), "invalid header"),
    "crowded": (archive_of(*(entry(f"set/{number}") for number in range(1001))), "more than 1,000 members; refused"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_archive_leaves_nothing(place, kind):
    content, words = DAMAGED[kind]
    file = write_archive(place, content)
    with pytest.raises(ValueError, match=rf"set\.tar\.gz cannot be unpacked to .*{words}"):
        unpack(file, place / "set", members=("one", "two"))
    assert held(place) == ["set.tar.gz"]


@pytest.mark.parametrize("name", ["set/one", "set/unwanted", "set/" + "x" * 3_000_000])
def test_an_archive_that_unpacks_to_too_much_is_stopped(place, name):
    bomb = archive_of(entry(name, bytes(3_000_000)), entry("set/two"), kind="w:gz")
    assert len(bomb) < 20_000
    file = write_archive(place, bomb)
    with pytest.raises(ValueError, match="unpacks to more than 1,000,000 bytes"):
        unpack(file, place / "set", members=("one", "two"), limit=1_000_000)
    assert held(place) == ["set.tar.gz"]


def test_what_a_killed_process_unpacked_is_no_hindrance(place):
    (place / ".set.new").mkdir()
    (place / ".set.new" / "one").write_bytes(b"half")
    unpack(write_archive(place, archive_of(*GOOD)), place / "set", members=("one", "two"))
    assert held(place) == ["set", "set.tar.gz", "set/one", "set/two"]
    assert (place / "set" / "one").read_bytes() == b"1" * 5000


@given(st.data())
def test_whatever_an_archive_holds_it_is_unpacked_or_refused(data):
    content = bytearray(gzip.decompress(archive_of(*GOOD)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        file = write_archive(place, gzip.compress(bytes(content)))
        try:
            unpack(file, place / "set", members=("one", "two"))
        except ValueError:
            assert held(place) == ["set.tar.gz"]
        else:
            assert held(place) == ["set", "set.tar.gz", "set/one", "set/two"]


# Data sets ------------------------------------------------------------------------------------------------------------


def batch(count, label_key, classes, seed):
    rows = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": rows, label_key: [row % classes for row in range(count)]}, protocol=2)


def published(server, name, monkeypatch):
    """Serve an archive as that of CIFAR, and let the source know."""
    remote = SOURCES[name].remote
    key, classes = (b"labels", 10) if name == "cifar10" else (b"fine_labels", 100)
    entries = [entry(f"{remote.folder}/{m}", batch(classes, key, classes, i)) for i, m in enumerate(remote.members)]
    content = archive_of(entry(remote.folder, b"", type=tarfile.DIRTYPE), *entries, entry(f"{remote.folder}/file.txt~"))
    return serve(server, name, monkeypatch, {remote.files[0].name: content})


def published_fashion(server, monkeypatch):
    files = {}
    for split, count in (("train", 20), ("t10k", 10)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for stem, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            files[f"{split}-{stem}-ubyte.gz"] = gzip.compress(head + array.tobytes())
    return serve(server, "fashion-mnist", monkeypatch, files)


def serve(server, name, monkeypatch, files):
    source = SOURCES[name]
    server.content = {f"/{file}": content for file, content in files.items()}
    remote = replace(
        source.remote, files=tuple(server.remote(path, content) for path, content in server.content.items())
    )
    assert [file.name for file in remote.files] == [file.name for file in source.remote.files]
    monkeypatch.setitem(SOURCES, name, replace(source, remote=remote))
    return remote


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_fetched_unpacked_and_read(server, tmp_path, monkeypatch, name):
    remote = published(server, name, monkeypatch)
    root, told = tmp_path / "not" / "yet", []
    with pytest.raises(ValueError, match=r"does not exist; .*data\.download=true downloads it there \([\d.]+ k?B\)"):
        load(name, root=root)
    data = load(name, root=root, download=True, progress=lambda *done: told.append(done))
    assert len(data.test) == data.num_classes
    assert told[-1] == (remote.num_bytes, remote.num_bytes)
    assert held(root) == sorted(
        [remote.files[0].name, remote.folder, *(f"{remote.folder}/{member}" for member in remote.members)]
    )
    server.shutdown()
    for download_again in (True, False):  # offline
        assert load(name, root=root, download=download_again).train.hash == data.train.hash
    assert len(server.asked) == 1


def test_fashion_mnist_is_fetched_and_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    remote = published_fashion(server, monkeypatch)
    broken = server.content["/t10k-images-idx3-ubyte.gz"]
    server.content["/t10k-images-idx3-ubyte.gz"] = b"x" * len(broken)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz cannot be downloaded .*another file"):
        load("fashion-mnist", root=tmp_path / "root", download=True)
    with pytest.raises(ValueError, match=r"no Fashion-MNIST in .*data\.download=true"):
        load("fashion-mnist", root=tmp_path / "root")
    server.content["/t10k-images-idx3-ubyte.gz"] = broken
    server.asked.clear()
    data = load("fashion-mnist", root=tmp_path / "root", download=True)
    assert (len(data.train), len(data.test)) == (20, 10)
    assert [path for path, _ in server.asked] == ["/t10k-images-idx3-ubyte.gz", "/t10k-labels-idx1-ubyte.gz"]
    assert held(tmp_path / "root" / "FashionMNIST") == sorted(["raw", *(f"raw/{file.name}" for file in remote.files)])
    load("fashion-mnist", root=tmp_path / "root", download=True)
    assert len(server.asked) == 2


def test_an_archive_placed_by_hand_is_taken_without_a_request(server, tmp_path, monkeypatch):
    remote = published(server, "cifar100", monkeypatch)
    server.status = 404
    with pytest.raises(ValueError, match=r"status 404.*put it at (.*tar\.gz)") as caught:
        load("cifar100", root=tmp_path / "root", download=True)
    asked = len(server.asked)
    place = Path(re.search(r"put it at (.*\.tar\.gz)", str(caught.value))[1])
    place.write_bytes(server.content[f"/{remote.files[0].name}"])
    assert len(load("cifar100", root=tmp_path / "root", download=True).test) == 100
    assert len(server.asked) == asked


def test_data_in_another_layout_are_not_fetched(server, tmp_path, monkeypatch):
    published(server, "cifar10", monkeypatch)
    for number, member in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        (tmp_path / "root").mkdir(exist_ok=True)
        (tmp_path / "root" / member).write_bytes(batch(10, b"labels", 10, number))
    load("cifar10", root=tmp_path / "root", download=True)
    assert server.asked == []
    (tmp_path / "root" / "test_batch").unlink()
    with pytest.raises(
        ValueError, match=r"lacks test_batch; .*; or name an empty folder as data\.root, which data\.dow"
    ):
        load("cifar10", root=tmp_path / "root", download=True)


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_what_has_no_known_address_is_not_fetched(name, tmp_path):
    with pytest.raises(ValueError, match=r"data\.download=true, but .* have no known address: .*; leave it out"):
        load(name, root=None if name == "digits" else tmp_path, download=True)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_missing_data_tell_how_to_get_them(name, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "file").touch()
    for root, words in ((None, "needs data.root"), ("nowhere", "does not exist"), ("root", "which holds none")):
        with pytest.raises(ValueError, match=rf"{words}.*; data\.download=true downloads it there \(1(69|7\d) MB\)"):
            load(name, root=root and tmp_path / root)
    with pytest.raises(ValueError, match=r"needs data\.root=FOLDER"):
        load(name, download=True)
    with pytest.raises(ValueError, match="is a file"):
        load(name, root=tmp_path / "file", download=True)


def test_the_known_addresses_are_whole():
    for source in SOURCES.values():
        for file in source.remote.files if source.remote else ():
            assert re.fullmatch(r"https://[\w./~-]+\.gz", file.url)
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert file.num_bytes > 0


@pytest.mark.filterwarnings("ignore:another process is writing")
def test_two_at_once_get_a_data_set_once(server, tmp_path, monkeypatch):
    remote = published(server, "cifar100", monkeypatch)
    server.hangs = 0.3
    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(download_data_set, remote, tmp_path / "root") for _ in range(2)]:
            result.result()
    assert len(server.asked) == 1
    assert [name for name in held(tmp_path / "root") if "partial" in name or "claim" in name] == []
    assert len(load("cifar100", root=tmp_path / "root").test) == 100


def test_a_folder_that_cannot_be_made_is_told(server, tmp_path, monkeypatch):
    remote = published(server, "cifar100", monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.*; make room or give data\.root=ANOTHER_FOLDER"):
        download_data_set(remote, tmp_path / "file" / "below")
