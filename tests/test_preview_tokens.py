"""The report of token files: conversations in order, images in place, and how a browser sees it."""

import re
import shutil
from pathlib import Path

import pytest
from browser import browse, needs_browser, screenshot, section_names
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


def test_the_report_is_one_file_with_all_its_parts(previewed):
    html = previewed[1]
    assert section_names(html) == SECTIONS and "Untrained &lt;weights&gt;." in html
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(|<script', html)
    assert html.count('<article class="talk">') == 8


def test_a_conversation_is_rendered_in_order_with_its_learned_part(previewed):
    """The document's own example with four images."""
    html = previewed[1]
    talk = html[html.index("<h3>item 0 ") : html.index("<h3>item 1 ")]
    turns = talk.split('<div class="said">')[1:]
    assert len(turns) == 4
    texts = [re.sub(r"<[^>]+>", "", re.sub(r"<figure.*?</figure>", "IMAGE", turn)).strip() for turn in turns]
    assert texts == [
        "startHi, please convert this depth image IMAGE to a color imageend of turn",
        "IMAGEend of turn",
        "Could you change its style to that of this image? IMAGEend of turn",
        "Sure, here&#x27;s the image. IMAGEend of turn",
    ]
    for turn, learned in zip(turns, (False, True, False, True), strict=True):
        assert ('class="pair learned"' in turn) == ('class="mark learned"' in turn) == learned
        assert turn.count("<img ") == 2 and "PSNR" in turn  # the original and what is decoded


def test_lengths_are_those_of_the_record(previewed):
    entries = [line for line in (previewed[0] / "out" / "record.json").read_text().splitlines() if '"len"' in line]
    lengths = [int(re.search(r'"len":\s*(\d+)', line).group(1)) for line in entries]
    html = previewed[1]
    assert f"{sum(lengths):,}</b><span>tokens" in html and f"{max(lengths):,}</b><span>longest" in html


@needs_browser
def test_a_browser_finds_every_part_and_shows_both_themes(previewed, tmp_path):
    page = previewed[0] / "report" / "report.html"
    document = browse(page, tmp_path / "profile")
    assert section_names(document) == SECTIONS and document.count('<article class="talk">') == 8
    papers = []
    for dark in (False, True):
        shot = screenshot(page, tmp_path / f"profile{dark}", tmp_path / "shot.png", dark=dark, width=500)
        with Image.open(shot) as image:
            papers.append(image.convert("L").getpixel((2, 2)))
    assert papers[0] > 200 and papers[1] < 60


def test_sequences_of_dualvitok_codes(tmp_path, golden, dualvitok_config, dualvitok_checkpoint):
    tokenizer = extended_tokenizer(tmp_path)
    source = write_lines(tmp_path / "data.jsonl", golden_lines("editing/fixed_256/0000"))
    make_tokens(tmp_path, "--image_tokenizer", "dualvitok", "--in_filename", source, "--tokenizer_dir", tokenizer)
    html = preview(tmp_path, tokenizer)
    assert section_names(html) == ["conversations", "resolutions", "codebook-semantic", "codebook-pixel", "lengths"]
    assert "<img " not in html and "256 x 256</span>" in html  # no decoder was named
    model = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    html = preview(tmp_path, tokenizer, *model, "--image_dir", golden / "images", "--sample", 1)
    assert html.count("<img ") == 4 and html.count('class="pair learned"') == 1
    assert "Please edit the image according to the instruction" in html


def test_another_image_tokenizer_is_refused(previewed, chameleon_folder, tmp_path):
    import torch

    other = Path(shutil.copytree(chameleon_folder, tmp_path / "other"))
    state = torch.load(other / "vqgan.ckpt", weights_only=True)
    state["state_dict"]["quant_conv.bias"] += 1
    torch.save(state, other / "vqgan.ckpt")
    with pytest.raises(UserError, match="Name the one they were made with"):
        preview(previewed[0], other)
