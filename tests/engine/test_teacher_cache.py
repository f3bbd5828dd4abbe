"""A teacher's logits from an earlier run: bit for bit what it would compute, or not used at all."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from tests.engine.test_cuda_graphs import Tape, state_of
from tests.runs.small import QUIET, assert_same, command, interrupt, small, train
from vrm import models
from vrm.config import ConfigError, build_method, resolve
from vrm.contract import DataInfo, Outputs, Views
from vrm.data.views.policies import view_policy
from vrm.engine.cuda_graphs import RecordedFunction
from vrm.engine.distribution import World
from vrm.engine.step import Step
from vrm.engine.teacher_cache import TeacherCache, cache_key, check_method, differences
from vrm.models import FrozenTeacher, Preprocess, TappedNetwork
from vrm.models.weights import read_tensors
from vrm.runs import api as runs
from vrm.runs import trainer as loop
from vrm.runs.trainer import Trainer
from vrm.sweeps.local import run_all
from vrm.wording import bytes_in_words

KEY = {"teacher": "example", "batch_size": 4, "data.seed": 0, "views": {"name": "cifar", "real": [{"padding": 4}]}}
CPU = torch.device("cpu")
ALL = torch.arange(10)


def cache(folder: Path, tell: list[str] | None = None, key: Mapping[str, Any] = KEY, **options: Any) -> TeacherCache:
    """A small cache of one or two views; what it tells goes to ``tell``."""
    sizes = {"num_samples": 10, "num_classes": 3, "num_views": 2, "device": CPU}
    made = TeacherCache(folder, key, **(sizes | options))
    made.tell = ([] if tell is None else tell).append
    return made


def views_of(values_VNC: Tensor) -> Views:
    real, *virtual = map(Outputs, values_VNC)
    return Views(real, tuple(virtual))


def logits(epoch: int, num_views: int = 2) -> Tensor:
    """The teacher's logits on ten samples, (V, 10, 3), as a function of the epoch."""
    return 10 * torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(epoch))[:num_views]


def fill(made: TeacherCache, epoch: int, *, skip: int = 0) -> None:
    """Go through an epoch in batches of four, of which another process has done the first ``skip``."""
    made.begin(epoch)
    for index_B in torch.randperm(10, generator=torch.Generator().manual_seed(epoch)).split(4)[skip:]:
        if not made.known:
            made.record(index_B, views_of(logits(epoch, len(made.logits_VNC))[:, index_B]))
    made.end(epoch)


def stored(made: TeacherCache, epoch: int) -> Tensor | None:
    """The epoch as it is read, None if it would have to be computed."""
    made.begin(epoch)
    return torch.stack([view.logits for view in made.views(ALL).each()]) if made.known else None


