"""CUDA graphs without a GPU: a tape in the place of a graph, which does again what was recorded, in the same memory."""

import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pre_tokenize import pre_tokenize
from vision_tokenizer.codebook.graphs import Recordings
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.chameleon.vqgan import load_chameleon
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.tokenizer import tokenizer_codebook_inference
from vistoken.errors import UserError


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
