"""Downloads, from a server of our own on this machine."""

import contextlib
import hashlib
import re
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tests.data.layouts import sample, write_idx, write_pickles
from vrm.data import SOURCES, load
from vrm.data.datasets import download, fashion_mnist
from vrm.data.datasets.download import RemoteFile, download_data_set


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        told = self.server.told
        told.asked.append(self.path)
        if told.hangs:
            told.hangs.wait(10)
        if self.path not in told.content:
            return self.send_error(404)
        content = told.content[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[: told.sends])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """What it offers by path, how much of each file it sends, whether it hangs, and what it was asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        http.told = SimpleNamespace(content={}, sends=None, hangs=None, asked=[], port=http.server_port)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http.told
        http.shutdown()
        thread.join()


@pytest.fixture
def publish(server, tmp_path, monkeypatch):
    """Serve small files in the place of the published ones, and let the source know their checksums."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")

    def publish(name):
        source, made = SOURCES[name], tmp_path / "published"
        if name == "fashion-mnist":
            write_idx(made, zipped=True)
            contents = [(made / file.name).read_bytes() for file in source.remote.files]
        else:
            label_key, names = (b"labels", None) if name == "cifar10" else (b"fine_labels", ["train"])
            train = sample(100, classes=10 if name == "cifar10" else 100)
            write_pickles(made / source.remote.folder, label_key=label_key, names=names, train=train)
            (made / source.remote.folder / "readme.html").touch()
            with tarfile.open(tmp_path / "archive", "w:gz") as archive:
                archive.add(made / source.remote.folder, source.remote.folder)
            contents = [(tmp_path / "archive").read_bytes()]
        files = []
        for file, content in zip(source.remote.files, contents, strict=True):
            server.content[f"/{file.name}"] = content
            url = f"http://127.0.0.1:{server.port}/{file.name}"
            files.append(RemoteFile(url, hashlib.sha256(content).hexdigest(), len(content)))
        remote = replace(source.remote, files=tuple(files))
        monkeypatch.setitem(SOURCES, name, replace(source, remote=remote))
        return remote

    return publish


def held(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_data_set_is_fetched_once_and_only_if_asked_for(publish, server, tmp_path, name):
    remote, root, seen = publish(name), tmp_path / "not" / "yet", []
    with pytest.raises(ValueError, match=r"does not exist; .*data\.download=true downloads it there \([\d.]+ k?B\)"):
        load(name, root=root)
    assert server.asked == []
    data = load(name, root=root, download=True, progress=lambda *done: seen.append(done))
    assert len(data.test) == 10
    assert seen[0][0] == 0
    assert seen[-1][0] >= seen[-1][1] == remote.files[-1].num_bytes
    members = remote.members or [file.name for file in remote.files]
    assert held(root) >= {f"{remote.folder}/{member}" for member in members}
    assert not any(re.search("readme|partial", path) for path in held(root))
    for again in (True, False):
        assert load(name, root=root, download=again).train.hash == data.train.hash
    assert server.asked == [f"/{file.name}" for file in remote.files]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("other", "the server has another file, of SHA-256 [0-9a-f]{64}"),
        ("cut", "retrieval incomplete: got only 100 out of .* bytes"),
        ("absent", "HTTP Error 404: Not Found"),
        ("silent", "timed out"),
        ("unreachable", "Connection refused"),
        ("unknown", "Name or service not known|name resolution"),
    ],
)
def test_what_cannot_be_fetched_is_told_in_a_sentence_and_leaves_nothing(
    publish, server, tmp_path, monkeypatch, trouble, reason
):
    remote, root = publish("cifar100"), tmp_path / "root"
    (path, content), hangs = next(iter(server.content.items())), threading.Event()
    if trouble == "other":
        server.content[path] = content[:-1] + b"x"
    elif trouble == "cut":
        server.sends = 100
    elif trouble == "absent":
        server.content.clear()
    elif trouble == "silent":
        server.hangs = hangs
        monkeypatch.setattr(download, "_TIMEOUT", 0.1)
    else:
        url = "http://127.0.0.1:9/file.gz" if trouble == "unreachable" else "http://no-such-host.invalid/file.gz"
        wrong = replace(remote, files=(replace(remote.files[0], url=url),))
        monkeypatch.setitem(SOURCES, "cifar100", replace(SOURCES["cifar100"], remote=wrong))
    with pytest.raises(
        ValueError, match=rf"http\S* cannot be downloaded \(.*({reason}).*\); get it .* put it at "
    ) as caught:
        load("cifar100", root=root, download=True)
    hangs.set()
    assert held(root) == set()
    place = re.search(r"put it at (\S+\.gz),", str(caught.value))[1]
    (tmp_path / "archive").rename(place)
    server.asked.clear()
    assert len(load("cifar100", root=root, download=True).test) == 10
    assert server.asked == []