def same_bits(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(one.view(torch.int32), other.view(torch.int32))


def assert_stored(made: TeacherCache, epoch: int) -> None:
    assert same_bits(stored(made, epoch), logits(epoch, len(made.logits_VNC)))


# ---- storing and reading ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_read_is_bitwise_what_was_recorded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever the numbers, the views, and the order and sizes of the batches."""
    folder = tmp_path_factory.mktemp("cache") / "new" / "folder"
    V, N, C = (data.draw(st.integers(1, 6)) for _ in range(3))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = data.draw(st.lists(numbers, min_size=V * N * C, max_size=V * N * C))
    values_VNC = torch.tensor(values, dtype=torch.float32).reshape(V, N, C)
    order = torch.tensor(data.draw(st.permutations(range(N))))
    filling, reading = (cache(folder, num_samples=N, num_classes=C, num_views=V) for _ in range(2))
    filling.begin(1)
    for index_B in order.split(data.draw(st.integers(1, N))):
        filling.record(index_B, views_of(values_VNC[:, index_B]))
    filling.end(1)
    reading.begin(1)
    assert (filling.known, reading.known) == (False, True)
    assert same_bits(torch.stack([view.logits for view in reading.views(order).each()]), values_VNC[:, order])


@pytest.mark.parametrize(("precision", "other"), [("float32", "float16"), ("float16", "float32")])
def test_who_fills_a_cache_learns_from_what_it_holds(tmp_path: Path, precision: str, other: str) -> None:
    """Else a run that is resumed, and reads what it stored before, would go on from other numbers. Half rounds."""
    made, exact = cache(tmp_path, precision=precision), logits(1)
    made.begin(1)
    made.record(ALL, views_of(exact))
    filling = torch.stack([view.logits for view in made.views(ALL).each()])
    made.end(1)
    assert same_bits(stored(cache(tmp_path, precision=precision), 1), filling)
    assert torch.equal(filling, exact if precision == "float32" else exact.half().float())
    torch.testing.assert_close(filling, exact, rtol=2**-11, atol=2**-25)
    (kept,) = read_tensors(tmp_path / "epoch-0001-view-0.safetensors").values()
    assert kept.dtype == getattr(torch, precision)
    with pytest.raises(ConfigError, match=f"stored as is {precision} there and {other} here"):
        cache(tmp_path, precision=other)


@pytest.mark.parametrize(
    ("precision", "value", "reason"),
    [
        ("float16", 1e5, "use teacher.cache_precision=float32"),
        ("float32", float("nan"), "NaN or infinite"),
        ("float16", float("inf"), "NaN or infinite"),
    ],
)
def test_numbers_that_cannot_be_stored_are_told(tmp_path: Path, precision: str, value: float, reason: str) -> None:
    told: list[str] = []
    made = cache(tmp_path, told, precision=precision, num_views=1)
    made.begin(1)
    made.record(ALL, views_of(torch.full((1, 10, 3), value)))
    made.end(1)
    assert len(told) == 1
    assert reason in told[0]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"keeps float32 logits, this teacher gives torch\.float64"):
        made.record(ALL, views_of(torch.zeros(1, 10, 3, dtype=torch.float64)))


def test_an_epoch_that_was_not_seen_whole_is_not_stored(tmp_path: Path) -> None:
    made = cache(tmp_path)
    fill(made, 2, skip=1)  # began late
    made.begin(2)
    made.record(ALL[:9], views_of(logits(2)[:, :9]))  # stopped early
    made.end(2)
    assert stored(cache(tmp_path), 2) is None
    fill(made, 2)
    assert_stored(cache(tmp_path), 2)


def test_one_view_uses_what_two_have_stored_and_the_other_way_round(tmp_path: Path) -> None:
    fill(cache(tmp_path), 1)
    assert_stored(cache(tmp_path, num_views=1), 1)
    fill(cache(tmp_path, num_views=1), 2)
    size = sum(path.stat().st_size for path in tmp_path.glob("epoch*"))
    text = f"teacher cache {tmp_path}: 1 epoch stored, {bytes_in_words(size)} in float32; 240 B on cpu"
    assert cache(tmp_path).describe() == text
    before = (tmp_path / "epoch-0002-view-0.safetensors").stat().st_ino
    two = cache(tmp_path)
    assert stored(two, 2) is None
    fill(two, 2)
    assert_stored(cache(tmp_path), 2)
    assert (tmp_path / "epoch-0002-view-0.safetensors").stat().st_ino == before, "it was there already"


# ---- what is not what was written ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    for epoch in (1, 2):
        fill(cache(folder), epoch)
    return folder


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_flipped_bit_and_no_cut_goes_unseen(whole: Path, data: st.DataObject) -> None:
    """In every place: the epoch is computed again, saying which file is damaged, or the numbers are untouched."""
    path = whole / f"epoch-0002-view-{data.draw(st.integers(0, 1))}.safetensors"
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = good[:place]
    if data.draw(st.booleans()):
        bad += bytes([good[place] ^ 1 << data.draw(st.integers(0, 7))]) + good[place + 1 :]
    told: list[str] = []
    try:
        path.write_bytes(bad)
        made = cache(whole, told)
        made.begin(2)
        if made.known:
            assert_stored(made, 2)
        else:
            assert len(told) == 1
            assert str(path) in told[0]
            assert "epoch 2 is computed again" in told[0]
            fill(made, 2)
            assert path.read_bytes() == good, "what was damaged is replaced"
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("other", ["epoch-0001-view-0", "epoch-0002-view-1", "another cache"])
def test_a_file_in_anothers_place_is_seen(whole: Path, tmp_path: Path, other: str) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    path = folder / "epoch-0002-view-0.safetensors"
    source = folder / f"{other}.safetensors"
    if other == "another cache":
        fill(cache(tmp_path / "other", key=KEY | {"data.seed": 1}), 2)
        source = tmp_path / "other" / path.name
    shutil.copy(source, path)
    told: list[str] = []
    made = cache(folder, told)
    assert stored(made, 2) is None
    assert f"{path} holds the logits of another" in told[0]
    fill(made, 2)
    assert_stored(cache(folder), 2)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "denied")])
