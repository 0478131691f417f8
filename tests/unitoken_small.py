"""The small UniToken model and the samples that the golden numbers were computed with."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.data.anyres import image_input
from training.data.packing import Batch, Sample, interleave, pack
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from training.models.unitoken import UniToken
from training.models.units import recompute

GOLDEN = Path(__file__).parent / "golden"
IMAGES = GOLDEN / "images"
VISION = VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ITEMS = {
    "caption": (1, "sq_astronaut.png"),
    "t2i": (2, "sq_chelsea.png"),
    "text": (3, None),
    "wide": (4, "wide_2x1.png"),
}


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


LLM_JSON = golden("training/llm_config.json")
LLM = LLMConfig(**{name: LLM_JSON[name] for name in LLMConfig.__dataclass_fields__})


def synthetic_state() -> dict[str, torch.Tensor]:
    """The golden weights, by name."""
    spec = importlib.util.spec_from_file_location("synthetic_weights", GOLDEN / "synthetic_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys = golden("unitoken_small_keys.json")
    return {name: torch.from_numpy(module.synthetic_tensor(name, tuple(shape))) for name, shape in keys.items()}


def small_model(checkpointing: bool = False, **settings) -> UniToken:
    settings.setdefault("z_weight", 1e-5)
    model = UniToken(LLM, VISION, **settings)
    model.load_state_dict(synthetic_state())
    for unit in model.units() if checkpointing else ():
        recompute(unit, selective=False)
    return model


def tokens_and_labels(kind: str) -> tuple[np.ndarray, np.ndarray]:
    item = golden("chameleon_small/expected_tokens.json")["square"][str(ITEMS[kind][0])]
    return np.array(item["token"]), np.array(item["label"])


def sample(kind: str, variant: str = "base") -> Sample:
    image = ITEMS[kind][1]
    opened = [Image.open(IMAGES / image).convert("RGB")] if image else []
    inputs = [image_input(picture, VISION.image_size, VISION.grid, variant == "anyres") for picture in opened]
    return interleave(kind, *tokens_and_labels(kind), inputs)


def batch(kinds: str, variant: str = "base") -> Batch:
    """`kinds` is as in the golden files, such as "caption+text"."""
    return pack([sample(kind, variant) for kind in kinds.split("+")], VISION.image_size)
