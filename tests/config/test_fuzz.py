"""Whatever lies in a file or stands on the command line is read, or explained: never an error of another kind."""

from __future__ import annotations

import json
import random
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.runs.small import STATE
from vrm import config, methods, models
from vrm.cli import main
from vrm.config import ConfigError
from vrm.config.resolve import architecture
from vrm.models import Card, load_weights, save_weights
from vrm.models.weights import read_tensors
from vrm.runs.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from vrm.runs.errors import RunError
from vrm.runs.folder import read_run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def outcome(call: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """What ``call`` gives; ``None`` if it raises one of ``kinds``, which has to say something."""
    message = None
    try:
        found = call()
    except kinds as error:
        message = str(error)
    if message is None:
        return found
    assert len(message) > 10, message
    return None


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with a few bytes overwritten, cut out, put in, or moved."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(result)))
        end = min(len(result), place + draw(st.integers(0, 12)))
        match draw(st.sampled_from(["write", "cut", "put in", "flip", "end"])):
            case "write":
                result[place:end] = draw(st.binary(min_size=end - place, max_size=end - place))
            case "cut":
                del result[place:end]
            case "put in":
                result[place:place] = draw(st.binary(max_size=12))
            case "flip" if place < len(result):
                result[place] ^= 1 << draw(st.integers(0, 7))
            case "end":
                del result[place:]
    return bytes(result)


# ---- settings --------------------------------------------------------------------------------------------------------

KEYS = [
    *("seed", "epochs", "batch_size", "run", "views", "student", "teacher", "model", "method", "data", "optimizer"),
    *("schedule", "checkpoint", "checkpoint.every", "precision", "pair", "variant", "student.options", "data.root"),
    *("optimizer.betas", "schedule.milestones", "method.temperature", "method.name.x", "teacher.weights", "recipe"),
    *("ema", "nan", "steps", "timeout", "", ".", "a..b", "__class__", "method.__init__"),
]
VALUES = [
    *("1", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "1e-320", "9" * 5000, "0x" + "f" * 400, "0b1", "1:30", "~", ""),
    *("true", "no", "[", "]", "[1, 2", "{a: b}", "{a: 1, a: 2}", "? a", "- a", "a: b: c", "2001-99-99", "2001-01-01"),
    *("!!python/object/apply:os.system [echo]", "!!str 1", "!x", "&a [*a]", "*a", "<<: {a: 1}", "\t", "%YAML 9.9", "="),
    *("\0", "\x1b[31m", "\u2028", "[" * 400, "{a: " * 400, "'", '"\\x', "|", "> a", "@", "`"),
    *("kd", "vrm", "resnet8", "a/"),
    *("/dev/null", "/", "../..", "timm:x", "torchvision:", ":", "resnet8/resnet8"),
]
WORDS = st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=6)) | st.text(
    max_size=10
)


@settings(max_examples=200)
@given(st.sampled_from(["train", "distill"]), st.lists(WORDS, max_size=4))
@example("distill", ["method=vrm", "student=resnet8", "seed=" + "9" * 5000])
@example("distill", ["method=vrm", "student=resnet8", "method.alpha=" + "[" * 3000])
def test_words(verb: Any, words: list[str]) -> None:
    given = {word.partition("=")[0] for word in words}
    network = ["student=resnet8", "method=kd"] if verb == "distill" else ["model=resnet8"]
    words = [*(word for word in network if word.partition("=")[0] not in given), *words]
    resolved = outcome(lambda: config.resolve(verb, "digits", words), ConfigError)
    if resolved is not None:
        outcome(lambda: config.build_method(resolved.run.method), ConfigError)
        text = config.dump(resolved.run)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(text, encoding="utf-8")
            again = config.restore(path)
        assert config.dump(again) == text


@given(st.lists(WORDS, max_size=3))
def test_words_of_an_evaluation(words: list[str]) -> None:
    outcome(lambda: config.resolve_evaluation("digits", words), ConfigError)


RECIPES = [path.read_bytes() for path in sorted((Path(config.__file__).parents[1] / "recipes").glob("*.yaml"))]


