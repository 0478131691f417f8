"""What pre_tokenize.py does with the Chameleon tokenizers: load them, record them, put them to work."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from pre_tokenize.output import input_facts
from pre_tokenize.text import TextTokenizer
from vision_tokenizer.chameleon.image import crop_sizes, prepare
from vision_tokenizer.chameleon.vocabulary import CODEBOOK_SIZE, PIXELS_PER_TOKEN
from vision_tokenizer.chameleon.vqgan import ChameleonVQGAN, load_chameleon
from vision_tokenizer.engine import Engine
from vision_tokenizer.errors import UserError
from vision_tokenizer.jobs.chunks import ChunkTable


@dataclass(frozen=True)
class Settings:
    """What decides the token files, besides the tokenizers."""

    target_size: int
    crop: str
    torch_dtype: str
    batch_size: int
    items_per_file: int


def load_tokenizers(
    text: str | None, folder: str, device: torch.device, settings: Settings
) -> tuple[TextTokenizer, ChameleonVQGAN]:
    """The text tokenizer of `text` (None: of `folder`) and the VQGAN of `folder`. Raises `UserError`."""
    tokenizer = TextTokenizer(text or folder)
    vqgan = load_chameleon(folder, device=str(device), dtype=settings.torch_dtype)
    if vqgan.codebook_sizes != (CODEBOOK_SIZE,) or vqgan.side != PIXELS_PER_TOKEN:
        raise UserError(
            f"{folder}/vqgan.yaml: {vqgan.codebook_sizes[0]} codes of {vqgan.side} px; the Chameleon vocabulary has "
            f"names for {CODEBOOK_SIZE} codes of {PIXELS_PER_TOKEN} px"
        )
    return tokenizer, vqgan


def make_manifest(settings: Settings, table: ChunkTable, text: TextTokenizer, vqgan: ChameleonVQGAN) -> dict[str, Any]:
    return {
        "format": "vistoken-tokens-1",
        "image_tokenizer": {"name": vqgan.name, "fingerprint": vqgan.fingerprint},
        "text_tokenizer": text.sha256,
        "vocab_size": text.size,
        "vocabulary": text.vocabulary,
        "settings": asdict(settings),
        "device": vqgan.device.type,
        "input": input_facts(table),
        "versions": {name: version(name) for name in ("vistoken", "torch", "pillow", "tokenizers")},
    }


def make_engine(
    vqgan: ChameleonVQGAN, settings: Settings, num_workers: int, on_images: Callable[[int], None]
) -> Engine:
    sizes = crop_sizes(settings.target_size, settings.crop)
    return Engine(
        vqgan,
        partial(prepare, sizes=sizes),
        batch_size=settings.batch_size,
        num_workers=num_workers,
        on_images=on_images,
    )