def test_the_files_that_came_before_one_failed_are_not_fetched_again(publish, server, tmp_path):
    remote = publish("fashion-mnist")
    last = f"/{remote.files[-1].name}"
    content = server.content.pop(last)
    with pytest.raises(ValueError, match="404"):
        load("fashion-mnist", root=tmp_path, download=True)
    with pytest.raises(ValueError, match=r"no Fashion-MNIST in .*data\.download=true"):
        load("fashion-mnist", root=tmp_path)
    server.content[last] = content
    server.asked.clear()
    load("fashion-mnist", root=tmp_path, download=True)
    assert server.asked == [last]


def test_what_a_killed_download_left_is_repaired(publish, server, root):
    remote = publish("cifar100")
    name = remote.files[0].name
    (root / f"{name}.partial").write_bytes(b"half")
    (root / f".{remote.folder}.new").mkdir()
    (root / f".{remote.folder}.new" / "train").write_bytes(b"half")
    assert len(load("cifar100", root=root, download=True).test) == 10
    assert held(root) == {name, f"{remote.folder}/train", f"{remote.folder}/test"}


@pytest.mark.parametrize("right", [True, False])
def test_a_cut_file_in_the_place_is_replaced_only_by_the_right_one(publish, server, root, right):
    name = publish("cifar100").files[0].name
    (root / name).write_bytes(b"cut")
    if not right:
        server.content.clear()
    with (
        pytest.warns(UserWarning, match=f"{name} is another file than .* will be replaced"),
        contextlib.nullcontext() if right else pytest.raises(ValueError, match="404"),
    ):
        load("cifar100", root=root, download=True)
    assert ((root / name).read_bytes() == b"cut") is not right


def test_data_in_another_layout_are_not_fetched(publish, server, root):
    publish("cifar10")
    write_pickles(root)
    load("cifar10", root=root, download=True)
    (root / "test_batch").unlink()
    with pytest.raises(ValueError, match=r"lacks test_batch; .*; or name an empty folder as data\.root"):
        load("cifar10", root=root, download=True)
    assert server.asked == []


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_what_has_no_known_address_is_not_fetched(name, root):
    with pytest.raises(ValueError, match=r"data\.download=true, but .* have no known address: .*; leave it out"):
        load(name, root=None if name == "digits" else root, download=True)


def test_missing_data_tell_how_to_get_them(root):
    (root / "file").touch()
    (root / "empty").mkdir()
    for place, words in ((None, "needs data.root"), ("nowhere", "does not exist"), ("empty", "which holds none")):
        with pytest.raises(ValueError, match=rf"{words}.*; data\.download=true downloads it there \(169 MB\)"):
            load("cifar100", root=place and root / place)
    with pytest.raises(ValueError, match=r"needs data\.root=FOLDER"):
        load("cifar100", download=True)
    with pytest.raises(ValueError, match="is a file"):
        load("cifar100", root=root / "file", download=True)


def test_two_at_once_get_a_data_set_once(publish, server, root):
    remote = publish("cifar100")
    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(download_data_set, remote, root) for _ in range(2)]:
            result.result()
    assert len(server.asked) == 1


def test_a_folder_that_cannot_be_made_is_told(publish, root):
    (root / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.*; make room or give data\.root=ANOTHER_FOLDER"):
        load("cifar100", root=root / "file" / "below", download=True)