@given(st.sampled_from(RECIPES).flatmap(changed) | st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
@example(b"a: !!python/object/apply:os.system [echo]")
@example(b"a: &x [1]\nb: *x")
@example(b"[" * 5000)
@example(b"{a: " * 5000)
@example(b"a: " + b"9" * 5000)
@example(b"a: 2001-99-99")
@example(b"? [a]\n: b")
@example(b"data: digits\ndata: cifar100")
def test_a_recipe(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.yaml"
        path.write_bytes(content)
        outcome(lambda: config.resolve("distill", str(path), ["student=resnet8", "method=kd", "epochs=1"]), ConfigError)
        path.rename(path.with_name("config.yaml"))
        outcome(lambda: config.restore(path.with_name("config.yaml")), ConfigError)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!binary", "!!set", "!own"]
)
def test_tags_are_refused_wherever_yaml_is_read(tmp_path: Path, tag: str) -> None:
    sentinel = tmp_path / "sentinel"
    text = f"{tag} ['{sentinel}']"
    path = tmp_path / "config.yaml"
    path.write_text(f"epochs: {text}")
    for read in (
        lambda: config.resolve("distill", "digits", ["student=resnet8", "method=kd", f"epochs={text}"]),
        lambda: config.resolve("distill", str(path), ["student=resnet8", "method=kd"]),
        lambda: config.restore(path),
        lambda: read_run(tmp_path),
    ):
        with pytest.raises((ConfigError, RunError), match=r"tag|plain YAML"):
            read()
    assert not sentinel.exists()


def test_references_that_stand_for_gigabytes_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="anchors and aliases are refused"):
        config.read_yaml("\n".join(lines).encode(), "bomb")
    with pytest.raises(ConfigError, match="at most 200,000 are read"):
        config.read_yaml(b"a: " + b"x" * 200_000, "long")


# ---- weights ---------------------------------------------------------------------------------------------------------


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.create("resnet8", num_classes=10)


SMALL = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(4, dtype=torch.bfloat16)}


def written(suffix: str, *, old: bool = False) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        if suffix == ".safetensors":
            save_weights(network(), path)
        else:
            torch.save({"model": SMALL, "epoch": 3}, path, _use_new_zipfile_serialization=not old)
        return path.read_bytes()


PICKLED = [written(".pth"), written(".pth", old=True)]


@settings(max_examples=100)
@given(st.sampled_from([".pth", ".tar"]), st.sampled_from(PICKLED).flatmap(changed) | st.binary(max_size=200))
def test_a_pytorch_checkpoint(suffix: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        path.write_bytes(content)
        target = network()
        outcome(lambda: load_weights(target, path), ValueError)
        assert [each.name for each in Path(folder).iterdir()] == [path.name]


OPCODES = st.lists(
    st.sampled_from(
        [bytes([code]) for code in b"()]}0123abcdefghijlmnopqrstuvX\x80\x81\x85\x86\x87\x88\x8c\x93\x94\x95Q."]
    )
    | st.binary(max_size=3)
    | st.sampled_from(
        [b"cos\nsystem\n", b"cbuiltins\nexec\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
    ),
    max_size=20,
).map(b"".join)


@given(OPCODES)
def test_any_pickle_in_an_archive(program: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "w.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/byteorder", b"little")
            archive.writestr("archive/data/0", bytes(24))
        outcome(lambda: load_weights(network(), path), ValueError)


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "F8_E8M0", "C64", "BOOL", "f32", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**63, 2**64]), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40) | st.just(2**63), min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "../a", "", "__metadata__"]) | st.text(max_size=4), ENTRY | JSON)


@settings(max_examples=100)
@given(HEADERS, st.integers(-9, 9) | st.sampled_from([2**31, 2**62]), st.integers(0, 60))
def test_a_safetensors_header(header: dict[str, Any], more: int, size: int) -> None:
    """Its length cut or huge, offsets that overlap or lie outside, types and shapes that are none."""
    text = json.dumps(header).encode()
    content = struct.pack("<Q", max(0, len(text) + more)) + text + bytes(size)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        path.write_bytes(content)
        found = outcome(lambda: read_tensors(path), ValueError)
        assert found is None or all(isinstance(value, torch.Tensor) for value in found.values())


# ---- run folders -----------------------------------------------------------------------------------------------------

CARD = json.loads(
    """{"architecture": "resnet8", "options": {}, "num_classes": 2, "classes": ["a", "b"], "input_size": [8, 8],
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "task": "classification", "scores": {"top1": 50.0},
    "data": "digits", "weights_sha256": "0"}"""
)


