"""Weights come in from every accepted form, strictly, and nothing in a checkpoint is ever run."""

import argparse
import json
import os
import sys
import types
from pathlib import Path
from zipfile import ZipFile

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vistoken import weights
from vistoken.errors import UserError
from vistoken.weights import fingerprint, load_strict, read_state_dict

STATE = {"body.weight": torch.arange(6.0).reshape(2, 3), "body.bias": torch.ones(2), "head.weight": torch.zeros(4)}


def assert_equal_states(found, wanted):
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_pickles_plain_and_nested(tmp_path, suffix, wrapper):
    file = tmp_path / f"weights{suffix}"
    torch.save({wrapper: STATE, "step": 7} if wrapper else STATE, file)
    assert_equal_states(read_state_dict(file), STATE)
    assert_equal_states(read_state_dict(tmp_path), STATE)


def test_the_old_pickle_format_still_loads(tmp_path):
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_equal_states(read_state_dict(tmp_path / "old.pt"), STATE)


def test_safetensors_and_prefixes(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert_equal_states(read_state_dict(tmp_path), STATE)
    body = {name: tensor for name, tensor in STATE.items() if name.startswith("body.")}
    assert_equal_states(read_state_dict(tmp_path / "model.safetensors", keep=("body.",)), body)
    with pytest.raises(UserError, match=r"begins with tail\. or module\.; it holds body\."):
        read_state_dict(tmp_path / "model.safetensors", keep=("tail.", "module."))
    torch.save(STATE, tmp_path / "x.bin")
    assert_equal_states(read_state_dict(tmp_path / "x.bin", keep=["body."]), body)
    assert_equal_states(read_state_dict(tmp_path), STATE)  # the well-known name wins over x.bin


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards(tmp_path, index):
    suffix = ".safetensors" if "safetensors" in index else ".bin"
    save = save_file if suffix == ".safetensors" else torch.save
    weight_map = {name: f"shard-{i}{suffix}" for i, name in enumerate(STATE)}
    for name, shard in weight_map.items():
        save({name: STATE[name]}, tmp_path / shard)
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    assert_equal_states(read_state_dict(tmp_path), STATE)
    (tmp_path / weight_map["body.bias"]).unlink()
    with pytest.raises(UserError, match="shard-1"):
        read_state_dict(tmp_path)


def test_ema_only_when_asked(tmp_path):
    ema = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save({"model": STATE, "ema": ema}, tmp_path / "both.pt")
    assert_equal_states(read_state_dict(tmp_path / "both.pt"), STATE)
    assert_equal_states(read_state_dict(tmp_path / "both.pt", use_ema=True), ema)
    torch.save({"ema": ema}, tmp_path / "ema.pt")
    with pytest.raises(UserError, match="ask for EMA"):
        read_state_dict(tmp_path / "ema.pt")
    torch.save(STATE, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="no `ema`"):
        read_state_dict(tmp_path / "plain.pt", use_ema=True)


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"model": STATE, "extra": RunsCode(f"touch {mark}")}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match=r"refused.*system"):
        read_state_dict(tmp_path / "evil.bin")
    assert not mark.exists()


class RunsText(RunsCode):
    def __reduce__(self):
        return exec, (self.command,)


def test_a_trainings_own_objects_are_left_out_and_never_made(tmp_path, monkeypatch, capsys):
    """As the published trainers leave them: argument lists and configs, of packages that are not installed here."""

    class Config(dict):
        def __setstate__(self, state):
            raise AssertionError("made")

    module = types.ModuleType("their_config")
    module.Config, Config.__module__, Config.__qualname__ = Config, "their_config", "Config"
    monkeypatch.setitem(sys.modules, "their_config", module)
    config = Config(lr=1e-4)
    config.name = "has a state of its own"
    mark = tmp_path / "ran"
    run = RunsText(f"open({str(mark)!r}, 'w')")
    args = argparse.Namespace(config=config, nested=[Config(lr=config)], run=run, path=Path("somewhere"))
    torch.save({"model": STATE, "steps": 3, "args": args}, tmp_path / "0000003.pt")
    monkeypatch.delitem(sys.modules, "their_config")
    assert_equal_states(read_state_dict(tmp_path / "0000003.pt"), STATE)
    assert "left out what is no tensor in it: argparse.Namespace" in capsys.readouterr().err
    assert not mark.exists()
    torch.save({"model": argparse.Namespace(**STATE)}, tmp_path / "object.pt")
    with pytest.raises(UserError, match="no named tensors"):
        read_state_dict(tmp_path / "object.pt")


def test_bad_files_are_named(tmp_path):
    torch.save(STATE, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    save_file(STATE, tmp_path / "whole.safetensors")
    contents = {
        "cut.bin": whole[: len(whole) // 2],
        "noise.pt": bytes(range(256)) * 4,
        "empty.ckpt": b"",
        "zeros.bin": bytes(1000),  # of which torch says that an unsafe load would likely succeed
        "pointer.bin": b"version https://git-lfs.github.com/spec/v1\n",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:100],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        told = "a pointer of Git LFS.*git lfs pull" if "pointer" in name else "damaged or not a .*Fetch it again"
        with pytest.raises(UserError, match=f"{name}: {told}") as caught:
            read_state_dict(tmp_path / name)
        assert "False" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: no named tensors"):
        read_state_dict(tmp_path / "list.pt")


def test_a_missing_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was contacted")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "other.bin").touch()
    with pytest.raises(UserError, match="name is empty"):
        read_state_dict("")
    for path in (tmp_path / "no" / "thing", "./a/b", "a/b.bin", "checkpoints/dualvitok", "model"):
        with pytest.raises(UserError, match="no such checkpoint"):
            read_state_dict(path)
    with pytest.raises(UserError, match=r"holds other\.bin"):
        read_state_dict("checkpoints/dualvitok")


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "check_on_hub", lambda hub_id: None)
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, allow_patterns: str(tmp_path))
    assert_equal_states(read_state_dict("some-org/some-model"), STATE)

    def offline(hub_id, allow_patterns):
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"some-org/some-model.*cannot reach"):
        read_state_dict("some-org/some-model")


