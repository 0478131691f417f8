"""DualViTok against the reference's numbers, and what its codes may not depend on."""

from functools import partialmethod
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from vision_tokenizer.images.anchors import FIXED_ANCHORS, anchors
from vision_tokenizer.images.dualvitok import normalize, prepare
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.models.dualvitok.semantic import vit_input
from vision_tokenizer.models.dualvitok.untrained import main as write_untrained
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.errors import UserError

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


@pytest.mark.parametrize("case", ["astronaut_256", pytest.param("coffee_384x576", marks=pytest.mark.slow)])
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
    estimate = tokenizer.semantic_decoder(tokenizer.semantic_quantizer.decode(semantic))
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
        "semantic_decoded_head": estimate[0].float().permute(2, 0, 1)[:16, :4, :4],
    }
    wanted = {name.split("/")[1]: array for name, array in arrays.items() if name.startswith(case)}
    assert set(wanted) - set(found) == set()
    for name, array in wanted.items():
        tolerance = {"sem": 0, "pix": 0, "rec": 5e-4}.get(name, 1e-4) * np.abs(array).max()
        assert np.abs(found[name].numpy() - array).max() <= tolerance, name


@pytest.fixture(scope="module")
def batch(golden):
    names = ("sq_astronaut.png", "sq_chelsea.png", "photo.jpg")
    return torch.cat([normalize(prepare(golden / "images" / n, anchors("fixed", 128), 0)[0])[None] for n in names])


@torch.no_grad()
def test_features_do_not_depend_on_place_or_neighbours(tokenizer, batch):
    """Bit for bit, in batches of one shape."""
    for features in (tokenizer.semantic_features, tokenizer.pixel_features):
        whole = features(batch)
        for order in ([2, 0, 1], [1, 2, 0]):
            assert torch.equal(features(batch[order]), whole[order])
        alone = torch.zeros_like(batch)
        alone[2] = batch[0]
        assert torch.equal(features(alone)[2], whole[0])


@pytest.mark.slow
@torch.no_grad()
def test_features_do_not_depend_on_the_number_of_threads(tokenizer, batch):
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((tokenizer.semantic_features(batch), tokenizer.pixel_features(batch)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_grid_sizes_are_those_of_the_codes(tokenizer):
    for size in ((256, 256), (64, 96), (384, 512), (16, 16)):
        codes = tokenizer.encode(torch.zeros(1, 3, *size))
        assert tuple(grid.shape[1:] for grid in codes) == tokenizer.grid_sizes(*size)
    published = {(512, 512): (18, 18), (384, 768): (13, 26), (320, 960): (11, 33), (256, 1024): (9, 36)}
    for size, grid in published.items():
        assert tokenizer.grid_sizes(*size) == (grid, (size[0] // 16, size[1] // 16))
    with pytest.raises(ValueError, match="multiples of 16"):
        tokenizer.encode(torch.zeros(1, 3, 250, 256))


@pytest.mark.parametrize("dtype, agreement", [("tf32", 1.0), ("bf16", 0.7)])
def test_other_dtypes(dtype, agreement, tokenizer, batch, dualvitok_config, dualvitok_checkpoint):
    other = load_dualvitok(dualvitok_config, dualvitok_checkpoint, device="cpu", dtype=dtype)
    assert other.fingerprint == tokenizer.fingerprint  # the dtype is no part of it
    assert other.semantic_quantizer.codebook.dtype == torch.float32
    for wanted, found in zip(tokenizer.encode(batch), other.encode(batch), strict=True):
        assert (wanted == found).float().mean() >= agreement


@pytest.mark.slow
def test_compiled_every_resolution_has_kernels_of_its_own(tiny_dualvitok, monkeypatch):
    """Kernels for any size, which torch makes from the second size on, would make codes depend on the order."""
    counter, told = CompileCounter(), []

    def backend(graph, inputs, options):
        told.append(options)
        return counter(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    plain, compiled = (load_dualvitok(*tiny_dualvitok, device="cpu", compile=on) for on in (False, True))
    compiled_graphs = []
    for height, width in FIXED_ANCHORS[:5]:
        pixels = torch.rand(1, 3, height // 4 // 16 * 16, width // 4 // 16 * 16) * 2 - 1
        codes = compiled.encode(pixels)
        assert all(torch.equal(a, b) for a, b in zip(codes, plain.encode(pixels), strict=True))
        compiled_graphs.append(counter.frame_count)
    assert all(before < after for before, after in pairwise(compiled_graphs))
    compiled.encode(torch.zeros(1, 3, 128, 128))  # the first resolution again
    assert counter.frame_count == compiled_graphs[-1]
    assert all(options == {"deterministic": True} for options in told), "processes must choose the same kernels"


def test_an_untrained_checkpoint_that_cannot_be_written_is_named(tiny_dualvitok, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot write"):
        write_untrained(["--config", str(tiny_dualvitok[0]), "--out", str(tmp_path / "file" / "pytorch_model.bin")])


def test_protocol(tokenizer):
    assert isinstance(tokenizer, ImageTokenizer)
    assert tokenizer.codebook_sizes == (2048, 6144)
    assert len(tokenizer.fingerprint) == 64
