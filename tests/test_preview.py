"""The report of stored codes: its parts, its numbers, and how a browser sees it."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from browser import browse, facts, needs_browser, pairs, parse, screenshot, section_names, shown, text_of
from codebook_job import dataset, run_here, write_config
from PIL import Image, ImageFont

from vision_tokenizer.review.contact_sheet import font_with, missing
from vision_tokenizer.review.html import PLOT_WIDTH, histogram
from vision_tokenizer.review.quality import CodeUse, psnr, ssim
from vision_tokenizer.tokenizer.preview_codes import main
from vistoken.errors import UserError

SECTIONS = ["gallery", "resolutions", "codebook-semantic", "codebook-pixel", "lengths"]


@pytest.fixture(scope="module")
def previewed(tmp_path_factory, golden, tiny_dualvitok):
    """(folder of the report, arguments that made it)."""
    base = tmp_path_factory.mktemp("previewed")
    editing = dataset(base / "editing", golden / "images", golden / "codebook" / "editing" / "annotations")
    config = write_config(base / "meta.json", editing=editing)
    run_here(*tiny_dualvitok, config, "--max_failed", "1")
    model = ["--model_config", str(tiny_dualvitok[0]), "--tokenizer_checkpoint", str(tiny_dualvitok[1])]
    arguments = ["--data_config", str(config), *model, "--device", "cpu", "--sample", "2"]
    more = ["--out_dir", str(base / "report"), "--note", "Untrained <weights>."]
    assert main([*arguments, *more]) == 0
    return base / "report", arguments


def report(folder) -> str:
    return (folder / "report.html").read_text()


def test_the_report_is_one_file_with_all_its_parts(previewed):
    html = report(previewed[0])
    page = parse(html)
    assert section_names(html) == SECTIONS
    gallery = pairs(page)
    assert len(gallery) == 2
    for pair in gallery:
        name = pair.findtext(".//b")
        assert shown(pair) == [f"original: {name}", f"decoded: {name}"]
    assert text_of(page.find(".//p[@id='note']")) == "Untrained <weights>."
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(|<script', html)  # nothing comes from elsewhere
    assert facts(page)["items"] == "3" and facts(page)["images"] == "6"


def test_numbers_are_those_of_the_lines(previewed):
    page = parse(report(previewed[0]))
    items = [
        json.loads(line)
        for path in sorted(previewed[0].parent.rglob("fixed_anchors/000?.jsonl"))
        for line in path.read_text().splitlines()
    ]
    pixel = [code for item in items for image in item["image_embed_inds"] for row in image[1] for code in row]
    counts = np.bincount(pixel, minlength=512)
    section = page.find(".//section[@id='codebook-pixel']")
    assert facts(section)["distinct codes of 512"] == f"{np.count_nonzero(counts):,}"
    shares = counts[counts > 0] / counts.sum()
    assert facts(section)["perplexity"] == f"{math.exp(-(shares * np.log(shares)).sum()):,.0f}"
    assert f"code {counts.argmax()}" in text_of(section)
    square = sum(anchor == [512, 512] for item in items for anchor in item["matched_ratios"])
    assert f"512 x 512 {square} " in text_of(page.find(".//section[@id='resolutions']"))


def test_a_picture_for_terminals(previewed):
    with Image.open(previewed[0] / "contact_sheet.png") as sheet:
        assert sheet.width > 900 and len(sheet.convert("RGB").getcolors(1 << 24)) > 1000


def test_characters_that_no_font_has_are_told_from_those_it_has():
    font = ImageFont.load_default(13)
    assert not missing(font, "cat 12.jpg") and missing(font, "\U0010fffe") and missing(font, "猫")
    assert font_with("cat 12.jpg") is None  # Pillow's own
    found = font_with("猫")
    assert found is None or not missing(ImageFont.truetype(found, 13), "猫")


@pytest.mark.slow
@needs_browser
def test_a_browser_finds_every_part_and_shows_both_themes(previewed, tmp_path):
    page = previewed[0] / "report.html"
    document = browse(page, tmp_path / "profile")
    assert section_names(document) == SECTIONS
    papers = []
    for dark in (False, True):
        shot = screenshot(page, tmp_path / f"profile{dark}", tmp_path / "shot.png", dark=dark, width=500)
        with Image.open(shot) as image:
            papers.append(image.convert("L").getpixel((2, 2)))
            assert len(image.convert("RGB").getcolors(1 << 24)) > 1000  # the images are there
    assert papers[0] > 200 and papers[1] < 60


def test_originals_that_are_gone_are_said_to_be(previewed, tmp_path, golden):
    base, arguments = previewed[0].parent, previewed[1]
    config = json.loads((base / "meta.json").read_text())
    moved = {name: {**entry, "image_dir": str(tmp_path)} for name, entry in config.items()}
    (base / "moved.json").write_text(json.dumps(moved))
    arguments = [
        str(base / "moved.json") if argument == str(base / "meta.json") else argument for argument in arguments
    ]
    assert main([*arguments, "--out_dir", str(tmp_path / "report")]) == 0
    gone = pairs(parse(report(tmp_path / "report")))
    assert [shown(pair) for pair in gone] == [[f"decoded: {pair.findtext('.//b')}"] for pair in gone]
    assert len(gone) == 2 and all("original not found" in text_of(pair) for pair in gone)


@pytest.mark.slow
def test_an_original_of_another_shape_is_shown_at_the_stored_anchor(previewed, tmp_path, golden):
    base, arguments = previewed[0].parent, previewed[1]
    images = shutil.copytree(golden / "images", tmp_path / "images")
    for path in images.iterdir():
        shutil.copy(golden / "images" / "h384_w768.png", path)
    config = json.loads((base / "meta.json").read_text())
    changed = write_config(
        tmp_path / "meta.json", **{name: {**entry, "image_dir": str(images)} for name, entry in config.items()}
    )
    assert main(["--data_config", str(changed), *arguments[2:], "--out_dir", str(tmp_path / "report")]) == 0
    assert "original not found" not in report(tmp_path / "report")


def test_another_tokenizer_is_refused(previewed, dualvitok_config, dualvitok_checkpoint, tmp_path):
    data = previewed[1][:2]
    model = ["--model_config", str(dualvitok_config), "--tokenizer_checkpoint", str(dualvitok_checkpoint)]
    with pytest.raises(UserError, match="its decoder would show something else"):
        main([*data, *model, "--device", "cpu", "--out_dir", str(tmp_path / "report")])


def test_psnr_and_ssim():
    dark, light = (torch.full((3, 16, 24), value, dtype=torch.uint8) for value in (100, 110))
    assert psnr(dark, dark) == math.inf and ssim(dark, dark) == pytest.approx(1)
    assert psnr(dark, light) == pytest.approx(20 * math.log10(255 / 10))
    c1 = 2.55**2  # without structure only the means count
    assert ssim(dark, light) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), abs=1e-5)
    noise = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    assert ssim(noise, 255 - noise) == pytest.approx(-0.97, abs=0.03)


def test_code_use():
    use = CodeUse(8)
    use.add(np.array([[0, 0, 3], [3, 5, 5]]))
    assert (use.total, use.distinct, use.dead_share) == (6, 3, 5 / 8)
    assert use.perplexity == pytest.approx(3)
    assert use.most_used(2) == [(0, 2), (3, 2)]


def test_histograms_put_many_lengths_into_bins():
    columns = histogram(dict.fromkeys(range(1, 1001), 1))
    assert len(columns) == 40 and {column.count for column in columns} == {25}
    assert (columns[0].low, columns[0].high, columns[-1].low, columns[-1].high) == (1, 25, 976, 1000)
    assert all(column.x >= 0 and column.x + column.width <= PLOT_WIDTH for column in columns)
    [alone] = histogram({7: 3})
    assert (alone.low, alone.high, alone.count) == (7, 7, 3)
