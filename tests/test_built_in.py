"""The trained tokenizers that come with the repository: they load as said and show what was encoded."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pre_tokenize.text import TextTokenizer
from vision_tokenizer import load_tokenizer
from vision_tokenizer.fitting.transforms import shorter_side_crop
from vision_tokenizer.images.dualvitok import denormalize, normalize, to_pixels
from vision_tokenizer.models.chameleon.vocabulary import ChameleonVocabulary
from vision_tokenizer.models.chameleon.vqgan import load_chameleon
from vision_tokenizer.review.quality import psnr
from vision_tokenizer.tokenizer.tokenizer_codebook_inference import main as encode
from vistoken.errors import UserError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "data_configs" / "train_data_examples"
OUTPUT = Path("jsonl_after_tokenizer") / "dualvitok" / "fixed_256" / "0000.jsonl"


@pytest.fixture(scope="module")
def pictures() -> list:
    names = ("astronaut", "coffee", "rocket", "cat")
    files = [EXAMPLES / "examples_generation" / "images" / f"{name}.jpg" for name in names]
    return [to_pixels(shorter_side_crop(Image.open(file).convert("RGB"), 256)) for file in files]


def mean_psnr(model, pictures) -> float:
    again = [denormalize(model.decode(model.encode(normalize(pixels[None])))[0]) for pixels in pictures]
    return float(np.mean([psnr(pixels, other) for pixels, other in zip(pictures, again, strict=True)]))


def test_load_tokenizer_without_arguments_reconstructs_pictures_it_never_saw(pictures):
    tokenizer = load_tokenizer(device="cpu")
    assert mean_psnr(tokenizer.model, pictures) > 21
    with pytest.raises(UserError, match="name both, or none"):
        load_tokenizer(ROOT / "configs" / "example" / "dualvitok" / "dualvitok_small.py")


def test_chameleon_reconstructs_pictures_it_never_saw(pictures):
    folder = ROOT / "checkpoints" / "chameleon_small"
    assert mean_psnr(load_chameleon(folder, device="cpu", decoder=True), pictures) > 21
    text = TextTokenizer(folder)
    assert len(ChameleonVocabulary(text.ids, str(text.path)).image_ids) == 8192


@pytest.mark.parametrize("weights", ["dualvitok_small/model.safetensors", "chameleon_small/vqgan.ckpt"])
def test_the_weights_are_small_and_have_a_card(weights):
    file = ROOT / "checkpoints" / weights
    assert file.stat().st_size <= 20e6
    folder = file.parent
    card = (folder / "README.md").read_text()
    assert "icences" in card and "PSNR" in card


def test_the_example_of_the_output_is_what_the_command_writes(tmp_path):
    """To the byte on most machines; where a feature lies between two codes, another CPU may take the other."""
    name = "examples_editing"
    config = {
        name: {
            "root": str(tmp_path),
            "image_dir": str(EXAMPLES / name / "images"),
            "annotation_dir": str(EXAMPLES / name / "jsonl"),
            "tokenizer_inference": True,
        }
    }
    (tmp_path / "data.json").write_text(json.dumps(config))
    built_in = ["--model_config", str(ROOT / "configs" / "example" / "dualvitok" / "dualvitok_small.py")]
    built_in += ["--tokenizer_checkpoint", str(ROOT / "checkpoints" / "dualvitok_small"), "--device", "cpu"]
    size = ["--resolution_type", "fixed", "--resolution", "256"]
    assert encode(["--data_config", str(tmp_path / "data.json"), *built_in, *size]) == 0
    written, shipped = (tmp_path / OUTPUT).read_bytes(), (EXAMPLES / name / OUTPUT).read_bytes()
    if written == shipped:
        return
    for line, other in zip(written.splitlines(), shipped.splitlines(), strict=True):
        one, two = json.loads(line), json.loads(other)
        codes, others = (
            np.concatenate([np.ravel(g) for i in x.pop("image_embed_inds") for g in i]) for x in (one, two)
        )
        assert one == two
        assert (codes == others).mean() > 0.98
