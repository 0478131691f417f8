"""From a model folder to something that answers: the model, its tokenizers, and what is known of its training."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.sequences import ProcessItem
from pre_tokenize.text import TOKENIZER_FILES, TextTokenizer
from training.data.loading import ImageReader
from training.generation.cache import CachedLM, CachedUniToken
from training.generation.interpreter import LMInterpreter, UniTokenInterpreter
from training.models.causal_lm import load_causal_lm
from training.models.folder import TRAINED_WITH, open_unitoken, read_config
from training.models.unitoken import UniToken
from vision_tokenizer.images.anchors import FIXED_ANCHORS
from vision_tokenizer.images.chameleon import crop_sizes
from vision_tokenizer.models.chameleon.vqgan import load_chameleon
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vistoken.device import choose_dtype
from vistoken.errors import UserError
from vistoken.weights import load_strict, read_state_dict

LM_SIZES = (*FIXED_ANCHORS, (256, 256))
DIGEST_BYTES = 1 << 20  # of a weight file's start and end


def trained_with(folder: Path) -> dict[str, Any]:
    """What a model's config.json tells of its training (variant, max_seq_len, condition_dropout); may be empty."""
    return read_config(folder)[1].get(TRAINED_WITH, {})


def open_unitoken_for_answers(
    folder: Path, tokenizer_dir: str, text: str | None, process_item: ProcessItem, image_dir: Path, options: Mapping
) -> UniTokenInterpreter:
    """`options`: variant, device, precision, target_size, crop, wishes, published. Raises `UserError`."""
    path, _ = read_config(folder)
    names = read_state_dict(path).keys()
    for part in ("vit.", "adapter."):
        if not any(name.startswith(part) for name in names):
            raise UserError(f"{path}: no {part[:-1]} in it, so no UniToken was trained into it. Name a run's output.")
    device, precision = options["device"], options["precision"]
    tokenizer, vqgan = TextTokenizer(text or tokenizer_dir), load_chameleon(tokenizer_dir, device=device, decoder=True)
    format = ChameleonFormat(tokenizer, image_dir=image_dir)
    if vqgan.codebook_sizes != format.codebook_sizes:
        raise UserError(f"{tokenizer_dir}/vqgan.yaml: {vqgan.codebook_sizes[0]} codes, not {format.codebook_sizes[0]}")
    opened = open_unitoken(path, path, 0)
    check_vocabulary(path, tokenizer, opened.llm.vocab_size)
    with torch.device("meta"):
        model = UniToken(opened.llm, opened.vision, z_weight=0.0)
    load_strict(model, opened.tensors, source=path)
    model.to(device, choose_dtype(precision)).requires_grad_(False)
    reader = ImageReader(opened.vision.image_size, opened.vision.grid, options["variant"] == "anyres")
    return UniTokenInterpreter(
        CachedUniToken(model),
        format,
        process_item,
        vqgan,
        reader,
        crop_sizes(options["target_size"], options["crop"]),
        options["wishes"],
        options["published"],
    )


def open_lm_for_answers(
    folder: Path, tokenizer_dir: str | None, process_item: ProcessItem, image_dir: Path, options: Mapping
) -> LMInterpreter:
    """`options`: device, precision, model_config, tokenizer_checkpoint, wishes. Raises `UserError`."""
    path, _ = read_config(folder)
    tokenizer = TextTokenizer(tokenizer_dir or path)
    lm, _, _ = load_causal_lm(path)
    check_vocabulary(path, tokenizer, lm.get_output_embeddings().weight.shape[0])
    lm.to(options["device"], choose_dtype(options["precision"])).requires_grad_(False)
    decoder = None
    if options["model_config"]:
        checkpoint = options["tokenizer_checkpoint"]
        decoder = load_dualvitok(options["model_config"], checkpoint, device=options["device"], decoder=True)
    format = DualViTokFormat(tokenizer)
    if decoder and decoder.codebook_sizes != format.codebook_sizes:
        raise UserError(
            f"{options['tokenizer_checkpoint']}: codebooks of {decoder.codebook_sizes}, the language model has words "
            f"for {format.codebook_sizes}"
        )
    return LMInterpreter(CachedLM(lm), format, process_item, decoder, LM_SIZES, options["wishes"], image_dir)


def check_vocabulary(model: Path, tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the model's."""
    if tokenizer.size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: a vocabulary of {tokenizer.size} ids, the model {model} knows {vocab_size}. Name the "
            "tokenizer that it was trained with."
        )
    if any((model / name).is_file() for name in TOKENIZER_FILES):
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
