"""The Chameleon VQGAN against the reference's tokens and pixels."""

import json
from functools import partialmethod

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch._dynamo.testing import CompileCounter

from vision_tokenizer.images.dualvitok import normalize, to_pixels
from vision_tokenizer.models.chameleon.vocabulary import ChameleonVocabulary
from vision_tokenizer.models.chameleon.vqgan import load_chameleon
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.errors import UserError


@pytest.fixture(scope="module")
def vqgan(chameleon_folder):
    return load_chameleon(chameleon_folder, device="cpu", decoder=True)


@pytest.fixture(scope="module")
def vocabulary(chameleon_folder):
    file = chameleon_folder / "text_tokenizer.json"
    return ChameleonVocabulary(Tokenizer.from_file(str(file)).get_vocab(), str(file))


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "chameleon_small" / "vqgan_arrays.npz") as file:
        return dict(file)


def block_of(tokens, vocabulary):
    """The one image block of a token list, as (h, w) codes."""
    start, end = tokens.index(vocabulary.image_start), tokens.index(vocabulary.image_end)
    codes = {int(token): code for code, token in enumerate(vocabulary.image_ids)}
    rows = " ".join(map(str, tokens[start + 3 : end])).split(str(vocabulary.new_line))
    return np.array([[codes[int(token)] for token in row.split()] for row in rows if row.strip()])


def test_decoding_a_written_block(vqgan, vocabulary, arrays, golden):
    tokens = json.loads((golden / "chameleon_small" / "expected_tokens.json").read_text())["square"]["2"]
    codes = torch.from_numpy(block_of(tokens["token"], vocabulary))[None]
    wanted = arrays["decoded_item2"]
    found = vqgan.decode((codes,))[0].numpy()
    assert np.abs(found - wanted).max() <= 5e-4 * np.abs(wanted).max()  # stored as float16


def test_attention_levels_are_given_by_resolution(chameleon_attn_folder, arrays, golden):
    vqgan = load_chameleon(chameleon_attn_folder, device="cpu")
    with Image.open(golden / "images" / "sq_gray.png") as image:
        image = image.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    pixels = normalize(to_pixels(image))[None]
    assert np.abs(pixels[0, :, :4, :4].numpy() - arrays["attn_input"]).max() < 1e-6
    assert np.array_equal(vqgan.encode(pixels)[0][0].numpy(), arrays["attn_codes"])


def test_protocol_and_sizes(vqgan, chameleon_folder):
    alone = load_chameleon(chameleon_folder, device="cpu")
    assert isinstance(alone, ImageTokenizer)
    assert alone.fingerprint == vqgan.fingerprint  # a decoder does not change the codes
    assert alone.grid_sizes(512, 256) == ((32, 16),)
    with pytest.raises(ValueError, match="multiples of 16"):
        alone.grid_sizes(500, 512)
    with pytest.raises(UserError, match="decoder=True"):
        alone.decode((torch.zeros(1, 2, 2, dtype=torch.int64),))


def test_extra_training_weights_are_ignored_and_missing_ones_named(chameleon_folder, tmp_path):
    (tmp_path / "vqgan.yaml").write_bytes((chameleon_folder / "vqgan.yaml").read_bytes())
    state = torch.load(chameleon_folder / "vqgan.ckpt")["state_dict"]
    torch.save({"state_dict": state | {"loss.discriminator.main.0.weight": torch.ones(1)}}, tmp_path / "vqgan.ckpt")
    load_chameleon(tmp_path, device="cpu", decoder=True)
    torch.save({"state_dict": state | {"projector.weight": torch.ones(1)}}, tmp_path / "vqgan.ckpt")
    with pytest.raises(UserError, match=r"not in the model: projector\.weight"):
        load_chameleon(tmp_path, device="cpu")
    del state["quant_conv.bias"]
    torch.save({"state_dict": state}, tmp_path / "vqgan.ckpt")
    with pytest.raises(UserError, match=r"missing: quant_conv\.bias"):
        load_chameleon(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "text, named",
    [
        ("model: {params: {embed_dim: 4}}", "ddconfig"),
        ("- a list", "not the YAML of a VQGAN"),
        (
            "model: {params: {embed_dim: 4, n_embed: 8, ddconfig: {ch: 48, ch_mult: [1, 2], num_res_blocks: 1, "
            "resolution: 32, attn_resolutions: [], z_channels: 4}}}",
            "is 48, which 32 groups of normalisation cannot share",
        ),
        ("model: [", "not valid YAML"),
    ],
)
def test_bad_configs(text, named, tmp_path):
    (tmp_path / "vqgan.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        load_chameleon(tmp_path, device="cpu")


def test_a_missing_config(tmp_path):
    with pytest.raises(UserError, match=r"vqgan\.yaml: no such file"):
        load_chameleon(tmp_path, device="cpu")


@pytest.mark.slow
def test_compiled_it_gives_the_same_codes(chameleon_folder, monkeypatch):
    counter = CompileCounter()

    def backend(graph, inputs, options):
        assert options == {"deterministic": True}
        return counter(graph, inputs)

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    plain, compiled = (load_chameleon(chameleon_folder, device="cpu", compile=on) for on in (False, True))
    for size in (64, 96, 64):
        pixels = torch.rand(1, 3, 64, size) * 2 - 1
        assert torch.equal(*(vqgan.encode(pixels)[0] for vqgan in (plain, compiled)))
    assert counter.frame_count == 2, "kernels of its own for each size"