def test_what_cannot_be_written_is_told_and_nothing_half_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    real = os.replace

    def fails_late(beside: Path, path: Path) -> None:
        if "view-1" in path.name:
            raise error
        real(beside, path)

    monkeypatch.setattr(os, "replace", fails_late)
    told: list[str] = []
    made = cache(tmp_path, told)
    fill(made, 1)
    assert str(error) in told[0]
    assert "epoch 1 are not stored" in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "cache.json", "epoch-0001-view-0.safetensors"]
    assert stored(cache(tmp_path), 1) is None
    monkeypatch.undo()
    fill(made, 1)
    assert_stored(cache(tmp_path), 1)


# ---- several at once -------------------------------------------------------------------------------------------------


def test_several_may_fill_one_cache_at_once(tmp_path: Path) -> None:
    """Each stores what it computed, all of it the same; what a killed one left is removed."""
    (tmp_path / ".epoch-0001-view-0.safetensors.1.tmp").write_bytes(b"half")
    first, second = cache(tmp_path), cache(tmp_path)
    for made in (first, second):
        made.begin(1)
        made.record(ALL, views_of(logits(1)))
    first.end(1)
    second.end(1)
    assert not [*tmp_path.glob(".*.tmp")]
    assert_stored(cache(tmp_path), 1)
    fill(second, 2)
    assert_stored(first, 2)


def test_of_two_set_ups_in_one_new_folder_the_later_is_refused(tmp_path: Path) -> None:
    first, second = cache(tmp_path), cache(tmp_path, key=KEY | {"data.seed": 1})
    fill(first, 1)
    with pytest.raises(ConfigError, match=r"data\.seed is 0 there and 1 here"):
        fill(second, 1)


class Meeting(World):
    """A process's place among several that meet in memory: each is a thread."""

    shared: ClassVar[dict[str, Any]] = {}

    def sum(self, value: Tensor) -> Tensor:
        self.shared[f"value{self.rank}"] = value.clone()
        self.shared["barrier"].wait(30)
        total = sum(self.shared[f"value{rank}"] for rank in range(self.size))
        self.shared["barrier"].wait(30)
        assert isinstance(total, Tensor)
        return total

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(int(flag))))


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_record_their_shares_and_one_stores_them(tmp_path: Path, damaged: bool) -> None:
    """The bits of a minus zero included. What one process cannot read, none reads."""
    Meeting.shared["barrier"] = threading.Barrier(2)
    values = logits(1)
    values[0] = -0.0
    fill(cache(tmp_path), 2)
    if damaged:
        path = tmp_path / "epoch-0002-view-0.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    told: list[str] = []

    def process(rank: int) -> None:
        world = Meeting(rank, 2)
        made = cache(tmp_path, told if rank else None, world=world)
        made.begin(1)
        for index_B in ALL.split(4):
            made.record(world.part(index_B), views_of(values[:, world.part(index_B)]))
        made.end(1)
        made.begin(2)
        assert made.known == (not damaged)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(process, rank) for rank in range(2)]:
            done.result(60)
    assert same_bits(stored(cache(tmp_path), 1), values)
    assert len(told) == damaged


