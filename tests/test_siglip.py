"""The vision tower against transformers' own, from both kinds of SigLIP folder."""

import pytest
import torch
import transformers

from training.models.folder import read_tower
from training.models.siglip import VisionConfig, VisionTower

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.mark.parametrize("kind", ["tower alone", "both halves"])
def test_features_are_transformers_own(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "tower alone":
        saved = tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES))
    else:
        text = {**SIZES, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
        saved = transformers.SiglipModel(transformers.SiglipConfig(vision_config=SIZES, text_config=text))
        tower = saved.vision_model
    saved.save_pretrained(tmp_path)
    config, tensors = read_tower(tmp_path)
    ours = VisionTower(VisionConfig(**{name: config[name] for name in SIZES}))
    ours.load_state_dict({name.removeprefix("vit."): tensor for name, tensor in tensors.items()})
    tiles = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        expected = tower.eval()(tiles.float() / 127.5 - 1).last_hidden_state
        torch.testing.assert_close(ours(tiles), expected, rtol=1e-4, atol=1e-5)
