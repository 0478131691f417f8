"""The command: prompts in, answers, pictures and a report out; what it refuses, and how it goes on."""

import json
import resource

import numpy as np
import pytest
import torch
from lm_small import GOLDEN_SIZES, extended_tokenizer, golden_lines, write_lines, write_tokenizer
from lm_small import write_model as write_lm
from PIL import Image
from train_small import write_model
from unitoken_small import IMAGES

from pre_tokenize.text import TextTokenizer
from training.generate import main
from training.generation.decode import Decoder
from vision_tokenizer.models.chameleon.untrained import write_text_tokenizer
from vistoken.errors import UserError


@pytest.fixture(scope="module")
def unitoken(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("unitoken") / "final")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A language model with DualViTok's words, and its tokenizer beside it."""
    folder = extended_tokenizer(tmp_path_factory.mktemp("lm"))
    return write_lm(folder, vocab_size=TextTokenizer(folder).size)


def run(out, model, *more):
    flags = ["--model", model, "--out", out, "--device", "cpu", "--precision", "fp32", *more]
    return main([str(flag) for flag in flags])


def answers(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def chat(human, gpt=None, image=None, **more):
    turns = [{"from": "human", "value": human}] + ([{"from": "gpt", "value": gpt}] if gpt is not None else [])
    return {"conversations": turns, **({"image": image} if image else {}), **more}


MIXED = [
    chat("Generate an image of a red barn.", "<|image|>", ["never_read.png"], id="barn"),
    chat("<|image|>\nWhat is this?", "An astronaut.", ["sq_astronaut.png"]),
    chat("Hello", "Hello."),
    chat("Make it blue. <|image|>", "<|image|>", ["sq_gray.png", "never_read.png"]),
]


@pytest.fixture
def small(chameleon_folder):
    return ("--tokenizer_dir", chameleon_folder, "--variant", "base", "--target_size", 64, "--image_dir", IMAGES)


def test_prompts_of_all_kinds_are_answered(tmp_path, unitoken, small, chameleon_folder, capsys):
    prompts = write_lines(tmp_path / "prompts.jsonl", [*MIXED, chat("no <|image|>", ""), {"conversations": 3}])
    more = ("--prompts", prompts, "--n", 2, "--max_new_tokens", 12, "--height", 64, "--width", 96, "--max_failed", 1)
    assert run(tmp_path / "out", unitoken, *small, *more) == 0
    said, lines = capsys.readouterr(), answers(tmp_path / "out")
    assert [(line["id"], line["sample"]) for line in lines] == [(i, n) for i in ("barn", 1, 2, 3) for n in (0, 1)]
    for line in lines:
        picture = line["item"] in (0, 3)
        assert line["files"] == ([f"images/{line['item']:06d}-{line['sample']}-0.png"] if picture else [])
        assert line["settings"]["task"] == ("image" if picture else "text")
        assert line["text"].count("<|image|>") == len(line["files"])
        for name in line["files"]:
            assert Image.open(tmp_path / "out" / name).size == (96, 64)
    assert len({tuple(line["tokens"]) for line in lines}) == 8  # every sample has noise of its own
    rejected = [json.loads(line) for line in (tmp_path / "out" / "answers.rejected.jsonl").read_text().splitlines()]
    assert [(line["item"], line["reason"]) for line in rejected] == [(4, "image count"), (5, "no conversation")]
    assert "without --condition_dropout has not seen" in said.err and "answers: 8, pictures: 4" in said.out
    html = (tmp_path / "out" / "report.html").read_text()
    assert "size 64 x 96" in html and "&lt;|image|&gt;</span>" not in html
    assert not any(words in html for words in ("not found", "None", "[]"))
    assert "Generate an image of a red barn." in html and html.count('<article class="talk">') == 8


@pytest.mark.slow
def test_the_batch_does_not_change_answers_and_a_rerun_goes_on(tmp_path, unitoken, small):
    prompts = write_lines(tmp_path / "prompts.jsonl", [*MIXED, chat("<|image|> what?", "", ["later.png"])])
    more = ("--prompts", prompts, "--max_new_tokens", 8, "--height", 32, "--width", 64, "--image_dir", tmp_path)
    for path in IMAGES.glob("sq_*.png"):
        (tmp_path / path.name).symlink_to(path)
    assert run(tmp_path / "one", unitoken, *small, *more, "--batch_size", 1) == 1
    assert run(tmp_path / "five", unitoken, *small, *more, "--batch_size", 5) == 1
    (tmp_path / "later.png").symlink_to(IMAGES / "sq_gray.png")
    before = [line["tokens"] for line in answers(tmp_path / "one")]
    for name, size in (("one", 1), ("five", 5)):
        assert run(tmp_path / name, unitoken, *small, *more, "--batch_size", size) == 0
    said = [[line["tokens"] for line in answers(tmp_path / name)] for name in ("one", "five")]
    assert said[0] == said[1] and said[0][:4] == before and len(said[0]) == 5
    assert run(tmp_path / "whole", unitoken, *small, *more, "--batch_size", 5, "--no_cache") == 0
    assert [line["tokens"] for line in answers(tmp_path / "whole")] == said[0]


@pytest.mark.slow
def test_a_language_model_answers_in_pictures_and_text(tmp_path, lm, dualvitok_config, dualvitok_checkpoint):
    lines = golden_lines("editing/fixed_256/0000")[:1]
    question = golden_lines("generation/fixed_256/0001")[0]
    question["conversations"] = chat("Hello", "A text.")["conversations"]
    bare = {"conversations": [{"from": "human", "value": "Generate an image of {resolution_tag}, of a barn\n"}]}
    file = {"images": ["sq_gray.png"], "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    for name in ("images", "image_sizes", "image_embed_inds", "matched_ratios"):
        question.pop(name)
    prompts = write_lines(tmp_path / "prompts.jsonl", [*lines, question, bare, file])
    more = (
        "--variant",
        "lm",
        "--prompts",
        prompts,
        "--max_new_tokens",
        6,
        "--image_dir",
        IMAGES,
        "--batch_size",
        3,
        "--height",
        256,
        "--width",
        256,
    )
    model = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    assert run(tmp_path / "out", lm, *more, *model) == 0
    found = answers(tmp_path / "out")
    assert [line["matched_ratios"] for line in found] == [[[256, 256]], [], [[256, 256]], []]
    assert [Image.open(tmp_path / "out" / found[item]["files"][0]).size for item in (0, 2)] == [(256, 256), (256, 256)]
    grids = found[0]["image_embed_inds"][0]
    assert [np.array(grid).shape for grid in grids] == [(9, 9), (16, 16)]
    assert [np.array(grid).max() < size for grid, size in zip(grids, GOLDEN_SIZES, strict=True)] == [True, True]


def test_what_does_not_fit_together_is_refused(tmp_path, unitoken, lm, small, chameleon_folder):
    asked = ("--prompt", "a barn")
    write_text_tokenizer(tmp_path / "other.json")
    with pytest.raises(UserError, match="another vocabulary"):
        run(tmp_path / "a", unitoken, *asked, *small, "--text_tokenizer", tmp_path / "other.json")
    bare = write_lm(tmp_path / "bare")
    with pytest.raises(UserError, match=r"neither text_tokenizer.json nor tokenizer.json in this folder"):
        run(tmp_path / "b", bare, *asked, "--variant", "lm")
    plain = write_tokenizer(tmp_path / "plain")
    write_lm(plain)
    with pytest.raises(UserError, match="no token <start_of_image>"):
        run(tmp_path / "c", plain, *asked, "--variant", "lm")
    with pytest.raises(UserError, match="no anchor has this size"):
        run(tmp_path / "d", lm, *asked, "--variant", "lm", "--height", 512, "--width", 500)
    with pytest.raises(UserError, match="multiples of 32 up to 2048"):
        run(tmp_path / "e", unitoken, *asked, *small, "--height", 100, "--width", 64)
    with pytest.raises(UserError, match="does not say how it was trained"):
        run(tmp_path / "f", unitoken, *asked)
    with pytest.raises(UserError, match=r"a vocabulary of \d+ ids, the model .*bare knows 320"):
        run(tmp_path / "b2", bare, *asked, "--variant", "lm", "--tokenizer_dir", lm)
    with pytest.raises(UserError, match="no vit in it"):
        half = write_model(tmp_path / "half", ("model.", "lm_head."))
        run(tmp_path / "g", half, *asked, *small)
    assert run(tmp_path / "h", unitoken, *small, "--prompt", "<|image|> <|image|>", "--image", "sq_gray.png") == 1
    assert run(tmp_path / "i", unitoken, *small, "--prompt", "<|image|>", *("--image", "sq_gray.png") * 2) == 1
    for out in ("h", "i"):
        rejected = json.loads((tmp_path / out / "answers.rejected.jsonl").read_text())
        assert rejected["reason"] == "image count"
    with pytest.raises(UserError, match="the answers to another prompt"):
        run(tmp_path / "h", unitoken, *small, *asked)


def test_too_little_memory_names_the_flags_to_lower(tmp_path, unitoken, small, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Decoder, "answer", full)
    asked = (*small, "--prompt", "a barn", "--height", 32, "--width", 32)
    with pytest.raises(UserError, match=r"lower --batch_size, which is 3 here, or turn guidance off \(--guidance 1\)"):
        run(tmp_path / "out", unitoken, *asked, "--n", 3)
    with pytest.raises(UserError, match=r"for 1 answers at a time: ask for smaller pictures \(--height, --width\)"):
        run(tmp_path / "out", unitoken, *asked, "--guidance", 1, "--overwrite")


def test_a_full_disk_loses_no_answer(tmp_path, unitoken, small):
    """A file-size limit stands in for the full disk. Then there is room again."""
    asked = (*small, "--prompt", "a barn", "--height", 32, "--width", 32, "--guidance", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises((UserError, OSError), match="File too large"):
            run(tmp_path / "out", unitoken, *asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out" / "answers.jsonl").exists() and not list(tmp_path.rglob("*.tmp"))
    assert run(tmp_path / "out", unitoken, *asked) == 0
    assert len(answers(tmp_path / "out")) == 1
