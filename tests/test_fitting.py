"""Training a tokenizer: what a run writes, how it goes on when it was killed, where it starts and when it stops."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting_small import COMMAND, ROOT, TRAINING, run, write_config, write_pictures
from PIL import Image

from vision_tokenizer.fitting import checkpoint
from vision_tokenizer.fitting.config import read_settings
from vision_tokenizer.fitting.linear_start import start_linear
from vision_tokenizer.fitting.networks import drawn_vqgan, kmeans
from vision_tokenizer.fitting.perceptual import load_lpips
from vision_tokenizer.fitting.run import make_updater
from vision_tokenizer.fitting.transforms import shorter_side_crop
from vision_tokenizer.fitting.update import Updater
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, sizes_of
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.tokenizer.train_dualvitok import main as train
from vistoken.errors import UserError

TINY_VQGAN = """
vq_model = dict(type="ChameleonVQGAN", config=dict(embed_dim=8, n_embed=64, ddconfig=dict(
    ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=1, z_channels=8, resolution=512, attn_resolutions=[])))
"""


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path / "tiny.py")


@pytest.mark.slow
def test_a_run_writes_what_it_says_and_its_weights_load(config, pictures, tmp_path):
    state = run(
        config, pictures, tmp_path / "run", f"--eval_path={pictures}", "--eval_side=32", "--fit_codebooks=kmeans"
    )
    folder = tmp_path / "run" / "DualViTok"
    assert [path.name for path in checkpoint.checkpoints(folder / "checkpoints")] == ["0000004.pt", "0000006.pt"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rec_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_psnr" in row] == [2, 4, 6]
    assert rows[0]["discriminator_adv_loss"] == 0 < rows[-2]["discriminator_adv_loss"]
    assert rows[0]["codes_in_use_pixel"] > 1
    assert (folder / "held_out.png").stat().st_size and (folder / "loss.png").stat().st_size
    assert set(state["ema"]) == set(state["model"])
    for use_ema in (False, True):
        path = folder / "checkpoints" / "0000006.pt"
        load_dualvitok(config, path, device="cpu", decoder=True, use_ema=use_ema)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def compare_runs(one: Path, other: Path) -> None:
    """Weights, optimizers, discriminator, running means and the curve, to the last bit."""
    states = [torch.load(folder / "DualViTok/checkpoints/0000006.pt", weights_only=True) for folder in (one, other)]
    for key in set(states[0]) - {"args"}:
        assert same(states[0][key], states[1][key]), key
    curves = []
    for folder in (one, other):
        rows = map(json.loads, (folder / "DualViTok/metrics.jsonl").read_text().splitlines())
        curves.append([{k: v for k, v in row.items() if k != "images_per_second"} for row in rows])
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(config, pictures, tmp_path, monkeypatch):
    run(config, pictures, tmp_path / "whole")
    real = checkpoint.save

    def die_after_4(folder, fit, settings, extra):
        path = real(folder, fit, settings, extra)
        if fit.step == 4:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save", die_after_4)
    with pytest.raises(KeyboardInterrupt):
        run(config, pictures, tmp_path / "cut")
    monkeypatch.setattr(checkpoint, "save", real)
    run(config, pictures, tmp_path / "cut")
    compare_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_killed_process_goes_on_as_if_it_had_not_been(config, pictures, tmp_path):
    run(config, pictures, tmp_path / "whole")
    arguments = [str(config), f"--data_path={pictures}", f"--results_dir={tmp_path / 'cut'}"]
    process = subprocess.Popen([sys.executable, str(COMMAND), *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)})
    first = tmp_path / "cut" / "DualViTok" / "checkpoints" / "0000002.pt"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(config, pictures, tmp_path / "cut")
    compare_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(config, pictures, tmp_path):
    """Without a discriminator (its statistics are those of a rank) and without code dropping."""
    plain = ["--vq_loss.disc_weight=0", "--vq_model.config.pixel_drop_rate=0", "--max_steps=2", "--fit_codebooks=none"]
    arguments = [str(config), f"--data_path={pictures}", f"--results_dir={tmp_path / 'two'}", *plain]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631", str(COMMAND)]
    subprocess.run([*launch, *arguments], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    state = torch.load(tmp_path / "two/DualViTok/checkpoints/0000002.pt", weights_only=True)
    wanted = run(config, pictures, tmp_path / "one", *plain)
    for name, tensor in wanted["model"].items():
        assert torch.allclose(state["model"][name], tensor, atol=2e-3), name  # Adam's first steps are signs


@pytest.mark.slow
def test_other_settings_on_resume_are_named(config, pictures, tmp_path):
    run(config, pictures, tmp_path / "run", "--max_steps=2")
    with pytest.raises(UserError, match=r"other settings:\s+lr: 0\.001 there, 0\.5 now"):
        run(config, pictures, tmp_path / "run", "--max_steps=2", "--lr=0.5")


def test_another_trainers_checkpoint_is_no_place_to_resume_at(config, pictures, tmp_path):
    torch.save({"model": {}, "steps": 7, "args": argparse.Namespace(lr=1)}, tmp_path / "0000007.pt")
    with pytest.raises(UserError, match=r"(?s)0000007\.pt: damaged, or no checkpoint of .*Remove it.*use --init_from="):
        run(config, pictures, tmp_path / "run", f"--vq_ckpt={tmp_path / '0000007.pt'}")


@pytest.mark.slow
def test_fine_tuning_starts_from_a_checkpoint_and_refuses_another_size(
    config, pictures, tmp_path, dualvitok_checkpoint
):
    before = run(config, pictures, tmp_path / "first", "--max_steps=2")
    path = tmp_path / "first/DualViTok/checkpoints/0000002.pt"
    after = run(config, pictures, tmp_path / "tuned", "--max_steps=2", f"--init_from={path}", "--lr=1e-12")
    name = "pixel_decoder.conv_out.weight"
    assert torch.allclose(before["model"][name], after["model"][name], atol=1e-9)
    with pytest.raises(UserError, match="does not fit DualViTok"):
        run(config, pictures, tmp_path / "wrong", f"--init_from={dualvitok_checkpoint}")


@pytest.mark.slow
def test_a_chameleon_vqgan_trains_with_the_same_command(pictures, tmp_path):
    config = tmp_path / "vqgan.py"
    config.write_text(TINY_VQGAN + TRAINING.replace("ema = True", "ema = False"))
    train([str(config), f"--data_path={pictures}", f"--results_dir={tmp_path / 'run'}"])
    rows = (tmp_path / "run/ChameleonVQGAN/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["rec_loss"] for row in rows]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(config, pictures, tmp_path):
    with pytest.raises(UserError, match=r"step \d: .*rec_loss.* of the batch .*\.png.* is not finite"):
        run(config, pictures, tmp_path / "run", "--lr=1e30", "--max_grad_norm=0")
    newest = checkpoint.checkpoints(tmp_path / "run" / "DualViTok" / "checkpoints")
    assert len(newest) <= 1


def tiny_updater(config, precision: str) -> Updater:
    settings, _ = read_settings(config, [f"--mixed_precision={precision}", "--vq_loss.disc_start=1", "--ema=False"])
    return make_updater(settings, torch.device("cpu"))


def scale_gradients(fit: Updater, scale: float) -> None:
    for side in fit.sides:
        side.scaler.load_state_dict(side.scaler.state_dict() | {"scale": scale})


def test_no_loss_that_is_not_finite_changes_a_weight(config):
    fit = tiny_updater(config, "none")
    before = {name: tensor.clone() for name, tensor in fit.network.state_dict().items()}
    pixels = torch.rand(2, 3, 32, 32)
    pixels[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"step 1: .*rec_loss.* of the batch a\.png, b\.png is not finite"):
        fit.update([pixels], 1e-3, names=["a.png", "b.png"])
    assert fit.step == 0 and same(before, dict(fit.network.state_dict()))


@pytest.mark.slow
def test_fp16_scales_gradients_and_leaves_out_an_update_that_overflows(config, capsys):
    """On a CPU, too, where torch disables a scaler that was made for a GPU."""
    fit, exact = tiny_updater(config, "fp16"), tiny_updater(config, "none")
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    terms = []
    scale_gradients(fit, 2.0**10)
    for updater in (fit, exact):
        torch.manual_seed(1)
        terms.append(updater.update([pixels], 1e-3)[0])
    for name in ("rec_loss", "vq_loss", "grad_norm", "discriminator_grad_norm"):
        assert terms[0][name] == pytest.approx(terms[1][name].item(), rel=0.05), name
    scale_gradients(fit, 2.0**120)
    before = {name: tensor.clone() for name, tensor in fit.network.state_dict().items()}
    fit.update([pixels], 1e-3)
    assert same(before, dict(fit.network.state_dict())) and fit.sides[0].scaler.get_scale() == 2.0**119
    assert "step 2 left out: a gradient overflowed fp16 (grad_norm" in capsys.readouterr().err
    with pytest.raises(UserError, match="whatever the scale"):
        scale_gradients(fit, 0.5)
        fit.sides[0].tell_overflow(3, "grad_norm")


def test_lpips_needs_its_two_files_and_checks_them(config, pictures, tmp_path):
    with pytest.raises(UserError, match=r"(?s)LPIPS needs two files.*vgg16-397923af.*perceptual_weight=0"):
        run(config, pictures, tmp_path / "run", "--vq_loss.perceptual_weight=1.0")
    (tmp_path / "vgg.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match="its sha256 is"):
        load_lpips(tmp_path / "vgg.pth", tmp_path / "vgg.pth")


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_checkpoint(config, pictures, tmp_path, monkeypatch):
    run(config, pictures, tmp_path / "run", "--max_steps=2")
    folder = tmp_path / "run" / "DualViTok" / "checkpoints"

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .No space left"):
        run(config, pictures, tmp_path / "other")
    assert [path.name for path in folder.iterdir()] == ["0000002.pt"]
    assert list((tmp_path / "other").rglob("checkpoints/*")) == []


def small_vqgan(**conv) -> ChameleonVQGAN:
    conv = {"ch": 16, "ch_mult": [1, 1, 2, 2, 2], "num_res_blocks": 1, "num_groups": 4, "z_channels": 8} | conv
    params = {"embed_dim": 8, "n_embed": 64, "ddconfig": conv | {"resolution": 512, "attn_resolutions": []}}
    torch.manual_seed(0)
    return drawn_vqgan(ChameleonVQGAN(sizes_of(params, "small"), decoder=True))


@torch.no_grad()
def test_a_linear_start_shows_pictures_before_the_first_update(pictures):
    files = sorted(pictures.rglob("*.*"))
    squares = [shorter_side_crop(Image.open(file).convert("RGB"), 96) for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares]) / 127.5 - 1
    model = small_vqgan()
    errors = []
    for start in (lambda: None, lambda: start_linear(model, pixels.split(2))):
        start()
        features = model.quant_conv(model.encoder(pixels))
        errors.append((model.decoder(model.post_quant_conv(features)) - pixels).square().mean().item())
    cells = pixels.unflatten(2, (6, 16)).unflatten(4, (6, 16))
    plain = (cells - cells.mean((3, 5), keepdim=True)).square().mean().item()  # a cell's mean colour, 3 numbers of 8
    assert errors[1] < 0.75 * plain < errors[0] / 3


def test_a_linear_start_says_what_is_too_narrow(pictures):
    pixels = torch.rand(2, 3, 64, 64)
    with pytest.raises(UserError, match="embed_dim 8 is more than z_channels"):
        start_linear(small_vqgan(z_channels=4), [pixels])
    with pytest.raises(UserError, match="linear_start: 12 components do not fit 8 channels"):
        start_linear(small_vqgan(ch=8, ch_mult=[2, 2, 1, 1, 2]), [pixels])
    with pytest.raises(UserError, match="need 4 channels in each of 16 groups, ch \\* ch_mult gives 2"):
        start_linear(small_vqgan(num_groups=16), [pixels])


@pytest.mark.slow
def test_a_frozen_encoder_keeps_every_code(config, pictures, tmp_path):
    before = run(config, pictures, tmp_path / "first", "--max_steps=2")["model"]
    start = f"--init_from={tmp_path / 'first/DualViTok/checkpoints/0000002.pt'}"
    options = ("--max_steps=2", "--fit_codebooks=none", "--freeze_encoder=True", start)
    after = run(config, pictures, tmp_path / "tuned", *options)["model"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"pixel_decoder", "pixel_post_quant_conv", "semantic_decoder"}


def test_kmeans_uses_every_code():
    torch.manual_seed(0)
    features = torch.randn(400, 4)
    codes = kmeans(features, 64)
    nearest = torch.cdist(features, codes).argmin(1)
    assert len(nearest.unique()) > 60
    random_error = torch.cdist(features, features[:64]).min(1).values.square().mean()
    assert torch.cdist(features, codes).min(1).values.square().mean() < random_error


@pytest.mark.slow
def test_codebooks_are_fitted_before_the_first_step(config, pictures, tmp_path):
    errors = []
    for how in ("none", "covariance", "kmeans"):
        out = tmp_path / how
        run(config, pictures, out, f"--fit_codebooks={how}", "--max_steps=1")
        row = json.loads((out / "DualViTok" / "metrics.jsonl").read_text().splitlines()[0])
        errors.append(row["vq_loss"])
    assert errors[0] > errors[1] > errors[2]