def test_strict_loading_lists_what_is_wrong():
    with torch.device("meta"):
        module = nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.LayerNorm(4, bias=False)})
    load_strict(module, STATE, source="x.bin")
    assert module["body"].weight.data_ptr() == STATE["body.weight"].data_ptr()  # assigned, not copied
    load_strict(module, STATE | {"loss.weight": torch.ones(1)}, source="x.bin", ignore=("loss.",))
    wrong = {"body.weight": torch.zeros(3, 2), "body.bias": torch.zeros(2, dtype=torch.int8), "tail": torch.ones(1)}
    with pytest.raises(UserError) as caught:
        load_strict(module, wrong, source="x.bin")
    for part in ("x.bin", "head.weight", "tail", "body.weight is (3, 2)", "(2, 3)", "int8"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="another model"):
        load_strict(module, {"tail": torch.ones(1)}, source="x.bin")


def test_fingerprint_is_of_contents(tmp_path):
    mark = fingerprint(STATE)
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save({"model": dict(reversed(STATE.items()))}, tmp_path / "b.bin")
    assert fingerprint(read_state_dict(tmp_path / "a.safetensors")) == mark
    assert fingerprint(read_state_dict(tmp_path / "b.bin")) == mark
    edited = STATE["body.weight"].clone()
    edited[1, 2] += 1e-6
    others = [
        STATE | {"body.weight": edited},
        STATE | {"body.weight": STATE["body.weight"].reshape(3, 2)},
        STATE | {"body.weight": STATE["body.weight"].bfloat16()},
        {"x" + name: tensor for name, tensor in STATE.items()},
    ]
    assert len({mark, fingerprint(STATE, "heads 16"), *map(fingerprint, others)}) == 6


@pytest.mark.parametrize("wanted", ["data/1", "data.pkl"])
def test_a_flipped_bit_is_found_by_the_files_own_checksums(tmp_path, wanted):
    file = tmp_path / "w.bin"
    torch.save({"a": torch.ones(64), "b": torch.arange(64.0)}, file)
    with ZipFile(file) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith(wanted))
    content = bytearray(file.read_bytes())
    start = content.index(record.filename.encode()) + len(record.filename)
    content[content.index(torch.tensor(63.0).numpy().tobytes(), start) if wanted == "data/1" else start + 120] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"w\.bin: damaged: the checksum of w/{wanted}"):
        read_state_dict(file)


def test_a_file_that_was_written_without_checksums_still_loads(tmp_path):
    set_crc32_options = pytest.importorskip("torch.serialization").set_crc32_options
    set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "w.bin")
    finally:
        set_crc32_options(True)
    assert_equal_states(read_state_dict(tmp_path / "w.bin"), STATE)


@pytest.mark.parametrize(
    "name, tensor, told",
    [
        ("a", torch.eye(2).to_sparse(), "a is torch.sparse_coo, and weights are plain dense tensors"),
        ("a", torch.ones(2, device="meta"), "a is on the meta device"),
        ("\ud800", torch.ones(2), "a tensor's name is '\\ud800'"),
        (7, torch.ones(2), "a tensor's name is 7"),
    ],
    ids=["sparse", "meta", "half a surrogate pair", "number"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_only_looks_like_a_weight_is_told(tmp_path, name, tensor, told):
    torch.save({name: tensor, "b": torch.ones(2)}, tmp_path / "w.bin")
    with pytest.raises(UserError) as error:
        read_state_dict(tmp_path / "w.bin")
    assert told in str(error.value) and "w.bin" in str(error.value)


def test_a_mistyped_path_that_looks_like_a_hub_id_is_told_at_once(monkeypatch, tmp_path):
    """Nobody listens there, and the hub's client would try again and again."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **how: asked.append(how) or refuse())

    def refuse():
        raise OSError("no copy here")

    with pytest.raises(UserError, match=r"ckpts/Chameleon: no such file or folder here.*no folder ckpts in"):
        read_state_dict("ckpts/Chameleon")
    assert asked == [{"local_files_only": True}]


def test_a_damaged_directory_of_the_zip_is_told(tmp_path):
    """A name in it that is no text, and sizes and offsets that lead nowhere."""
    path = tmp_path / "w.bin"
    torch.save({"a.weight": torch.ones(3)}, path)
    good = path.read_bytes()
    at = good.index(b"PK\x01\x02")
    for shift, content in ((10, b"\x63"), (20, b"\xff" * 8), (42, b"\xff" * 4), (46, b"\xff\xfe")):
        damaged = bytearray(good)
        damaged[at + shift : at + shift + len(content)] = content
        if shift == 46:
            damaged[at + 9] |= 8  # the name is said to be UTF-8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"w\.bin: damaged"):
            read_state_dict(path)
