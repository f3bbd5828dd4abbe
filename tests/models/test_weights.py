"""Weights: what loads, what is refused and why, and what names them."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from vrm.models import create, load_weights, save_tensors, save_weights, unwrap, weights_hash
from vrm.models.weights import fill_network, read_tensors, serialise


def network(seed: int = 0, num_classes: int = 10, name: str = "resnet8") -> nn.Module:
    torch.manual_seed(seed)
    return create(name, num_classes=num_classes)


SOURCE = network(1)
STATE = SOURCE.state_dict()


def loaded(path: str | Path, name: str = "resnet8", num_classes: int = 10) -> nn.Module:
    """A network with the weights of a file."""
    target = network(name=name, num_classes=num_classes)
    load_weights(target, path)
    return target


def refused(path: Path, message: str, target: nn.Module | None = None) -> None:
    """Loading raises an error with this message, and changes nothing."""
    target = target or network()
    before = weights_hash(target)
    with pytest.raises(ValueError, match=message):
        load_weights(target, path)
    assert weights_hash(target) == before


def test_files_are_plain_safetensors_that_name_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(SOURCE, path)
    for given_path in (path, tmp_path, str(tmp_path)):
        assert weights_hash(loaded(given_path)) == weights_hash(SOURCE)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "sha256": weights_hash(SOURCE)}
    found = safetensors.torch.load_file(path)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)
    first = path.read_bytes()
    save_weights(SOURCE, path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["model.safetensors"]


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.float8_e4m3fn),
]


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    )
)
def test_any_tensors_come_back_bitwise(shapes: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    draw = torch.Generator().manual_seed(len(shapes))
    tensors = {n: torch.randint(0, 2, shape, generator=draw).to(dtype) for n, (dtype, shape) in shapes.items()}
    content = serialise(tensors)
    assert content == serialise(dict(reversed(tensors.items()))), "the order of the names does not matter"
    found = safetensors.torch.load(content)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].double().tolist() == tensor.double().tolist()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "epoch": 240, "best_acc": torch.tensor(72.63), "optimizer": {"state": {}, "lr": 0.1}},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
        {"model": {"state_dict": STATE}},
        {"model": None, "state_dict": STATE},
    ],
    ids=["plain", "model", "module", "nested", "beside nothing"],
)
def test_checkpoints_of_others(tmp_path: Path, suffix: str, zipped: bool, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / f"ckpt{suffix}", _use_new_zipfile_serialization=zipped)
    assert weights_hash(loaded(tmp_path / f"ckpt{suffix}")) == weights_hash(SOURCE)


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w"])
def test_safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    save_weights(SOURCE, tmp_path / name)
    assert weights_hash(loaded(tmp_path / name)) == weights_hash(SOURCE)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, r"is damaged: its tensors do not have the SHA-256")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_values_beside_the_weights_are_let_in_and_not_made(tmp_path: Path, zipped: bool) -> None:
    history = defaultdict(list, {"loss": [0.1]})
    beside = {
        "acc": np.float64(0.7),
        "mean": np.mean([0.7, 0.8]),
        "epoch": np.int32(3),
        "generator": np.random.default_rng(0).bit_generator.random_raw(2),
        "dtype": np.dtype("f4"),
        "folder": Path("x"),
        "args": argparse.Namespace(lr=0.1),
        "counts": Counter("aab"),
        "history": history,
    }
    torch.save({"model": defaultdict(list, STATE), **beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert weights_hash(loaded(tmp_path / "w.pth")) == weights_hash(SOURCE)
    torch.save({"model": STATE, "x": Malicious(tmp_path / "ran", "exec"), **beside}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"with vrm\.models\.save_weights\. \(It names exec\.\)$")
    assert not (tmp_path / "ran").exists()


def prefixed(prefix: str, state: Mapping[str, Any] = STATE) -> dict[str, Any]:
    """A state dict whose names begin with ``prefix``."""
    return {prefix + name: tensor for name, tensor in state.items()}


def in_the_middle(part: str) -> dict[str, Tensor]:
    """What a network saves whose layers are wrapped one by one."""
    return {name.replace("layer1.", f"layer1.{part}").replace("fc.", f"fc.{part}"): t for name, t in STATE.items()}


AVERAGED = {"n_averaged": torch.tensor(5), **prefixed("module.")}


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (STATE, ""),
        (prefixed("_orig_mod."), "names without '_orig_mod.'"),
        (prefixed("module._orig_mod."), "names without 'module._orig_mod.'"),
        (prefixed("_orig_mod.module."), "names without '_orig_mod.module.'"),
        (in_the_middle("_orig_mod."), "names without '_orig_mod.'"),
        (prefixed("module.", in_the_middle("_orig_mod.")), "names without 'module.', '_orig_mod.'"),
        (in_the_middle("module._checkpoint_wrapped_module."), "names without '_checkpoint_wrapped_module.', 'module.'"),
        (prefixed("backbone."), "names without 'backbone.'"),
        (prefixed("model.module.encoder."), "names without 'model.module.encoder.'"),
        (AVERAGED, "names without 'module.'; left out n_averaged"),
        ({**prefixed("net."), "loss.weight": torch.ones(3)}, "names without 'net.'; left out loss.weight"),
    ],
)
def test_names_lose_what_other_tools_put_around_them(
    tmp_path: Path, content: dict[str, Tensor], told: str, suffix: str
) -> None:
    file, target = tmp_path / f"w{suffix}", network()
    safetensors.torch.save_file(content, file) if suffix == ".safetensors" else torch.save(content, file)
    assert fill_network(target, file) == (f"{file}: {told}" if told else "")
    assert weights_hash(target) == weights_hash(SOURCE)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model_state_dict": STATE, "epoch": 3}, "the entry 'model_state_dict'"),
        ({"net": prefixed("module."), "acc": 0.5}, "the entry 'net'; names without 'module.'"),
        ({"state_dict": prefixed("model."), "callbacks": {}}, "the entry 'state_dict'; names without 'model.'"),
        ({"a": {"any name": prefixed("_orig_mod.")}}, "the entry 'a.any name'; names without '_orig_mod.'"),
        ({"args": argparse.Namespace(lr=0.1), "model": STATE}, "the entry 'model'"),
        ({"model": STATE, "model_ema": STATE}, "the entry 'model'"),  # the same weights twice
        ({"student": STATE, "teacher": network(name="resnet20").state_dict()}, "the entry 'student'"),
        ({"optimizer": {"state": {0: {"momentum": torch.ones(3)}}}, "state": STATE}, "the entry 'state'"),
    ],
)
def test_the_entry_that_fits_is_found(tmp_path: Path, content: dict[str, Any], told: str) -> None:
    file, target = tmp_path / "w.pth", network()
    torch.save(content, file)
    assert fill_network(target, file) == f"{file}: {told}"
    assert weights_hash(target) == weights_hash(SOURCE)


OTHER = network(2).state_dict()


@pytest.mark.parametrize(
    ("content", "raw", "average"),
    [
        ({"state_dict": STATE, "state_dict_ema": OTHER}, "state_dict", "state_dict_ema"),
        ({"model": STATE, "model_ema": {**AVERAGED, **prefixed("module.", OTHER)}}, "model", "model_ema"),
        (prefixed("student.") | prefixed("teacher.", OTHER), "student", "teacher"),
        ({"sd": prefixed("net.") | prefixed("ema.module.", OTHER)}, "sd.net", "sd.ema"),
    ],
)
def test_of_several_sets_that_fit_one_must_be_chosen(
    tmp_path: Path, content: dict[str, Any], raw: str, average: str
) -> None:
    file, target = tmp_path / "w.pth", network()
    torch.save(content, file)
    refused(file, f"several sets of weights that fit and differ: {raw}, {average}; choose with key='{raw}' or")
    for key, expected in ((raw, STATE), (average, OTHER)):
        load_weights(target, file, key=key)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in target.state_dict().items())
    with pytest.raises(ValueError, match=f"no weights under 'emma'; .*{average}"):
        load_weights(target, file, key="emma")


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in STATE.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(STATE)
    target, plain = network(3), network(3)
    torch.save(old, tmp_path / "old.pth")
    load_weights(target, tmp_path / "old.pth")
    plain.load_state_dict(old)
    assert weights_hash(target) == weights_hash(plain)
    del old["bn1.running_mean"]
    torch.save(old, tmp_path / "old.pth")
    refused(tmp_path / "old.pth", r"1 missing: bn1\.running_mean")


def test_files_of_networks_that_ask_for_a_version_load(tmp_path: Path) -> None:
    source, target = (create("torchvision:mnasnet0_5", num_classes=3) for _ in range(2))
    save_weights(source, tmp_path / "w.safetensors")  # the format has no place for versions
    load_weights(target, tmp_path / "w.safetensors")
    assert weights_hash(target) == weights_hash(source)


class Renaming(nn.Module):
    """A network that was renamed, and reads files with the old names; its count was once of shape (1,)."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(3, 2)
        self.register_buffer("count", torch.tensor(0.0))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}new.weight"] = state.pop(f"{prefix}old")
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_what_the_network_itself_brings_up_to_date_is_taken(tmp_path: Path, prefix: str) -> None:
    target = Renaming()
    old = {"old": torch.arange(6.0).reshape(2, 3), "new.bias": torch.ones(2), "count": torch.tensor([7.0])}
    torch.save({"model": prefixed(prefix, old)}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target.new.weight, old["old"])
    assert torch.equal(target.new.bias, old["new.bias"])
    assert target.count == torch.tensor(7.0)
    torch.save({"model": prefixed(prefix, old | {"more": torch.ones(1)})}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"does not fit Renaming .* unexpected: old, more", target)
    torch.save({"model": prefixed(prefix, old), "ema": old | {"old": torch.ones(2, 3)}}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "holds several sets of weights that fit and differ: model.*, ema", target)
    torch.save(prefixed(prefix, old | {"old": old["old"].to(torch.complex64)}), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"old is complex64", target)


