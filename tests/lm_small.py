"""A small language model of the ChatML kind and its tokenizer, made on the spot, and lines of codebook inference."""

import json
from pathlib import Path

import numpy as np
from conftest import GOLDEN
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pre_tokenize.extend_tokenizer import extend
from vision_tokenizer.models.dualvitok.model import grid_sizes

GOLDEN_SIZES = (2048, 6144)  # codebooks of the model that the golden codes come from
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
)


def write_tokenizer(folder: Path, special: list[str] = CHATML) -> Path:
    """Byte-level BPE with a few merges, as Qwen2.5's is."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant generate an image of the picture, please edit"] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def extended_tokenizer(folder: Path, sizes: tuple[int, int] = GOLDEN_SIZES) -> Path:
    extend(str(write_tokenizer(folder / "original")), folder / "extended", sizes)
    return folder / "extended"


def write_model(folder: Path, *, vocab_size: int = 320, **settings) -> Path:
    """A Qwen2 of two layers with random weights, as transformers saves it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=vocab_size, num_key_value_heads=2, **sizes, **settings)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def golden_lines(*names: str) -> list[dict]:
    """Lines of codebook inference, e.g. of "editing/fixed_256/0000"."""
    files = [GOLDEN / "codebook" / "expected" / f"{name}.jsonl" for name in names]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def made_line(*turns: str, anchors=(), sizes: tuple[int, int] = GOLDEN_SIZES) -> dict:
    """A line with random codes; turns alternate, human first."""
    random = np.random.default_rng(0)
    codes = [
        [random.integers(0, size, shape).tolist() for size, shape in zip(sizes, grid_sizes(*anchor), strict=True)]
        for anchor in anchors
    ]
    return {
        "images": [f"{number}.png" for number in range(len(anchors))],
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(turns)],
        "image_sizes": [list(anchor) for anchor in anchors],
        "image_embed_inds": codes,
        "matched_ratios": [list(anchor) for anchor in anchors],
    }


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
