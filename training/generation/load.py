"""From a model folder to something that answers: the model, its tokenizers, and what is known of its training."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.text import TextTokenizer, tokenizer_file
from training.generation.cache import CachedLM, CachedUniToken
from training.models.causal_lm import load_causal_lm
from training.models.folder import TRAINED_WITH, open_unitoken, read_config
from training.models.siglip import VisionConfig
from training.models.unitoken import UniToken
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, load_chameleon
from vision_tokenizer.models.dualvitok.model import DualViTok, load_dualvitok
from vistoken.device import choose_dtype
from vistoken.errors import UserError
from vistoken.weights import load_strict, read_state_dict

DIGEST_BYTES = 1 << 20  # of a weight file's start and end


def trained_with(folder: Path) -> dict[str, Any]:
    """What a model's config.json tells of its training (variant, max_seq_len, condition_dropout); may be empty."""
    return read_config(folder)[1].get(TRAINED_WITH, {})


def load_unitoken(folder: Path, device: torch.device, precision: str) -> tuple[CachedUniToken, VisionConfig]:
    """Raises `UserError`, as all of these do."""
    path, _ = read_config(folder)
    names = read_state_dict(path).keys()
    for part in ("vit.", "adapter."):
        if not any(name.startswith(part) for name in names):
            raise UserError(f"{path}: no {part[:-1]} in it, so no UniToken was trained into it. Name a run's output.")
    opened = open_unitoken(path, path, 0)
    with torch.device("meta"):
        model = UniToken(opened.llm, opened.vision, z_weight=0.0)
    load_strict(model, opened.tensors, source=path)
    return CachedUniToken(model.to(device, choose_dtype(precision)).requires_grad_(False)), opened.vision


def load_lm(folder: Path, device: torch.device, precision: str) -> CachedLM:
    lm, _, _ = load_causal_lm(folder)
    module: nn.Module = lm
    module.to(device, choose_dtype(precision)).requires_grad_(False)
    return CachedLM(lm)


def load_vqgan(folder: str, format: ChameleonFormat, device: torch.device) -> ChameleonVQGAN:
    vqgan = load_chameleon(folder, device=device, decoder=True)
    if vqgan.codebook_sizes != format.codebook_sizes:
        raise UserError(f"{folder}/vqgan.yaml: {vqgan.codebook_sizes[0]} codes, not {format.codebook_sizes[0]}")
    return vqgan


def load_image_tokenizer(config: Path, checkpoint: str, format: DualViTokFormat, device: torch.device) -> DualViTok:
    tokenizer = load_dualvitok(config, checkpoint, device=device, decoder=True)
    if tokenizer.codebook_sizes != format.codebook_sizes:
        raise UserError(
            f"{checkpoint}: codebooks of {tokenizer.codebook_sizes}, the language model has words "
            f"for {format.codebook_sizes}"
        )
    return tokenizer


def check_vocabulary(folder: Path, tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the model's."""
    model, _ = read_config(folder)
    if tokenizer.size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: a vocabulary of {tokenizer.size} ids, the model {model} knows {vocab_size}. Name the "
            "tokenizer that it was trained with."
        )
    if tokenizer_file(model):
        own = TextTokenizer(model)
        if own.vocabulary != tokenizer.vocabulary:
            raise UserError(
                f"{tokenizer.path}: another vocabulary ({tokenizer.vocabulary[:12]}...) than that of the model, "
                f"{own.path} ({own.vocabulary[:12]}...). Name the tokenizer that it was trained with."
            )


def model_digest(folder: Path) -> str:
    """Tells one model's weights from another's without reading gigabytes."""
    path, digest = read_config(folder)[0], hashlib.sha256()
    for file in sorted(entry for entry in path.iterdir() if entry.suffix in (".safetensors", ".bin", ".json")):
        with file.open("rb") as content:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + content.read(DIGEST_BYTES))
            content.seek(max(file.stat().st_size - DIGEST_BYTES, 0))
            digest.update(content.read())
    return digest.hexdigest()[:16]