def test_files_of_the_older_weight_norm_load(tmp_path: Path) -> None:
    source = nn.utils.weight_norm(nn.Linear(3, 2))
    target = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    images = torch.randn(4, 3)
    torch.testing.assert_close(target(images), source(images))


class Remembering(nn.Linear):
    """A layer with a state that is no tensor."""

    memory: Any = None

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state


@pytest.mark.parametrize(
    "memory", [{"version": 3, 1: (True, None, 0.5)}, [b"ab", "c"], {"scale": [torch.arange(3.0)]}, torch.bfloat16]
)
def test_states_that_are_no_tensors_are_written_and_read(tmp_path: Path, memory: Any) -> None:
    source, target = nn.Sequential(Remembering(2, 2)), nn.Sequential(Remembering(2, 2))
    source[0].memory = memory
    save_weights(source, tmp_path / "w.safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "w.safetensors")) == ["0.bias", "0.weight"]
    load_weights(target, tmp_path / "w.safetensors")
    assert str(target[0].memory) == str(memory)
    assert weights_hash(target) == weights_hash(source)
    target[0].memory = "other"
    assert weights_hash(target) != weights_hash(source)
    source[0].memory = object()
    with pytest.raises(ValueError, match=r"'0\._extra_state' in the state of the network holds a object"):
        save_weights(source, tmp_path / "w.safetensors")


def test_quantised_weights_have_a_hash_and_no_file(tmp_path: Path) -> None:
    networks = [nn.Sequential(nn.Linear(3, 2)) for _ in range(2)]
    one, other = (torch.ao.quantization.quantize_dynamic(each, {nn.Linear}, torch.qint8) for each in networks)
    assert weights_hash(one) == weights_hash(copy.deepcopy(one))
    assert weights_hash(one) != weights_hash(other)
    with pytest.raises(ValueError, match="_packed_params' is quantised: it can teach, but not be trained or written"):
        save_weights(one, tmp_path / "w.safetensors")


def test_states_without_a_hash_say_so() -> None:
    layer = Remembering(2, 2)
    layer.memory = {"a": object()}
    with pytest.raises(ValueError, match=r"'_extra_state' in the state of the network holds a object, of which no"):
        weights_hash(layer)
    lstm = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM}, torch.qint8)
    with pytest.raises(ValueError, match=r"packed weights, such as those of a quantised LSTM, .* linear layers alone"):
        weights_hash(lstm)


