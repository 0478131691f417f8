"""Training a tokenizer: settings, pictures, batches, and a run that may be killed and goes on."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TINY_DUALVITOK
from PIL import Image

from vision_tokenizer.fitting import checkpoint
from vision_tokenizer.fitting.config import DataSettings, RunSettings, read_settings
from vision_tokenizer.fitting.data import BatchOrder, Photographs, Place, batch_order, find_images
from vision_tokenizer.fitting.linear_start import start_linear
from vision_tokenizer.fitting.networks import drawn_vqgan, kmeans
from vision_tokenizer.fitting.perceptual import load_lpips
from vision_tokenizer.fitting.report import HeldOut
from vision_tokenizer.fitting.run import make_updater
from vision_tokenizer.fitting.schedule import learning_rate
from vision_tokenizer.fitting.size_list import main as list_sizes
from vision_tokenizer.fitting.transforms import bucket_size, shorter_side_crop
from vision_tokenizer.fitting.update import Updater
from vision_tokenizer.images.anchors import model_size
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, sizes_of
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.tokenizer.train_dualvitok import main as train
from vistoken.errors import UserError

DATA = json.loads((GOLDEN / "tokenizer_training" / "data.json").read_text())
ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "vision_tokenizer" / "tokenizer" / "train_dualvitok.py"
RELEASED = ("dualvitok_fix256", "dualvitok_anyres_max512")
TRAINING = """
vq_loss = dict(perceptual_weight=0.0, disc_start=3, disc_dim=4)
data_args = dict(resolution=32, augment="random_crop")
global_batch_size = 4
max_steps = 6
lr = 1e-3
mixed_precision = "none"
ema = True
num_workers = 0
log_every = 1
ckpt_every = 2
vit_checkpoint = "random"
fit_codebooks = "covariance"
"""
TINY_VQGAN = """
vq_model = dict(type="ChameleonVQGAN", config=dict(embed_dim=8, n_embed=64, ddconfig=dict(
    ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=1, z_channels=8, resolution=512, attn_resolutions=[])))
