"""What a tokenizer is trained on: settings, pictures, their sizes and batches, the published learning rates."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from fitting_small import ROOT, run, write_config, write_pictures
from PIL import Image

from vision_tokenizer.fitting.config import DataSettings, RunSettings, read_settings
from vision_tokenizer.fitting.data import BatchOrder, Photographs, Place, batch_order, find_images
from vision_tokenizer.fitting.report import HeldOut
from vision_tokenizer.fitting.run import learning_rate
from vision_tokenizer.fitting.size_list import main as list_sizes
from vision_tokenizer.fitting.transforms import bucket_size, shorter_side_crop
from vision_tokenizer.images.anchors import model_size
from vistoken.errors import UserError

DATA = json.loads((GOLDEN / "tokenizer_training" / "data.json").read_text())
RELEASED = ("dualvitok_fix256", "dualvitok_anyres_max512")


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path / "tiny.py")


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