def test_wrapped_networks_are_written_by_their_own_names(tmp_path: Path) -> None:
    wrapped = torch.compile(nn.DataParallel(torch.compile(network(1), backend="eager")), backend="eager")
    assert unwrap(wrapped) is unwrap(unwrap(wrapped))
    save_weights(wrapped, tmp_path / "w.safetensors")
    assert weights_hash(loaded(tmp_path / "w.safetensors")) == weights_hash(SOURCE)
    target = torch.compile(network(), backend="eager")
    load_weights(target, tmp_path / "w.safetensors")
    assert weights_hash(unwrap(target)) == weights_hash(SOURCE)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path, how: str) -> None:
        self.sentinel, self.how = sentinel, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "os.mkdir":
            return os.mkdir, (str(self.sentinel),)
        if self.how == "os.system":
            return os.system, (f"mkdir {self.sentinel}",)
        code = f"import os; os.mkdir({str(self.sentinel)!r})"
        if self.how == "exec":
            return exec, (code,)
        return torch.serialization.load, (io.BytesIO(pickle.dumps(Malicious(self.sentinel, "exec"))), None, None), {}


def write_zip(path: Path, content: object) -> None:
    torch.save(content, path)


def write_old(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_bare(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("how", ["os.mkdir", "os.system", "exec", "torch.load"])
@pytest.mark.parametrize("write", [write_zip, write_old, write_bare])
@pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "evil.tar", "evil.safetensors", "evil.bin"])
def test_pickles_that_run_code_are_refused_unrun(
    tmp_path: Path, name: str, write: Callable[[Path, object], None], how: str
) -> None:
    sentinel, path = tmp_path / "executed", tmp_path / name
    write(path, {"model": STATE, "x": Malicious(sentinel, how)})
    expected = {".safetensors": "looks like a PyTorch checkpoint, a pickle"}
    refused(path, expected.get(path.suffix, "can run any code when opened|truncated or not a PyTorch checkpoint"))
    assert not sentinel.exists()


