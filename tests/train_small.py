"""A small training set-up on disk, and the trainer run on it in this process or in others."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import GOLDEN
from PIL import Image
from safetensors.torch import save_file
from unitoken_small import IMAGES, ITEMS, LLM_JSON, synthetic_state, tokens_and_labels

from pre_tokenize.record import entry_line
from pre_tokenize.token_file import TokenSample, pickle_bytes, shard_bytes
from training.train import main

VISION_JSON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FLAGS = {
    "epochs": 5,
    "batch_size": 4,
    "lr": 1e-3,
    "vit_lr_scale": 1,
    "dropout": 0,
    "precision": "fp32",
    "num_workers": 0,
    "log_interval": 1,
}
TEXT = {"batch_size": 2, "epochs": 2, "save_iteration_interval": 3}


def write_model(folder: Path, parts: Sequence[str] = ("model.", "lm_head.", "adapter.", "vit.")) -> Path:
    """The golden model, or some parts of it, as a model folder."""
    folder.mkdir(parents=True)
    tensors = {name: tensor for name, tensor in synthetic_state().items() if name.startswith(tuple(parts))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**LLM_JSON, "model_type": "chameleon"}
    if "vit." in parts:
        config["vision_config"] = VISION_JSON
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "chameleon_small" / "text_tokenizer.json", folder / "tokenizer.json")
    return folder


def write_tower(folder: Path) -> Path:
    """The golden tower as SigLIP is released, text half included."""
    folder.mkdir(parents=True)
    tower = {
        name.replace("vit.", "vision_model.", 1): tensor
        for name, tensor in synthetic_state().items()
        if name.startswith("vit.")
    }
    save_file({**tower, "text_model.final_layer_norm.weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": VISION_JSON}))
    return folder


def golden_samples(kinds: Sequence[str] = ("caption", "text", "t2i", "wide")) -> list[TokenSample]:
    samples = []
    for number, kind in enumerate(kinds):
        tokens, labels = tokens_and_labels(kind)
        image = ITEMS[kind][1]
        images = (str(IMAGES / image),) if image else ()
        sizes = tuple(Image.open(path).size[::-1] for path in images)
        samples.append(TokenSample(number, tokens.astype(np.int32), labels >= 0, images, sizes))
    return samples


def text_samples(count: int, seed: int = 0) -> list[TokenSample]:
    """Cheap samples of different lengths and contents, without images."""
    random = np.random.default_rng(seed)
    lengths = random.integers(8, 40, count)
    return [
        TokenSample(i, random.integers(8900, 10000, length).astype(np.int32), np.arange(length) >= length // 2, (), ())
        for i, length in enumerate(lengths)
    ]


def write_texts(folder: Path) -> Path:
    """The data config of twenty short samples of text: ten steps of two an epoch."""
    return write_data_config(folder / "data.yaml", write_record(folder / "tokens", text_samples(20)))


def write_images(folder: Path) -> Path:
    """The data config of the four golden samples."""
    return write_data_config(folder / "data.yaml", write_record(folder / "tokens", golden_samples()))


def write_record(folder: Path, samples: Sequence[TokenSample], *, pickles: bool = False, manifest=None) -> Path:
    """Token files and their record."""
    (folder / "files").mkdir(parents=True)
    lines = []
    if pickles:
        for sample in samples:
            (folder / f"files/{sample.id}.pkl").write_bytes(pickle_bytes(sample))
            name = f"files/{sample.id}.pkl"
            lines.append(entry_line(name, None, len(sample.tokens), sample.id, None, sample.image_sizes))
    else:
        (folder / "files/0.arrow").write_bytes(shard_bytes(samples, manifest or {}))
        for row, sample in enumerate(samples):
            length, sizes = len(sample.tokens), sample.image_sizes
            lines.append(entry_line("files/0.arrow", row, length, sample.id, None, sizes))
    (folder / "record.jsonl").write_bytes(b"".join(line.rstrip() + b"\n" for line in lines))
    return folder / "record.jsonl"


def write_data_config(path: Path, *records: Path, **fields) -> Path:
    path.write_text(yaml.safe_dump({"META": [{"path": str(record), **fields} for record in records]}))
    return path


def flags(model: Path, data: Path, output: Path, **settings) -> list[str]:
    chosen = FLAGS | {"init_from": model, "data_config": data, "output_dir": output, "unmask_image_logits": True}
    arguments = []
    for name, value in (chosen | settings).items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False:
            arguments += [f"--{name}", str(value)]
    return arguments


def train(model: Path, data: Path, output: Path, **settings) -> list[dict]:
    """Run the command in this process; gives its metrics."""
    assert main(flags(model, data, output, **settings)) == 0
    return metrics(output)


def train_processes(count: int, arguments: list[str]) -> subprocess.Popen:
    """Start the command on CPU, several processes under torchrun. A single one computes to the last bit as this process
    does, which takes the same number of threads.
    """
    threads = "1" if count > 1 else str(torch.get_num_threads())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "training/train.py", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_curve(found: list[dict], expected: list[dict], rel: float) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("c_loss", "z_loss", "grad_norm", "lr", "vit_lr"):
            assert one[name] == pytest.approx(other[name], rel=rel), (one, other)