# ---- what is refused -------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Words of a run and what goes into a key beside them."""

    words: tuple[str, ...] = ()
    weights: int = 0
    mean: float = 0.5
    policy: str = "digits"
    data: str = "a" * 64
    processes: int = 1
    wrapped: bool = False
    probabilities: bool = False

    def key(self) -> dict[str, Any]:
        words = ["student=resnet8", "teacher=resnet8", "method=kd", "teacher.weights=w.pth", *self.words]
        torch.manual_seed(self.weights)
        network = models.create("resnet8", num_classes=10)
        network = torch.nn.Sequential(network, Named()) if self.wrapped else network
        preprocess = Preprocess((self.mean,) * 3, (0.25,) * 3)
        tapped = TappedNetwork(network, (), preprocess, input_size=(8, 8), probabilities=self.probabilities)
        return cache_key(
            resolve("distill", "digits", words).run,
            FrozenTeacher(tapped),
            architecture="resnet8",
            policy=view_policy(self.policy),
            data_hash=self.data,
            device=CPU,
            processes=self.processes,
        )


class Named(torch.nn.Identity):
    """A module that shows its address."""

    def extra_repr(self) -> str:
        return f"function=<function f at {hex(id(self))}>"


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Pair(weights=1), "teacher weights is [0-9a-f]{12}.. there and [0-9a-f]{12}.. here"),
        (Pair(wrapped=True), "teacher structure is"),
        (Pair(mean=0.4), "input is"),
        (Pair(probabilities=True), "outputs is logits there and probabilities here"),
        (Pair(policy="none"), r"views\.name is digits there and none here"),
        (Pair(data="b" * 64), "training data is aaaaaaaaaaaa.. there and bbbbbbbbbbbb.. here"),
        (Pair(processes=2), "processes is 1 there and 2 here"),
        (Pair(("batch_size=32",)), "batch_size is 64 there and 32 here"),
        (Pair(("accumulate=2",)), "accumulate is 1 there and 2 here"),
        (Pair(("seed=1",)), r"data\.seed is 0 there and 1 here"),
        (Pair(("data.seed=1",)), r"data\.seed is 0 there and 1 here"),
        (Pair(("precision=bfloat16",)), "precision is float32 there and bfloat16 here"),
        (Pair(("compile=true",)), "compile is False there and True here"),
        (Pair(("channels_last=true",)), "channels_last is False there and True here"),
    ],
)
def test_another_set_up_is_refused_by_name(tmp_path: Path, other: Pair, named: str) -> None:
    fill(cache(tmp_path, key=Pair().key()), 1)
    with pytest.raises(ConfigError, match=named) as refused:
        cache(tmp_path, key=other.key())
    assert "Give teacher.cache=ANOTHER_FOLDER" in str(refused.value)


def test_the_key_has_versions_and_threads_and_nothing_without_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of the method, no optimiser, no seed where ``data.seed`` is given, no address of a module."""
    before = Pair().key()
    words = ("method.temperature=3", "optimizer.lr=0.1", "epochs=100", "run=elsewhere", "views=2")
    assert Pair(words).key() == before
    assert Pair(("seed=5", "data.seed=0", "deterministic=true")).key() == before
    assert Pair(wrapped=True).key() == Pair(wrapped=True).key()
    monkeypatch.setattr(torch, "__version__", "0.1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert [text.split(" is ")[0] for text in differences(before, Pair().key())] == ["threads", "torch"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"name": "ce"}, "learns from no teacher"),
        ({"name": "at"}, "reads more of its teacher: stages"),
        ({"name": "rkd"}, "reads more of its teacher: pooled"),
        ({"name": "ofd", "teacher_batch_statistics": True}, "that of OFD with these options normalises by each batch"),
        ({"name": "vrm", "vertices": "features"}, "reads more of its teacher: pooled"),
        *(({"name": name}, None) for name in ("kd", "dkd", "vrm", "dot")),
    ],
)
def test_methods_that_need_more_than_logits_are_refused(method: dict[str, Any], reason: str | None) -> None:
    networks = [models.create("resnet20", num_classes=10) for _ in range(2)]
    probes = [models.probe(network, name="resnet20", input_size=(8, 8)) for network in networks]
    info = DataInfo(20, 10, 4, torch.arange(20) % 10)
    before = torch.get_rng_state()
    if reason is None:
        check_method(build_method(method), *probes, info)
    else:
        with pytest.raises(ConfigError, match=reason):
            check_method(build_method(method), *probes, info)
    assert torch.equal(torch.get_rng_state(), before)


def test_folders_that_are_no_cache_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        cache(tmp_path / "file")
    with pytest.raises(ConfigError, match="holds other files"):
        cache(tmp_path)
    (tmp_path / "cache.json").write_text('{"schema": 1')
    with pytest.raises(ConfigError, match=r"cache\.json is damaged"):
        cache(tmp_path)
    (tmp_path / "cache.json").write_text('{"schema": 1, "key": {}}')
    with pytest.raises(ConfigError, match="schema 1, this version reads schema 2"):
        cache(tmp_path)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What steps did with a cache, a letter each: ``r`` for reading, ``w`` for recording."""
    found: list[str] = []
    real = TeacherCache.views

    def spy(self: TeacherCache, index_B: Tensor) -> Views:
        found.append("r" if self.known else "w")
        return real(self, index_B)

    monkeypatch.setattr(TeacherCache, "views", spy)
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("epoch*"))


