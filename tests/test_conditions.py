"""What guidance compares with: prompts and training samples that have lost their condition."""

import numpy as np
import pytest
from lm_small import extended_tokenizer, made_line
from unitoken_small import golden

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenSample
from vistoken.jobs.chunks import Item

SQUARE = golden("chameleon_small/expected_tokens.json")["square"]


@pytest.fixture(scope="module")
def chameleon(chameleon_folder):
    return ChameleonFormat(TextTokenizer(chameleon_folder))


@pytest.fixture(scope="module")
def dualvitok(tmp_path_factory):
    return DualViTokFormat(TextTokenizer(extended_tokenizer(tmp_path_factory.mktemp("lm"))))


def test_the_unconditional_prompt_keeps_the_size_or_the_image_to_edit(dualvitok):
    format = dualvitok
    spell = format.vocabulary.spell
    head = spell(["<height_256>", "<width_512>", "<start_of_image>"]).tolist()
    line = made_line("Draw <image>, but blue\n", "yes", anchors=[(256, 256)])
    [draft] = format.drafts([Item(0, "", b"", line)])
    sample = format.sample(draft, {})
    [block] = format.blocks(sample.tokens)
    ids = np.array(format.unconditional(sample.tokens, head))
    [kept] = format.blocks(ids[:-3])
    np.testing.assert_array_equal(ids[kept.start : kept.end], sample.tokens[block.start : block.end])
    words = format.text(ids[: kept.start]) + "IMAGE" + format.text(ids[kept.end : -3])
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    assert words == f"<|im_start|>user\nIMAGE\nReconstruct the image according to the given image\n{answer}"
    assert ids[-3:].tolist() == head
    drawn = format.text(np.array(format.unconditional(np.array([format.turn_end]), head)))
    size = "<height_256><width_512>"
    assert drawn == f"<|im_start|>user\nGenerate a random image of {size}\n{answer}{size}<start_of_image>"


def test_a_chameleon_sample_without_its_condition_begins_with_its_image(chameleon):
    item = SQUARE["0"]  # four images, of which the second is the first that is learned
    tokens, labels = np.array(item["token"], np.int32), np.array(item["label"])
    sample = TokenSample(0, tokens, labels >= 0, ("a", "b", "c", "d"))
    dropped = chameleon.without_condition(sample)
    start = chameleon.blocks(tokens)[1].start
    assert dropped.tokens.tolist() == tokens[start:].tolist() and dropped.images == ("b", "c", "d")
    assert not dropped.loss_mask[0] and dropped.loss_mask[1:].tolist() == sample.loss_mask[start + 1 :].tolist()
    caption = SQUARE["1"]
    told = TokenSample(1, np.array(caption["token"], np.int32), np.array(caption["label"]) >= 0, ("a",))
    assert chameleon.without_condition(told) is told


def test_an_edit_without_its_condition_reconstructs_and_a_drawing_keeps_its_size(dualvitok):
    format = dualvitok
    anchors = [(256, 256), (384, 512)]
    lines = [
        made_line("<image>Make it blue", "Here: <image>", anchors=anchors),
        made_line("Draw {resolution_tag}, a barn", "<image>", anchors=anchors[:1]),
        made_line("Hello", "hello"),
    ]
    samples = [
        format.sample(draft, {}) for draft in format.drafts([Item(n, "", b"", line) for n, line in enumerate(lines)])
    ]
    edit, drawing, text = (format.without_condition(sample) for sample in samples)
    assert text is samples[2]
    for sample in (edit, drawing):
        np.testing.assert_array_equal(format.learned(sample.tokens), sample.loss_mask)
    given, target = format.blocks(edit.tokens)
    assert given.size == target.size == (256, 256) and edit.images == ("0.png", "0.png")
    for grid, same in zip(given.grids, target.grids, strict=True):
        np.testing.assert_array_equal(grid, same)
    assert "Reconstruct the image" in format.text(edit.tokens[given.end : target.start])
    [kept] = format.blocks(drawing.tokens)
    [block] = format.blocks(samples[1].tokens)
    np.testing.assert_array_equal(kept.grids[1], block.grids[1])
    message = format.text(drawing.tokens[: kept.start])
    assert message.startswith("<|im_start|>user\nGenerate a random image of <height_256><width_256>\n<|im_end|>")
