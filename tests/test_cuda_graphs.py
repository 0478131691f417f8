"""CUDA graphs without a GPU: a tape in the place of a graph, which does again what was recorded, in the same memory."""

import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pre_tokenize import pre_tokenize
from vision_tokenizer.codebook import job, output
from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.codebook.encoder import SECONDS_AHEAD, Encoder, GpuRunner
from vision_tokenizer.codebook.graphs import Recordings
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.chameleon.vqgan import load_chameleon
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.tokenizer import tokenizer_codebook_inference
from vistoken.errors import UserError
from vistoken.jobs.workers import OneProcess


class Tape(TorchDispatchMode):
    """Operations on tensors, in order. What the host computed while they were recorded stays as it was."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(value.alias_info and not value.alias_info.is_write for value in function._schema.returns)
        if not is_view:
            self.done.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, before in self.done:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def captures(monkeypatch):
    """What torch.cuda.graph was told, capture by capture."""
    told = []

    @contextmanager
    def graph(tape, pool, stream, capture_error_mode):
        told.append((pool, stream, capture_error_mode))
        with tape:
            yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return told


@pytest.mark.parametrize("name", ["dualvitok", "chameleon"])
def test_replayed_kernels_give_the_codes_of_each_batch(name, captures, tiny_dualvitok, chameleon_folder, monkeypatch):
    load = {
        "dualvitok": lambda: load_dualvitok(*tiny_dualvitok, device="cpu"),
        "chameleon": lambda: load_chameleon(chameleon_folder, device="cpu"),
    }
    tokenizer = load[name]()
    random = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=random)
        for size in [(64, 64), (64, 96), (64, 64), (64, 96), (64, 64)]
    ]
    wanted = [tokenizer.encode(normalize(batch)) for batch in batches]
    assert any(not torch.equal(a, b) for a, b in zip(wanted[0], wanted[2], strict=True))
    encoded, encode = [], type(tokenizer).encode

    def counted(self, pixels):
        encoded.append(tuple(pixels.shape))
        return encode(self, pixels)

    monkeypatch.setattr(type(tokenizer), "encode", counted)
    recordings = Recordings(tokenizer)
    for batch, codes in zip(batches, wanted, strict=True):
        found = recordings.encode(batch.clone())
        assert all(torch.equal(a, b) for a, b in zip(found, codes, strict=True))
    assert encoded == [(2, 3, 64, 64)] * 2 + [(2, 3, 64, 96)] * 2, "once before it is recorded, once recorded"
    assert len(captures) == 2 and captures[0] == captures[1], "one memory and one stream for all"
    assert captures[0][2] == "thread_local", "decoding threads may allocate"


class OnGpu:
    """A tokenizer that says it is on a GPU."""

    name, fingerprint, branches, codebook_sizes = "x", "0" * 64, ("semantic", "pixel"), (8, 8)
    device = torch.device("cuda", 0)


def test_codes_on_a_gpu_are_made_as_its_flags_say_in_large_chunks(monkeypatch, tmp_path):
    class Begun(Exception):
        pass

    def encoder(tokenizer, prepare, **given):
        raise Begun(given)

    monkeypatch.setattr(job, "Encoder", encoder)
    monkeypatch.setattr(output, "device_facts", lambda device: {})
    (tmp_path / "a.jsonl").write_text('{"id": 0, "images": ["x.png"]}\n')
    folder = str(tmp_path)
    entry = {"root": f"{folder}/out", "image_dir": folder, "annotation_dir": folder, "tokenizer_inference": True}
    (tmp_path / "data.json").write_text(json.dumps({"set": entry}))
    data = read_data_config(tmp_path / "data.json")
    with pytest.raises(Begun) as begun:
        job.run_codebook_inference(data, OnGpu(), output.Settings(cuda_graphs=True), OneProcess(), num_workers=1)
    (given,) = begun.value.args
    assert given["cuda_graphs"]
    (manifest,) = tmp_path.rglob("manifest.json")
    assert json.loads(manifest.read_text())["chunk_items"] == 512


@pytest.mark.parametrize("graphs", [False, True])
def test_batches_on_a_gpu_are_recorded_where_that_is_asked_for(captures, graphs):
    with Encoder(OnGpu(), None, batch_size=2, num_workers=1, cuda_graphs=graphs) as encoder:
        assert isinstance(encoder._runner, GpuRunner) and SECONDS_AHEAD["cuda"] >= 1 > SECONDS_AHEAD["cpu"]
        assert isinstance(encoder._runner._recordings, Recordings if graphs else type(None))


@pytest.mark.parametrize("command", ["codes", "tokens"])
def test_graphs_are_refused_without_a_gpu(command, tmp_path):
    """Before weights are looked for."""
    data = {"set": {"root": ".", "image_dir": ".", "annotation_dir": ".", "tokenizer_inference": True}}
    (tmp_path / "data.json").write_text(json.dumps(data))
    main, arguments = {
        "codes": (tokenizer_codebook_inference.main, "--model_config x --tokenizer_checkpoint x --data_config"),
        "tokens": (pre_tokenize.main, "--out_dir x --in_filename"),
    }[command]
    with pytest.raises(UserError, match="--cuda_graphs needs a GPU, and this runs on cpu"):
        main([*arguments.split(), str(tmp_path / "data.json"), "--device", "cpu", "--cuda_graphs"])