def test_the_malicious_pickle_works(tmp_path: Path) -> None:
    for how in ("os.mkdir", "os.system", "exec"):
        pickle.loads(pickle.dumps(Malicious(tmp_path / how, how)))
        assert (tmp_path / how).exists()


def test_archives_whose_members_point_elsewhere_write_nothing(tmp_path: Path) -> None:
    """Nothing is ever unpacked: a name of a member is no path."""
    inside = tmp_path / "inside"
    inside.mkdir()
    with zipfile.ZipFile(inside / "w.pth", "w") as archive:
        for name in ("../escaped", "/tmp/vrm-escaped", "archive/../../escaped", "archive/data.pkl"):
            archive.writestr(name, pickle.dumps(1))
    with tarfile.open(inside / "w.tar", "w") as archive:
        for name in ("../escaped", "/tmp/vrm-escaped", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    for name in ("w.pth", "w.tar"):
        refused(inside / name, name)
    assert os.listdir(tmp_path) == ["inside"]
    assert sorted(os.listdir(inside)) == ["w.pth", "w.tar"]
    assert not Path("/tmp/vrm-escaped").exists()


def loop() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["model"] = found
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (loop(), "holds no state dict: its keys are model;"),
        ({1: torch.ones(2)}, "has tensors under 1, which is not a name"),
        ({"model": {("a", "b"): torch.ones(2)}}, "which is not a name"),
        ({"model": 3}, "its keys are model;"),
        ({"epoch": 3, "net": {}}, "its keys are epoch, net;"),
        ([STATE], "holds a list, not a state dict"),
        ({}, "its keys are none"),
    ],
)
def test_checkpoints_without_a_state_dict_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bias: bias.to_sparse(), "fc.bias is torch.sparse_coo"),
        (lambda bias: bias.to(torch.complex64), "fc.bias is complex64, the network has float32"),
        (lambda bias: bias.long(), "fc.bias is int64, the network has float32"),
        (lambda bias: bias.bool(), "fc.bias is bool"),
        (lambda bias: torch.empty_like(bias, device="meta"), "fc.bias is torch.strided, meta"),
    ],
)
def test_tensors_of_another_kind_are_refused_before_anything_changes(
    tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    torch.save({**STATE, "fc.bias": change(STATE["fc.bias"])}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", message)


def test_half_precision_is_a_float_too(tmp_path: Path) -> None:
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in STATE.items()}, tmp_path / "w.pth")
    assert torch.equal(loaded(tmp_path / "w.pth").state_dict()["fc.bias"], STATE["fc.bias"].half().float())


