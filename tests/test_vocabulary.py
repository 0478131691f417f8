import json

import numpy as np
import pytest
import torch

from pre_tokenize.sequences import pairs
from pre_tokenize.text import TextTokenizer
from vision_tokenizer.models.chameleon import untrained
from vision_tokenizer.models.chameleon.vocabulary import (
    RELEASED_IMAGE_IDS,
    RELEASED_MARKS,
    ChameleonVocabulary,
    image_token_name,
)
from vision_tokenizer.models.chameleon.vqgan import load_chameleon
from vistoken.errors import UserError


@pytest.fixture(scope="module")
def ids(golden):
    return TextTokenizer(golden / "chameleon_small").ids


@pytest.fixture(scope="module")
def vocabulary(ids):
    return ChameleonVocabulary(ids, "text_tokenizer.json")


def test_special_tokens_have_the_published_ids(vocabulary):
    assert (vocabulary.begin, vocabulary.end_of_turn, vocabulary.new_line) == (0, 8710, 8803)
    assert (vocabulary.image_start, vocabulary.image_end, vocabulary.separator) == (8197, 8196, 8198)
    assert vocabulary.marks == RELEASED_MARKS
    assert vocabulary.grid_ids[[1, 16, 64]].tolist() == [8805, 8820, 8868]


def test_image_ids_are_read_from_their_names(vocabulary, ids):
    assert image_token_name(8046) == "IMGIMGIAEGZ"
    assert vocabulary.image_ids[8046] == ids["IMGIMGIAEGZ"]
    assert sorted(vocabulary.image_ids.tolist()) == list(RELEASED_IMAGE_IDS) == list(range(4, 8196))
    assert vocabulary.image_ids.tolist() != list(range(4, 8196))  # not in code order


@pytest.mark.parametrize("h, w", [(32, 32), (22, 44), (2, 2)])
def test_a_block_gives_its_codes_back(vocabulary, h, w):
    codes = np.random.default_rng(0).integers(0, 8192, (h, w))
    block = vocabulary.image_block(codes)
    assert len(block) == h * (w + 1) + 4
    assert block[:3].tolist() == [8197, 8804 + h // 2, 8804 + w // 2]
    assert (block[3:-1].reshape(h, w + 1)[:, -1] == 8803).all() and block[-1] == 8196
    np.testing.assert_array_equal(vocabulary.image_codes(block), codes)


def test_marks_pair_up_around_every_golden_block(golden, vocabulary):
    expected = json.loads((golden / "chameleon_small" / "expected_tokens.json").read_text())
    tokens = np.array(expected["square"]["0"]["token"], np.int32)
    marks = vocabulary.image_start, vocabulary.image_end, "image"
    assert [last + 1 - start for start, last in pairs(tokens, *marks)] == [1060] * 4
    wide = np.array(expected["variable"]["10"]["token"], np.int32)
    shapes = [vocabulary.image_codes(wide[start : last + 1]).shape for start, last in pairs(wide, *marks)]
    assert shapes == [(22, 44)] * 2


@pytest.mark.parametrize("change", [(0, 5000), (1, 8830), (5, 9058), (35, 4), (1059, 8803)])
def test_a_damaged_block_is_told(vocabulary, change):
    block = vocabulary.image_block(np.zeros((32, 32), int))
    block[change[0]] = change[1]
    with pytest.raises(ValueError, match="image block"):
        vocabulary.image_codes(block)


def test_an_unclosed_block_is_told(vocabulary):
    with pytest.raises(ValueError, match="1 image starts and 0 image ends"):
        pairs(np.array([0, 8197, 8820, 8820, 4]), vocabulary.image_start, vocabulary.image_end, "image")


@pytest.mark.parametrize("name", ["<racm3:break>", "<reserved08706>", "<reserved08864>", "IMGIMGIAEGZ"])
def test_a_missing_token_is_named(ids, name):
    with pytest.raises(UserError, match="no token") as error:
        ChameleonVocabulary({key: value for key, value in ids.items() if key != name}, "text_tokenizer.json")
    assert repr(name) in str(error.value)


def test_untrained_tokenizers_have_the_published_ids(tmp_path):
    untrained.main(["--out", str(tmp_path)])
    text = TextTokenizer(tmp_path)
    vocabulary = ChameleonVocabulary(text.ids, "")
    assert (vocabulary.begin, vocabulary.end_of_turn, vocabulary.new_line) == (0, 8710, 8803)
    assert vocabulary.grid_ids[16] == 8820 and sorted(vocabulary.image_ids.tolist()) == list(range(4, 8196))
    assert len(text.encode_batch(["café"])[0]) == 5  # bytes
    codes = load_chameleon(tmp_path, device="cpu").encode(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))[0]
    assert len(codes.unique()) > 1