EPOCHS = {
    "kd": ["epoch-0001-view-0", "epoch-0002-view-0"],
    "vrm": [f"epoch-000{epoch}-view-{view}" for epoch in (1, 2) for view in (0, 1)],
}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("kd", []),
        ("vrm", []),
        ("kd", ["precision=bfloat16", "accumulate=2", "batch_size=10"]),
        ("vrm", ["nan=skip", "ema=0.9", "channels_last=true"]),
    ],
)
def test_a_cache_changes_nothing(teacher: Path, tmp_path: Path, used: list[str], method: str, words: list[str]) -> None:
    """Without one, filling one, reading one: weights, optimiser, buffers and metrics are bitwise the same."""
    words = [f"method={method}", f"teacher={teacher}/", *words]
    train(small(tmp_path / "none", *words))
    assert used == []
    cached = [*words, f"teacher.cache={tmp_path / 'cache'}"]
    train(small(tmp_path / "fill", *cached))
    assert set(used) == {"w"}
    assert files(tmp_path / "cache") == EPOCHS[method]
    used.clear()
    train(small(tmp_path / "read", *cached))
    assert set(used) == {"r"}
    assert_same(tmp_path / "none", tmp_path / "fill")
    assert_same(tmp_path / "none", tmp_path / "read")


@pytest.mark.parametrize("method", ["kd", "vrm"])
def test_filling_and_reading_survive_an_interruption(
    teacher: Path, tmp_path: Path, used: list[str], method: str
) -> None:
    """An epoch that was gone through in two pieces is not stored; one that is read may begin in its middle."""
    words = [f"method={method}", f"teacher={teacher}/"]
    train(small(tmp_path / "none", *words))
    cached = [*words, f"teacher.cache={tmp_path / 'cache'}"]
    interrupt(small(tmp_path / "fill", *cached), 2)
    runs.resume(tmp_path / "fill", console=QUIET, quiet=True)
    assert_same(tmp_path / "none", tmp_path / "fill")
    first, second = EPOCHS[method][: len(EPOCHS[method]) // 2], EPOCHS[method][len(EPOCHS[method]) // 2 :]
    assert files(tmp_path / "cache") == second
    interrupt(small(tmp_path / "whole", *words, f"teacher.cache={tmp_path / 'other'}"), 4)
    assert files(tmp_path / "other") == first, "an epoch that was gone through when the signal came"
    used.clear()
    for stop in (2, 6):
        interrupt(small(tmp_path / f"read{stop}", *cached), stop)
        runs.resume(tmp_path / f"read{stop}", console=QUIET, quiet=True)
        assert_same(tmp_path / "none", tmp_path / f"read{stop}")
    assert used[0] == "w"
    assert used[-1] == "r"


def test_a_killed_run_leaves_a_cache_that_holds(teacher: Path, tmp_path: Path) -> None:
    words = ["method=kd", f"teacher={teacher}/", "epochs=12", "data.labels_per_class=5"]
    base = ["student=resnet8", "batch_size=8", "threads=1", "log_every=2"]
    cached = [*words, f"teacher.cache={tmp_path / 'cache'}"]
    process = command("distill", "digits", *base, *cached, f"run={tmp_path / 'fill'}")
    while len(files(tmp_path / "cache")) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "fill" / "model.json").exists()
    runs.resume(tmp_path / "fill", console=QUIET, quiet=True)
    train(small(tmp_path / "read", *cached))
    train(small(tmp_path / "none", *words))
    assert_same(tmp_path / "none", tmp_path / "fill")
    assert_same(tmp_path / "none", tmp_path / "read")
    assert len(files(tmp_path / "cache")) == 12


