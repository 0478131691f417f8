"""DualViTok against the reference's numbers, and what its codes may not depend on."""

import json

import numpy as np
import pytest
import torch

from vision_tokenizer.dualvitok.model import load_dualvitok
from vision_tokenizer.dualvitok.semantic import vit_input
from vision_tokenizer.image import normalize, prepare
from vision_tokenizer.resolution import anchors

CASES = {
    "astronaut_256": ("h512_w512.png", anchors("fixed", 256)),
    "coffee_384x576": ("photo.jpg", anchors("fixed_anchors", 512)),
}


@pytest.fixture(scope="module")
def tokenizer(dualvitok_config, dualvitok_checkpoint):
    return load_dualvitok(dualvitok_config, dualvitok_checkpoint, device="cpu", decoder=True)


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "codebook" / "dualvitok_small_features.npz") as file:
        return dict(file)


def pixels_of(golden, image, choices):
    return normalize(prepare(golden / "images" / image, choices, 0.2)[0])[None]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_reference_array(case, tokenizer, arrays, golden):
    """Features agree to 1e-4 of an array's largest value, the float16 reconstruction to 5e-4, codes exactly."""
    pixels = pixels_of(golden, *CASES[case])
    encoder = tokenizer.semantic_encoder
    image = vit_input(pixels)
    patches = encoder.model.patches(image)
    features = tokenizer.semantic_features(pixels)[0]  # (h, w, d)
    target = encoder.target(image)[0].unflatten(0, features.shape[:2])
    semantic, pixel = tokenizer.encode(pixels)
    decoded = tokenizer.decode((semantic, pixel))[0]
    found = {
        "pixels_mean": pixels.mean(),
        "pixels_corner": pixels[0, :, :8, :8],
        "vit_input_first_patch": patches[0, 0].view(3, 1, -1).expand(3, 2, -1).flatten(),  # of two equal frames
        "patch_embed_head": encoder.model.patch_embed(patches)[0, :4, :16],
        "vit_head": encoder.model(image)[0, :4, :16],
        "h_semantic": features.permute(2, 0, 1),
        "target_head": target.permute(2, 0, 1)[:16, :4, :4],
        "h_pixel": tokenizer.pixel_features(pixels)[0].permute(2, 0, 1),
        "sem": semantic[0],
        "pix": pixel[0],
        "rec_mean": decoded.mean(),
        "rec_std": decoded.std(),
        "rec_corner": decoded[:, :16, :16],
        "rec": decoded,
        "semantic_decoded_head": tokenizer.decode_semantic(semantic)[0].permute(2, 0, 1)[:16, :4, :4],
    }
    wanted = {name.split("/")[1]: array for name, array in arrays.items() if name.startswith(case)}
    assert set(wanted) - set(found) == set()
    for name, array in wanted.items():
        tolerance = {"sem": 0, "pix": 0, "rec": 5e-4}.get(name, 1e-4) * np.abs(array).max()
        assert np.abs(found[name].numpy() - array).max() <= tolerance, name


@pytest.mark.parametrize("resolution_type, resolution", [("fixed", 256), ("fixed", 512), ("fixed_anchors", 512)])
def test_codes_of_whole_lines(resolution_type, resolution, tokenizer, golden):
    """The first lines of the reference's output, one image at a time."""
    folder = f"fixed_{resolution}" if resolution_type == "fixed" else "fixed_anchors"
    lines = (golden / "codebook" / "expected" / "generation" / folder / "0000.jsonl").read_text().splitlines()
    for line in map(json.loads, lines[:3]):
        for name, grids in zip(line["images"], line["image_embed_inds"], strict=True):
            codes = tokenizer.encode(pixels_of(golden, name, anchors(resolution_type, resolution)))
            assert [grid[0].tolist() for grid in codes] == grids