@settings(max_examples=100)
@given(
    st.just(json.dumps(CARD).encode()).flatmap(changed)
    | st.binary(max_size=60)
    | JSON.map(json.dumps).map(str.encode)
    | st.tuples(st.sampled_from(sorted(CARD)), JSON).map(lambda pair: json.dumps(CARD | dict([pair])).encode())
)
@example(b"[" * 100_000)
@example(b'{"a": ' * 100_000)
@example(json.dumps(CARD | {"seal": 3}).encode())
@example(b'{"num_classes": ' + b"9" * 5000 + b"}")
def test_a_card(content: bytes) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.json").write_bytes(content)
        card = outcome(lambda: Card.read(folder), ValueError)
        assert card is None or card.num_classes == len(card.classes)
        outcome(lambda: architecture(f"{folder}/"), ConfigError)
        (folder / "config.yaml").write_text("seed: 1")
        outcome(lambda: read_run(folder), RunError)


LINE = json.dumps({"step": 1, "epoch": 1, "split": "test", "name": "top1", "value": 1.0}).encode() + b"\n"


@settings(max_examples=100)
@given(
    st.sampled_from(["metrics.jsonl", "timings.jsonl", "environment.json", "model.json", "config.yaml"]),
    st.just(LINE * 3).flatmap(changed) | st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode),
)
def test_a_file_of_a_run(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text("seed: 1")
        (Path(folder) / name).write_bytes(content)
        found = outcome(lambda: read_run(Path(folder)), RunError)
        if found is not None:
            assert isinstance(found.finished, bool)
            found.curve("test", "top1")


def checkpoint(folder: Path, step: int, state: dict[str, Any] | None = None) -> Path:
    path = folder / f"step-{step:09d}"
    write_checkpoint(path, SMALL, {**STATE, **(state or {}), "step": step})
    return path


@settings(max_examples=100)
@given(st.sampled_from(["manifest.json", "state.json", "tensors.safetensors"]), st.data())
def test_a_file_of_a_checkpoint(name: str, data: st.DataObject) -> None:
    """Changed anywhere it is refused by its name: never half read, never as another value."""
    with TemporaryDirectory() as folder:
        path = checkpoint(Path(folder), 7, {"best": {"top1": 0.1}})
        before = (path / name).read_bytes()
        content = data.draw(changed(before) | st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode))
        assume(content != before)
        (path / name).write_bytes(content)
        try:
            same = name == "manifest.json" and json.loads(content) == json.loads(before)
        except (ValueError, RecursionError):
            same = False
        if not same:  # a manifest may be laid out anew
            with pytest.raises(DamagedCheckpoint, match=re.escape(str(path))):
                read_checkpoint(path)


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_any_state_comes_back_or_is_refused(state: dict[str, Any]) -> None:
    """Also one that was written with sums that fit, by someone else."""
    with TemporaryDirectory() as name:
        state = json.loads(json.dumps({**STATE, **state})) | {"step": 7}
        path = Path(name) / "step-000000007"
        write_checkpoint(path, SMALL, state)
        found = outcome(lambda: read_checkpoint(path), DamagedCheckpoint)
        if found is not None:
            assert json.dumps(found.state, sort_keys=True) == json.dumps(state, sort_keys=True)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run ``vrm`` here; returns its exit code and all it printed."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vrm", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.parametrize("seed", range(12))
def test_the_command_line_explains_what_it_cannot_do(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)
    verb, network = draw.choice(
        [("train", "model=resnet8"), ("distill", "student=resnet8"), ("doctor", "model=resnet8")]
    )
    words = [f"{draw.choice(KEYS)}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 3))]
    code, shown = command(verb, "digits", network, "epochs=-1", *words)  # epochs=-1: it never trains
    assert code in (1, 2), shown
    assert shown.strip()
    assert "Traceback" not in shown


def test_every_method_explains_every_value(tmp_path: Path) -> None:
    """Options of each method, one at a time, each with every fourth of the odd values: another fourth for the next."""
    for method in methods.names():
        for number, option in enumerate(methods.options(methods.load(method))):
            for value in VALUES[number % 4 : 40 : 4]:
                words = ["student=resnet8", f"method={method}", f"method.{option}={value}"]
                resolved = outcome(lambda words=words: config.resolve("distill", "digits", words), ConfigError)
                if resolved is not None:
                    outcome(lambda run=resolved.run: config.build_method(run.method), ConfigError)


TEXTS = [
    "a: b",
    "- a",
    "\u2028",
    "\x85",
    *("=", "~", "null", "no", "1e3", "2001-01-01", "!x", "&a", "*a", "é", "0x1"),
]


@pytest.mark.parametrize("value", TEXTS)
def test_yaml_says_what_it_wrote(value: str) -> None:
    assert config.read_yaml(yaml.safe_dump({"name": value}).encode(), "text") == {"name": value}