"""


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures" / "of_a_class"
    folder.mkdir(parents=True)
    for name in ("sq_astronaut.png", "sq_chelsea.png", "h384_w512.png", "h512_w384.png", "photo.jpg"):
        image = Image.open(GOLDEN / "images" / name).convert("RGB")
        image.resize((image.width // 4, image.height // 4)).save(folder / name)
    return folder.parent


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "tiny.py"
    text = TINY_DUALVITOK.replace("config=dict(", "config=dict(pixel_drop_rate=0.2, pixel_drop_batch_rate=0.5,", 1)
    path.write_text(text + TRAINING)
    return path


def run(config, pictures, out, *more) -> dict:
    train([str(config), f"--data_path={pictures}", f"--results_dir={out}", *more])
    return torch.load(next(iter(sorted(Path(out).rglob("*.pt"))[-1:])), weights_only=True)


def test_sizes_are_the_published_ones():
    for case in DATA["anyres_sizes"]:
        assert list(model_size(*case["hw"], 32 * 32, 512 * 512)) == case["out"]
    for case in DATA["default_sizes"]:
        assert list(model_size(*case["hw"])) == case["out"]


@pytest.mark.parametrize("case", DATA["transforms"], ids=lambda case: f"{case['type']}-{case['image']}")
def test_pixels_are_the_published_ones(case):
    image = Image.open(GOLDEN / "images" / case["image"]).convert("RGB")
    if case["type"].startswith("dualvitok_fix"):
        image = shorter_side_crop(image, case["resolution"])
    if case["flipped"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if case["type"].startswith("dualvitok_anyres"):
        h, w = model_size(image.height, image.width, 32 * 32, case["resolution"] ** 2)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    values = (np.asarray(image, np.float64).transpose(2, 0, 1) / 255 - 0.5) / 0.5
    assert list(values.shape) == case["shape"]
    assert np.allclose(values.mean((1, 2)), case["channel_means"], atol=1e-6)


@pytest.mark.parametrize("case", DATA["schedule"], ids=lambda case: f"{case['style']}-{case['warmup_steps']}")
def test_learning_rates_are_the_published_ones(case):
    total = case["total_steps"]
    settings = RunSettings(
        lr=case["start_lr"],
        lr_decay_style=case["style"],
        warmup=case["warmup_steps"] / total,
        lr_decay_ratio=case["decay_ratio"],
    )
    for update, lr in case["lr_of_update"].items():
        assert learning_rate(int(update), total, settings) == pytest.approx(lr, rel=1e-6)


def test_a_bucket_keeps_the_orientation_and_enlarges_nothing_much():
    for height, width in ((500, 375), (375, 500), (1080, 1920), (40, 60), (2000, 300)):
        h, w = bucket_size(height, width, 32 * 32, 512 * 512)
        assert h % 16 == w % 16 == 0
        assert (h > w) == (height > width)
        assert h * w <= min(512 * 512, max(height * width, 32 * 32)) * 1.01


def test_every_picture_is_in_one_batch_of_one_rank_and_the_next_epoch_mixes_anew():
    sizes = [(32, 32)] * 13 + [(32, 48)] * 7
    ranks = [BatchOrder(sizes, 2, 5, rank, 2) for rank in range(2)]
    epochs = [[order.epoch(epoch) for order in ranks] for epoch in range(2)]
    for first, second in epochs:
        assert [b[0].size for b in first] == [b[0].size for b in second]  # ranks do equal work
        seen = Counter(place.index for batch in first + second for place in batch)
        assert len(seen) == 16 and set(seen.values()) == {1}
        assert all(len({place.size for place in batch}) == 1 for batch in first + second)
    members = [sorted(tuple(sorted(p.index for p in b)) for b in epoch[0]) for epoch in epochs]
    assert members[0] != members[1]
    assert ranks[0].epoch(1) == BatchOrder(sizes, 2, 5, 0, 2).epoch(1)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_read_as_it_is(name):
    settings, unread = read_settings(ROOT / "configs" / "example" / "dualvitok" / f"{name}.py")
    assert settings.global_batch_size == 256 and settings.vq_loss.disc_start == 20000
    assert settings.vq_model["config"]["pixel_drop_rate"] == (0.1 if name.endswith("256") else None)
    assert all(key in ("use_group_image_resolution", "training_with_anyres") for key in unread)


@pytest.mark.parametrize(
    "override, message",
    [
        ("--lrr=1", "unknown key 'lrr'; did you mean lr"),
        ("--vq_loss.disc_type=dinodisc", "'dinodisc' is not supported"),
        ("--vq_loss.semantic_reconstruction=cos_l1", "'cos_l1' is not supported"),
        ("--vq_loss.gen_loss_weight=1", "unknown key 'gen_loss_weight'"),
        ("--lr=fast", "lr: must be float, found 'fast'"),
        ("--ema=1", "ema: must be bool, found 1"),
        ("--weight_decay=0.1", "nothing reads weight_decay"),
        ("--global_batch_size=0", "must be above 0"),
        ("--data_args.resolution=30", "multiple of 16"),
        ("--eval_side=100", "eval_side: must be a multiple of 16"),
        ("--data_args.min_pixels=100", "min_pixels 100 must be at least 16"),
        ("--data_args.max_pixels=512", "max_pixels 512 no less"),
        ("--data_args.crop_share=(0.7,0.2)", "two shares, the lower first"),
        ("--vq_model.config.pixel_drop_ratio=1", "unknown key 'pixel_drop_ratio'; did you mean pixel_drop_rate"),
        ("lr=1", "settings are given as --key=value"),
        ("--linear_start=True", "linear_start: for a ChameleonVQGAN without init_from"),
    ],
)
def test_a_setting_that_would_be_ignored_or_cannot_be_is_refused(override, message, config):
    with pytest.raises(UserError, match=message):
        read_settings(config, [override])


def test_a_config_without_losses_is_refused(dualvitok_config):
    with pytest.raises(UserError, match="defines no `vq_loss`"):
        read_settings(dualvitok_config)


def test_overrides_are_typed(config):
    overrides = ["--lr=2e-3", "--ema=False", "--vq_loss.disc_start=7", "--results_dir=a/b", "--max_steps=None"]
    overrides.append("--resolution=48")
    settings, _ = read_settings(config, overrides)
    assert (settings.lr, settings.ema, settings.vq_loss.disc_start) == (2e-3, False, 7)
    assert (settings.results_dir, settings.max_steps, settings.data_args.resolution) == ("a/b", None, 48)


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
    with pytest.raises(UserError, match=r"(?s)0000007\.pt: no checkpoint of this command.*use --init_from="):
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


def test_pictures_come_from_folders_size_lists_and_data_sets(pictures, tmp_path):
    assert len(find_images(DataSettings(data_path=str(pictures)))) == 5
    rows = [{"image": "of_a_class/photo.jpg", "width": 60, "height": 40}]
    (tmp_path / "sizes.json").write_text(json.dumps(rows))
    listed = find_images(DataSettings(data_path=str(pictures), size_list=str(tmp_path / "sizes.json")))
    assert listed == [(pictures / "of_a_class" / "photo.jpg", (40, 60))]
    for wrong, told in ((rows[0] | {"width": 0}, "entry 0 .* no area"), ({"image": "photo.jpg"}, "fitting.size_list")):
        (tmp_path / "sizes.json").write_text(json.dumps([wrong]))
        with pytest.raises(UserError, match=told):
            find_images(DataSettings(data_path=str(pictures), size_list=str(tmp_path / "sizes.json")))
    examples = ROOT / "configs/data_configs/train_data_examples/examples_meta_data_config.json"
    assert len(find_images(DataSettings(data_config=str(examples)))) >= 10


def test_a_size_list_is_written_and_leads_to_the_same_batches(pictures, tmp_path, capsys):
    shutil.copy(GOLDEN / "images" / "broken.jpg", pictures / "broken.jpg")
    (pictures / "text.png").write_text("no picture")
    listed = str(tmp_path / "sizes.json")
    assert list_sizes(["--data_path", str(pictures), "--out", listed]) == 1
    told = capsys.readouterr()
    assert "left out: image unreadable: " in told.err and "text.png" in told.err
    found = find_images(DataSettings(data_path=str(pictures), size_list=listed))
    assert len(found) == told.out.count("6 pictures; 1 could not be read") * 6  # a damaged picture has a header
    anyres = DataSettings(augment="dualvitok_anyres_resolution_train", min_pixels=1024)
    from_headers = [(path, None) for path, _ in found]
    assert batch_order(found, anyres, 1, 0).sizes == batch_order(from_headers, anyres, 1, 0).sizes
    for name in ("empty", "unreadable"):
        (tmp_path / name).mkdir()
    shutil.copy(pictures / "text.png", tmp_path / "unreadable")
    for name in ("empty", "unreadable"):
        with pytest.raises(UserError, match="no images"):
            list_sizes(["--data_path", str(tmp_path / name), "--out", listed])


def test_no_pictures_or_too_few_are_told(config, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        run(config, tmp_path / "empty", tmp_path / "run")
    with pytest.raises(UserError, match="no such folder"):
        run(config, tmp_path / "absent", tmp_path / "run")
    with pytest.raises(UserError, match="5 pictures, 5 of one size at most, fill no batch of 8"):
        run(config, pictures, tmp_path / "run", "--global_batch_size=8")
    with pytest.raises(UserError, match="no picture in it that can be read; --eval_path"):
        HeldOut(tmp_path / "empty", 32)
    files = find_images(DataSettings(data_path=str(pictures)))
    with pytest.raises(UserError, match="fill no batch"):
        batch_order(files, DataSettings(augment="dualvitok_anyres_resolution_train"), 5, 0)


@pytest.mark.slow
def test_an_unreadable_picture_is_replaced_and_too_many_stop_the_run(config, pictures, tmp_path, capsys):
    folder = pictures / "of_a_class"
    shutil.copy(GOLDEN / "images" / "broken.jpg", folder / "a.jpg")
    data = Photographs(sorted(folder.iterdir()), DataSettings(augment="random_crop"))
    pixels, name, problem = data[Place(0, (32, 32), "seed")]
    assert pixels.shape == (3, 32, 32) and "a.jpg" not in name and "a.jpg" in problem
    state = run(config, pictures, tmp_path / "run", "--data_args.max_failed=0.5")
    assert state["failed"] > 0 and "a.jpg" in capsys.readouterr().err
    for other in "bcdefgh":
        shutil.copy(folder / "a.jpg", folder / f"{other}.jpg")
    with pytest.raises(UserError, match="could not be read, more than"):
        run(config, pictures, tmp_path / "many", "--max_steps=20")


def test_tiny_pictures_are_enlarged(tmp_path):
    Image.new("RGB", (5, 9), "red").save(tmp_path / "tiny.png")
    data = Photographs([tmp_path / "tiny.png"], DataSettings(augment="random_crop"))
    pixels, _, _ = data[Place(0, (32, 32), "seed")]
    assert pixels.shape == (3, 32, 32)


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
