"""`load_tokenizer`, as the README shows it, and the untrained checkpoint that it can be tried with."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vision_tokenizer import load_tokenizer
from vision_tokenizer.models.dualvitok import untrained
from vistoken.errors import UserError


@pytest.fixture(scope="module")
def files(tiny_dualvitok, tmp_path_factory):
    """(config, an untrained checkpoint of it)."""
    checkpoint = tmp_path_factory.mktemp("untrained") / "new" / "pytorch_model.bin"
    assert untrained.main(["--config", str(tiny_dualvitok[0]), "--out", str(checkpoint)]) == 0
    return tiny_dualvitok[0], checkpoint


@pytest.fixture(scope="module")
def tokenizer(files):
    return load_tokenizer(*files, device="cpu")


@pytest.fixture(scope="module")
def images(golden):
    names = ("sq_astronaut.png", "tiny.png", "palette.png", "rgba.png", "sq_chelsea.png")
    opened = [Image.open(golden / "images" / name) for name in names]
    return [image.resize((image.width // 2, image.height // 2)) if image.width > 100 else image for image in opened]


def test_images_of_any_size_and_mode(tokenizer, images):
    together = tokenizer.encode(images)
    for image, codes in zip(images, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tokenizer.encode(image), codes, strict=True))
        height, width = (grid * 16 for grid in codes[1].shape)
        assert abs(height - image.height) <= 8 and abs(width - image.width) <= 8
    decoded = tokenizer.decode(together)
    assert [image.size for image in decoded] == [(c[1].shape[1] * 16, c[1].shape[0] * 16) for c in together]
    assert decoded[0].mode == "RGB" and np.asarray(decoded[0]).std() > 0


def test_tensor_batches(tokenizer, images):
    pixels = torch.stack([torch.from_numpy(np.array(images[i].resize((64, 96)))).permute(2, 0, 1) for i in (0, 4)])
    codes = tokenizer.encode(pixels)
    assert [tuple(grid.shape) for grid in codes] == [(2, 3, 2), (2, 6, 4)]
    as_float = tokenizer.encode((pixels / 255 - 0.5) / 0.5)
    assert all(torch.equal(a, b) for a, b in zip(codes, as_float, strict=True))
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (2, 3, 96, 64) and decoded.abs().max() <= 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "found <class 'str'>"),
        (["photo.jpg"], "found <class 'list'>"),
        (torch.zeros(3, 32, 32), r"found \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "found torch.int64"),
        (torch.full((1, 3, 32, 32), 255.0), "found torch.float32"),
        (Image.new("RGB", (0, 9)), "0 x 9 has no pixels"),
    ],
)
def test_what_is_no_image(tokenizer, images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tokenizer.encode(images)


def test_a_device_of_no_kind(files):
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        load_tokenizer(*files, device="gpu")


def test_codes_that_no_codebook_has(tokenizer):
    good = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"semantic codes lie in \[0, 256\), found 0 to 256"):
        tokenizer.decode((torch.tensor([[0, 256]]), good))
    with pytest.raises(ValueError, match="1 grids for the branches semantic, pixel"):
        tokenizer.decode((good,))
    with pytest.raises(ValueError, match=r"an image of 32 x 32 \(h, w\) has grids of .*, found .*\(9, 9\)"):
        tokenizer.decode((torch.zeros(9, 9, dtype=torch.int64), good))  # the decoder would stretch it
    with pytest.raises(ValueError, match=r"semantic codes are whole numbers, found torch\.float32"):
        tokenizer.decode((good.float(), good))
    with pytest.raises(ValueError, match=r"expected grids \(h, w\)"):
        tokenizer.decode((good[:0], good))
    with pytest.raises(ValueError, match=r"expected grids \(h, w\)"):
        tokenizer.decode((good, good[0]))


def test_codes_as_a_line_of_codebook_inference_has_them(tokenizer, images):
    codes = tokenizer.encode(images[0])
    wanted = tokenizer.decode(codes).tobytes()
    rows = json.loads(json.dumps([grid.tolist() for grid in codes]))  # one of `image_embed_inds`
    assert tokenizer.decode(rows).tobytes() == wanted
    assert [image.tobytes() for image in tokenizer.decode([rows, rows])] == [wanted] * 2
    assert tokenizer.decode(tuple(grid.numpy().astype("uint16") for grid in codes)).tobytes() == wanted


def test_sixteen_bits_are_scaled_and_more_refused(tokenizer):
    deep, grey = tokenizer.encode(Image.new("I;16", (64, 64), 40_000)), tokenizer.encode(Image.new("L", (64, 64), 156))
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(deep, grey, strict=True))
    with pytest.raises(ValueError, match="more than 16 bits: an image: mode F"):
        tokenizer.encode(Image.new("F", (64, 64)))


def test_loading_for_encoding_only(files, tokenizer, images):
    alone = load_tokenizer(*files, device="cpu", decoder=False)
    assert sum(p.numel() for p in alone.model.parameters()) < sum(p.numel() for p in tokenizer.model.parameters())
    assert alone.model.fingerprint == tokenizer.model.fingerprint
    codes = alone.encode(images[0])
    with pytest.raises(UserError, match="decoder=True"):
        alone.decode(codes)


def test_another_models_checkpoint_and_ema(files, chameleon_folder, tmp_path):
    with pytest.raises(UserError, match=r"vqgan\.ckpt does not fit DualViTok .*another model's checkpoint"):
        load_tokenizer(files[0], chameleon_folder / "vqgan.ckpt", device="cpu")
    with pytest.raises(UserError, match="no `ema`"):
        load_tokenizer(*files, device="cpu", use_ema=True)
    with pytest.raises(UserError, match="unknown dtype"):
        load_tokenizer(*files, device="cpu", dtype="float32")


def test_untrained_weights_are_the_same_everywhere(files, tmp_path, images, tokenizer):
    again = tmp_path / "again.bin"
    untrained.main(["--config", str(files[0]), "--out", str(again)])
    first, second = torch.load(files[1]), torch.load(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [file.name for file in tmp_path.iterdir()] == ["again.bin"]
    one, other = (tokenizer.encode(images[i].resize((128, 128))) for i in (0, 4))
    assert all((a != b).float().mean() > 0.5 for a, b in zip(one, other, strict=True))
    assert all(grid.unique().numel() > 4 for grid in one)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, vision_tokenizer, vision_tokenizer.models.dualvitok.untrained; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