def test_a_damaged_epoch_is_computed_again_and_told(teacher: Path, tmp_path: Path, used: list[str]) -> None:
    """Also where logits are stored in half precision: who fills, who reads and who repairs learn from the same."""
    words = ["method=kd", f"teacher={teacher}/", f"teacher.cache={tmp_path / 'cache'}"]
    words.append("teacher.cache_precision=float16")
    train(small(tmp_path / "fill", *words))
    path = tmp_path / "cache" / "epoch-0002-view-0.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-5] + bytes([good[-5] ^ 16]) + good[-4:])
    used.clear()
    out = io.StringIO()
    runs.start(small(tmp_path / "read", *words), console=Console(file=out, width=1000))
    assert re.search(r"epoch-0002-view-0\.safetensors was changed or cut.* computed again", out.getvalue())
    assert "".join(used) == "rrrrwwww"
    assert_same(tmp_path / "fill", tmp_path / "read")
    assert path.read_bytes() == good


def test_runs_side_by_side_share_a_cache(teacher: Path, tmp_path: Path) -> None:
    words, shared = [f"teacher={teacher}/", "threads=1"], f"teacher.cache={tmp_path / 'cache'}"
    jobs = [small(tmp_path / method, f"method={method}", *words, shared) for method in ("kd", "vrm")]
    run_all(jobs, console=QUIET, num_workers=2)
    for method in ("kd", "vrm"):
        train(small(tmp_path / f"{method}-none", f"method={method}", *words))
        assert_same(tmp_path / method, tmp_path / f"{method}-none")
    assert files(tmp_path / "cache") == EPOCHS["vrm"]
    with pytest.raises(ConfigError, match=r"data\.seed is 0 there and 1 here"):
        train(small(tmp_path / "other", "method=kd", *words, shared, "seed=1"))
    train(small(tmp_path / "same", "method=kd", *words, shared, "seed=1", "data.seed=0"))


def test_a_recorded_step_reads_and_records(
    teacher: Path, tmp_path: Path, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs that are read and epochs that are computed have recordings of their own, on the same tensors."""
    words = ["method=kd", f"teacher={teacher}/", "data.labels_per_class=8", "epochs=4"]
    train(small(tmp_path / "none", *words))
    tapes = []

    def captured(self: Trainer, step: Step) -> RecordedFunction:
        tapes.append(Tape())
        tapes[-1].watched = lambda: state_of(self, step)
        return RecordedFunction(step, tapes[-1], variant=lambda: step.variant)

    monkeypatch.setattr(loop.Trainer, "_record", captured)
    cached = [*words, f"teacher.cache={tmp_path / 'cache'}"]
    train(small(tmp_path / "fill", *cached))
    for epoch in (2, 4):
        (tmp_path / "cache" / f"epoch-{epoch:04d}-view-0.safetensors").unlink()
    used.clear()
    train(small(tmp_path / "both", *cached))
    assert [tape.recordings for tape in tapes] == [1, 2]
    assert tapes[1].replays == 2 * 10 + 2 * 10 - 2 * 3
    assert set(used) == {"r", "w"}
    assert_same(tmp_path / "none", tmp_path / "fill")
    assert_same(tmp_path / "none", tmp_path / "both")
    assert len(files(tmp_path / "cache")) == 4