CONTENT = serialise(STATE)
HEADER = 8 + int.from_bytes(CONTENT[:8], "little")


@given(st.integers(0, 8 * len(CONTENT) - 1) | st.integers(0, 8 * HEADER - 1))
def test_one_changed_bit_is_found_wherever_it_is(bit: int) -> None:
    """Or it changed nothing: a bit in the name under which the hash lies, or in the padding."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        content = bytearray(CONTENT)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        told = ""
        try:
            found = read_tensors(path)
        except ValueError as error:
            told = str(error)
        if told:
            assert str(path) in told
        else:
            assert bit < 8 * HEADER
            assert found.keys() == STATE.keys()
            assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.99, 1])
def test_truncated_anywhere_is_refused(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    save_weights(SOURCE, path) if name == "w.safetensors" else torch.save(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
    refused(path, rf"{name} (is (truncated|empty)|was refused: it is broken)")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.pth", "broken|truncated"),
        ("w.safetensors", "truncated or not a safetensors"),
        ("w.onnx", "unknown ending"),
        ("", r"no weights at .*model\.safetensors; give"),
        ("missing.pth", r"no weights at .*missing\.pth; give"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, name: str, message: str) -> None:
    for other in ("w.pth", "w.safetensors", "w.onnx"):
        (tmp_path / other).write_text("<html>404</html>")
    refused(tmp_path / name, message)


def test_weights_that_their_card_does_not_describe_are_noticed(tmp_path: Path) -> None:
    save_weights(SOURCE, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(json.dumps({"weights_sha256": weights_hash(SOURCE)}))
    load_weights(network(), tmp_path)
    save_weights(network(2), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"does not hold the weights that .*model\.json describes"):
        load_weights(network(), tmp_path)
    (tmp_path / "model.json").write_text("{")
    refused(tmp_path, r"model\.json is no JSON")


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_tensors({"a": whole[:3], "b": whole, "c": whole.reshape(2, 3).T}, tmp_path / "w.safetensors")
    found = read_tensors(tmp_path / "w.safetensors")
    assert torch.equal(found["a"], whole[:3])
    assert torch.equal(found["b"], whole)
    assert torch.equal(found["c"], whole.reshape(2, 3).T)


@pytest.mark.parametrize(
    ("saved", "name", "num_classes", "message"),
    [
        ("resnet8", "resnet8", 100, "trained for 10 classes, this network has 100"),
        ("resnet8", "resnet20", 10, r"ResNet .*: 60 missing: layer1\.1\.conv1\.weight, .* and 55 more"),
        ("resnet20", "resnet8", 10, r": 72 unexpected: layer1\.1\."),
        ("resnet8", "resnet8x4", 10, r"of another shape: conv1\.weight \(16, 3, 3, 3\) instead of \(32, 3, 3, 3\)"),
    ],
)
def test_files_that_do_not_fit_say_why(tmp_path: Path, saved: str, name: str, num_classes: int, message: str) -> None:
    save_weights(network(name=saved), tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", message, network(name=name, num_classes=num_classes))


def renamed(tensors: dict[str, Tensor]) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def test_hash_depends_on_names_types_shapes_and_values_but_not_on_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2)
    reference = weights_hash(renamed({"a": a, "b": b}))
    assert weights_hash(renamed({"b": b, "a": a})) == reference
    others = [
        {"a": a, "c": b},
        {"a": a.double(), "b": b},
        {"a": a.reshape(2, 3), "b": b},
        {"a": a + 1, "b": b},
        {"a": a.view(torch.int32), "b": b},
    ]
    assert len({reference, *(weights_hash(renamed(other)) for other in others)}) == 1 + len(others)
    assert weights_hash(renamed({"a": torch.ones(3, 2).T})) == weights_hash(renamed({"a": torch.ones(2, 3)}))
    assert weights_hash(renamed({"a": a.bfloat16()})) != reference
