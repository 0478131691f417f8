"""Training a DualViTok against the reference's numbers, in fp64, through the update that the command makes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, synthetic_state, synthetic_tensor
from PIL import Image

from vision_tokenizer.fitting.config import LossSettings, RunSettings
from vision_tokenizer.fitting.discriminator import PatchDiscriminator
from vision_tokenizer.fitting.forward import CodeDropping, QuantizerOptions, TrainableDualViTok
from vision_tokenizer.fitting.perceptual import build_lpips
from vision_tokenizer.fitting.update import Updater
from vision_tokenizer.models.dualvitok.config import read_config
from vision_tokenizer.models.dualvitok.model import DualViTok

FOLDER = GOLDEN / "tokenizer_training"
CASES = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())}
KEYS = json.loads((FOLDER / "keys.json").read_text())


@pytest.fixture(autouse=True)
def in_fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def crops(boxes):
    batch = []
    for name, top, left, height, width in boxes:
        image = Image.open(GOLDEN / "images" / name).convert("RGB").crop((left, top, left + width, top + height))
        values = torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy())
        batch.append((values / 255 - 0.5) / 0.5)
    return torch.stack(batch).double()


def stand_in(name, shape):
    return torch.from_numpy(synthetic_tensor(name, tuple(shape))).double()


def lpips():
    vgg = {
        name: stand_in(name, shape) * (2**0.5 if name.endswith("weight") else 1)
        for name, shape in KEYS["vgg16"].items()
    }
    return build_lpips(vgg, {name: stand_in(name, shape).abs() for name, shape in KEYS["lpips_linear"].items()})


def discriminator():
    model = PatchDiscriminator()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == KEYS["discriminator"]
    state = model.state_dict()
    for name, shape in KEYS["discriminator"].items():
        if "running" not in name and "tracked" not in name:
            state[name] = stand_in(f"discriminator.{name}", shape)
    model.load_state_dict(state)
    return model


def updater(losses=None, model=None, **settings):
    network = DualViTok(read_config(GOLDEN / "codebook" / "dualvitok_small.py"), decoder=True)
    network.load_state_dict({n: t.double() for n, t in synthetic_state(GOLDEN / "dualvitok_small_keys.json").items()})
    model = model or {}
    dropping = CodeDropping(
        model.get("pixel_drop_rate") or 0.0,
        model.get("pixel_drop_batch_rate", 0.1),
        model.get("pixel_noise_type", "random"),
    )
    options = [
        QuantizerOptions(rotation_trick=model.get(f"{branch}_quantizer__rotation_trick", False))
        for branch in ("semantic", "pixel")
    ]
    losses = replace(LossSettings(), **(losses or {}))
    perceptual = lpips() if losses.perceptual_weight else None
    return Updater(
        TrainableDualViTok(network, dropping, *options),
        RunSettings(vq_loss=losses, mixed_precision="none", **settings),
        discriminator(),
        perceptual,
    )


def norms(module, names):
    """Name of a part -> norm of its gradients."""
    found = {}
    for part in names:
        gradients = [p.grad for n, p in module.named_parameters() if n.startswith(part + ".") and p.grad is not None]
        found[part] = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    return found


def close(found, wanted, tolerance=5e-7):
    found = float(torch.as_tensor(found).detach())
    assert abs(found - wanted) <= tolerance * max(abs(wanted), 1e-3), (found, wanted)


SLOW = ("square128", "square128_adversarial", "rect96x160", "one256")  # the larger pictures
SLOW += ("rotation_trick", "noise_zero", "noise_random")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_a_step_is_the_published_one(name):
    case, expected = CASES[name], CASES[name]["expected"]
    fit = updater(case["loss"], case["model"], max_grad_norm=0)
    fit.step = case["step"] - 1
    pixels = crops(case["crops"])
    forward = {}
    if case["model"].get("pixel_drop_rate"):
        noise = expected["noise"]
        kept = [torch.tensor(noise[key], dtype=torch.float64) for key in ("keep_image", "keep_code")]
        keep_image, keep_code = kept[0].view(-1, 1, 1, 1), kept[1].view(len(pixels), 1, *kept[1].shape[-2:])
        forward["keep"] = ((keep_image + keep_code) > 0).double()
    terms, outputs = fit.update([pixels], 0.0, **forward)

    with np.load(FOLDER / "arrays.npz") as arrays:
        for branch in ("semantic", "pixel"):
            assert np.array_equal(outputs.codes[branch].numpy(), arrays[f"{name}/codes_{branch}"])
        corner = outputs.reconstruction[:, :, :8, :8].detach().numpy()
        assert np.abs(corner - arrays[f"{name}/rec_corner"]).max() < 1e-6
        head = outputs.semantic.permute(0, 3, 1, 2)[:, :16].detach().numpy()
        assert np.abs(head - arrays[f"{name}/rec_semantic_head"]).max() < 1e-6
    grids = {
        "rec": outputs.reconstruction,
        "rec_semantic": outputs.semantic.permute(0, 3, 1, 2),
        "target": outputs.target.permute(0, 3, 1, 2),
        "h_semantic": outputs.features["semantic"].permute(0, 3, 1, 2),
        "h_pixel": outputs.features["pixel"].permute(0, 3, 1, 2),
    }
    for key, wanted in expected["outputs"].items():
        assert list(grids[key].shape) == wanted["shape"]
        close(grids[key].abs().mean(), wanted["abs_mean"])
    for key, wanted in expected["losses"].items():
        if key in terms:
            close(terms[key], wanted)
        elif key == "p_layers" and fit.perceptual is not None:
            for found, layer in zip(
                fit.perceptual.layers(pixels, outputs.reconstruction.detach()), wanted, strict=True
            ):
                close(found.mean(), layer)
        elif key == "semantic_loss":
            semantic = case["loss"].get("semantic_reconstruction", "cos")
            close(terms["semantic_codebook_loss"] + terms[f"semantic_{semantic}_loss"], wanted)
        else:
            assert key in ("rec_l1", "rec_l2", "p_loss", "p_layers"), key
    wanted = dict(expected["grad_norms"])
    close(terms["grad_norm"], wanted.pop("total"))
    for part, norm in norms(fit.network.model, wanted).items():
        close(norm, wanted[part])

    disc = expected["discriminator"]
    close(terms["discriminator_adv_loss"], disc["loss"])
    close(terms["logits_real"], disc["logits_real_mean"])
    close(terms["logits_fake"], disc["logits_fake_mean"])
    wanted = dict(disc["grad_norms"])
    close(terms["discriminator_grad_norm"], wanted.pop("total"))
    for part, norm in norms(fit.discriminator, wanted).items():
        close(norm, wanted[part])
    state = fit.discriminator.state_dict()
    for key, mean in disc["running_mean_abs"].items():
        close(state[key].abs().mean(), mean)
    for key, mean in disc["running_var_mean"].items():
        close(state[key].mean(), mean)
    assert state["main.3.num_batches_tracked"] == disc["num_batches_tracked"]


@pytest.mark.slow
def test_five_updates_are_the_published_ones():
    trajectory = json.loads((FOLDER / "trajectory.json").read_text())
    optimizer = {"lr": trajectory["lr"], "max_grad_norm": trajectory["clip"], "ema": True, "ema_decay": 0.9999}
    fit = updater({"disc_start": trajectory["disc_start"]}, **optimizer)
    before = {n: t.clone() for n, t in fit.network.model.state_dict().items()}
    disc_before = {n: t.clone() for n, t in fit.discriminator.named_parameters()}
    for boxes, wanted in zip(trajectory["batches"], trajectory["steps"], strict=True):
        terms, _ = fit.update([crops(boxes)], trajectory["lr"])
        terms["discriminator_loss"] = terms["discriminator_adv_loss"]
        terms["logits_real_mean"], terms["logits_fake_mean"] = terms["logits_real"], terms["logits_fake"]
        assert fit.step == wanted["step"]
        for key in set(wanted) - {"step"}:
            close(terms[key], wanted[key], 1e-6)

    def change(after, start, part=""):
        return torch.stack([(after[n] - start[n]).norm() for n in start if n.startswith(part)]).norm()

    after = fit.network.model.state_dict()
    for part, wanted in trajectory["weight_change"].items():
        close(change(after, before, part + "."), wanted, 1e-6)
    close(change(fit.ema.state(fit.network.model), before), trajectory["ema_change_total"], 1e-6)
    close(
        change(dict(fit.discriminator.named_parameters()), disc_before), trajectory["discriminator_weight_change"], 1e-6
    )
    assert change(after, before, "semantic_encoder.model.") == trajectory["frozen_vit_change"]
