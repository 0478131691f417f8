"""The report of token files: conversations in order, images in place, and how a browser sees it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from browser import browse, facts, needs_browser, pairs, parse, screenshot, section_names, shown, text_of
from codebook_job import dataset, run_here, write_config
from lm_small import extended_tokenizer, golden_lines, write_lines
from PIL import Image

from pre_tokenize import concat_record, pre_tokenize
from pre_tokenize.preview_tokens import main
from vistoken.errors import UserError

SECTIONS = ["conversations", "resolutions", "codebook-image", "lengths"]


def make_tokens(folder: Path, *more) -> None:
    command = ["--out_dir", folder / "out", *more, "--max_failed", 1]
    assert pre_tokenize.main([str(part) for part in command]) == 0
    record = folder / "out" / "record.json"
    concat_record.main(["--sub_record_dir", str(folder / "out"), "--save_path", str(record)])


def preview(folder: Path, tokenizer: Path, *more) -> str:
    command = ["--record", folder / "out" / "record.json", "--tokenizer_dir", tokenizer, "--device", "cpu", *more]
    assert main([str(part) for part in (*command, "--out_dir", folder / "report")]) == 0
    return (folder / "report" / "report.html").read_text()


@pytest.fixture(scope="module")
def previewed(tmp_path_factory, golden, chameleon_folder) -> tuple[Path, str]:
    """(folder, report) of the golden conversations."""
    base = tmp_path_factory.mktemp("previewed")
    data = golden / "chameleon_small" / "conversations.json"
    more = ("--target_size", 64, "--device", "cpu", "--image_dir", golden / "images", "--crop", "variable")
    make_tokens(base, "--in_filename", data, "--tokenizer_dir", chameleon_folder, *more)
    return base, preview(base, chameleon_folder, "--note", "Untrained <weights>.")


def conversations(document: str) -> dict[str, list]:
    """Title -> turns."""
    articles = [article for article in parse(document).iter("article") if article.get("class") == "talk"]
    return {
        article.findtext("h3"): [turn for turn in article.iter("div") if turn.get("class") == "said"]
        for article in articles
    }


def test_the_report_is_one_file_with_all_its_parts(previewed):
    html = previewed[1]
    assert section_names(html) == SECTIONS
    assert text_of(parse(html).find(".//p[@id='note']")) == "Untrained <weights>."
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(|<script', html)
    assert len(conversations(html)) == 8


def test_a_conversation_is_rendered_in_order_with_its_learned_part(previewed):
    """The document's own example with four images."""
    turns = next(turns for title, turns in conversations(previewed[1]).items() if title.startswith("item 0 "))
    said = [["IMAGE" if part.tag == "figure" else text_of(part) for part in turn] for turn in turns]
    assert said == [
        ["start", "Hi, please convert this depth image", "IMAGE", "to a color image", "end of turn"],
        ["IMAGE", "end of turn"],
        ["Could you change its style to that of this image?", "IMAGE", "end of turn"],
        ["Sure, here's the image.", "IMAGE", "end of turn"],
    ]
    for turn, learned in zip(turns, (False, True, False, True), strict=True):
        assert {"learned" in part.get("class", "").split() for part in turn} == {learned}
        [pair] = pairs(turn)
        assert [what.split(":")[0] for what in shown(pair)] == ["original", "decoded"] and "PSNR" in text_of(pair)


def test_lengths_are_those_of_the_record(previewed):
    lengths = [entry["len"] for entry in json.loads((previewed[0] / "out" / "record.json").read_text())]
    found = facts(parse(previewed[1]))
    assert found["tokens"] == f"{sum(lengths):,}" and found["longest"] == f"{max(lengths):,}"


@pytest.mark.slow
@needs_browser
def test_a_browser_finds_every_part_and_shows_both_themes(previewed, tmp_path):
    page = previewed[0] / "report" / "report.html"
    document = browse(page, tmp_path / "profile")
    assert section_names(document) == SECTIONS and len(conversations(document)) == 8
    papers = []
    for dark in (False, True):
        shot = screenshot(page, tmp_path / f"profile{dark}", tmp_path / "shot.png", dark=dark, width=500)
        with Image.open(shot) as image:
            papers.append(image.convert("L").getpixel((2, 2)))
    assert papers[0] > 200 and papers[1] < 60


@pytest.mark.slow
def test_sequences_of_dualvitok_codes(tmp_path, golden, dualvitok_config, dualvitok_checkpoint):
    tokenizer = extended_tokenizer(tmp_path)
    source = write_lines(tmp_path / "data.jsonl", golden_lines("editing/fixed_256/0000"))
    make_tokens(tmp_path, "--image_tokenizer", "dualvitok", "--in_filename", source, "--tokenizer_dir", tokenizer)
    html = preview(tmp_path, tokenizer)
    assert section_names(html) == ["conversations", "resolutions", "codebook-semantic", "codebook-pixel", "lengths"]
    assert not pairs(parse(html)) and "256 x 256" in text_of(parse(html))  # no decoder was named
    model = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    html = preview(tmp_path, tokenizer, *model, "--image_dir", golden / "images", "--sample", 1)
    asked, answered = pairs(parse(html))
    assert (asked.get("class"), answered.get("class")) == ("pair", "pair learned")
    assert [what.split(":")[0] for pair in (asked, answered) for what in shown(pair)] == ["original", "decoded"] * 2
    assert "Please edit the image according to the instruction" in html


def test_originals_are_found_where_codebook_inference_found_them(tmp_path, golden, tiny_dualvitok, capsys):
    editing = dataset(tmp_path / "editing", golden / "images", golden / "codebook" / "editing" / "annotations")
    config = write_config(tmp_path / "meta.json", editing=editing)
    run_here(*tiny_dualvitok, config, "--resolution_type", "fixed", "--resolution", "64")
    tokenizer = extended_tokenizer(tmp_path, (256, 512))
    codes = tmp_path / "editing/jsonl_after_tokenizer/dualvitok/fixed_64/0000.jsonl"
    make_tokens(tmp_path, "--image_tokenizer", "dualvitok", "--in_filename", codes, "--tokenizer_dir", tokenizer)
    model = ("--model_config", tiny_dualvitok[0], "--tokenizer_checkpoint", tiny_dualvitok[1])
    found = pairs(parse(preview(tmp_path, tokenizer, *model)))
    assert found and all(len(shown(pair)) == 2 for pair in found)
    assert "name their folder" not in capsys.readouterr().err
    found = pairs(parse(preview(tmp_path, tokenizer, *model, "--image_dir", tmp_path)))
    assert found and all(len(shown(pair)) == 1 for pair in found)
    assert "none of the originals was found: name their folder with --image_dir" in capsys.readouterr().err


def test_another_image_tokenizer_is_refused(previewed, chameleon_folder, tmp_path):
    import torch

    other = Path(shutil.copytree(chameleon_folder, tmp_path / "other"))
    state = torch.load(other / "vqgan.ckpt", weights_only=True)
    state["state_dict"]["quant_conv.bias"] += 1
    torch.save(state, other / "vqgan.ckpt")
    with pytest.raises(UserError, match="Name the one they were made with"):
        preview(previewed[0], other)
