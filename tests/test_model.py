"""The UniToken model against the golden single steps, and what packing must and must not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from unitoken_small import IMAGES, LLM, VISION, batch, golden, sample, small_model, tokens_and_labels

from training.assemble import freeze
from training.data.anyres import image_input
from training.data.packing import SEPARATOR, interleave, pack
from training.report import Flops
from vision_tokenizer.models.chameleon.vocabulary import RELEASED_IMAGE_IDS


def mean_step(model, packed):
    """Cross-entropy and z-loss per label, with gradients of the mean."""
    loss, sums = model(packed)
    (loss / packed.label_count).backward()
    return (sums / packed.label_count).tolist()


@pytest.mark.parametrize("key", golden("training/single_step.json"))
def test_single_step(key):
    check_step(key, golden("training/single_step.json")[key], small_model())


@pytest.mark.slow
@pytest.mark.parametrize("key", golden("training/more_single_step.json"))
def test_single_step_with_masked_logits_and_z_weight(key):
    settings = {"masked": RELEASED_IMAGE_IDS} if "masked" in key else {"z_weight": 0.1}
    check_step(key, golden("training/more_single_step.json")[key], small_model(**settings))


def check_step(key, expected, model):
    variant, *_, kinds = key.split("/")
    c_loss, z_loss = mean_step(model, batch(kinds, variant))
    assert c_loss == pytest.approx(expected["c_loss"], rel=1e-6)
    assert z_loss == pytest.approx(expected["z_loss"], rel=1e-6)
    parameters = dict(model.named_parameters())
    for name, norm in expected["grad_norm"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-5), name


@pytest.mark.parametrize("key", golden("training/sequence_facts.json"))
def test_sequence_facts(key):
    expected = golden("training/sequence_facts.json")[key]
    variant, kind = key.split("/")
    one, model = sample(kind, variant), small_model()
    # the published sequences of text are padded with the embedding of id 0; ours are not
    padding = {"base": 730, "anyres": 731}[variant] if kind == "text" else 0
    assert len(one) + padding == expected["len"]
    learned = one.labels[one.labels >= 0]
    assert (len(learned), learned.sum()) == (expected["labels"], expected["label_sum"])
    if kind != "text":
        tiles = np.concatenate(one.tiles)
        assert list(tiles.shape) == expected["image_tensor"]
        assert (tiles / 127.5 - 1).mean() == pytest.approx(expected["pixel_mean"], abs=1e-6)
    with torch.no_grad():
        embedded = model.embed(pack([one], VISION.image_size)).double().abs().sum()
        embedded += padding * model.model.embed_tokens.weight[0].double().abs().sum()
    assert embedded.item() == pytest.approx(expected["embed_sum"], rel=1e-6)


def test_the_towers_unused_head_counts_for_nothing():
    model = small_model()
    used = sum(p.numel() for name, p in model.vit.named_parameters() if not name.startswith(("head.", "embeddings.")))
    assert Flops(model, LLM, VISION).parts["vit"] == 6 * used


def test_packed_samples_do_not_see_each_other():
    model = small_model()
    with torch.no_grad():
        together = model(batch("caption+text+wide"))[1]
        alone = sum(model(batch(kind))[1] for kind in ("caption", "text", "wide"))
        other_order = model(batch("wide+caption+text"))[1]
    assert torch.allclose(together, alone, rtol=1e-6)
    assert torch.allclose(together, other_order, rtol=1e-6)


def test_padding_at_the_end_changes_nothing():
    one = sample("caption")
    filler = {"tokens": 1, "labels": -100, "features": -1}
    padded = replace(one, **{name: np.append(getattr(one, name), [value] * 50) for name, value in filler.items()})
    model = small_model()
    with torch.no_grad():
        assert torch.allclose(model(batch("caption"))[1], model(pack([padded], 384))[1], rtol=1e-6)


def test_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = small_model(checkpointing=checkpointing)
        losses = mean_step(model, batch("text+wide"))
        gradients.append((losses, model.vit.encoder.layers[0].mlp.fc1.weight.grad))
    assert gradients[0][0] == gradients[1][0]
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_a_batch_of_text_still_reaches_the_tower():
    model = small_model()
    mean_step(model, batch("text"))
    for name in ("vit.encoder.layers.0.mlp.fc1.weight", "adapter.0.weight"):
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None and gradient.abs().max() == 0


def test_a_comma_too_many_trains_no_more():
    model = small_model()
    freeze(model, "vit, ")
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"vit"}


def test_a_batch_of_text_takes_no_number_from_the_tower():
    """Not even 0 * inf, where a sum of 16-bit features overflows."""
    model = small_model()
    with torch.no_grad():
        model.adapter[2].bias.fill_(torch.inf)
    assert model.embed(batch("text")).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "anyres"])
def test_four_images_each_with_its_own_features_and_gradient(variant):
    """Images in questions and answers alike; moving one image's pixels moves only what comes after it."""
    block = tokens_and_labels("wide")[0]
    start, end = np.flatnonzero(block == 8197)[0], np.flatnonzero(block == 8196)[0] + 1
    tokens = np.concatenate([piece for i in range(4) for piece in ([9000 + i], block[start:end])] + [[9004, 8710]])
    labels = np.where(np.arange(len(tokens)) > len(tokens) // 2, tokens, -100)
    names = ("sq_astronaut.png", "wide_2x1.png", "h768_w384.png", "sq_gray.png")
    inputs = [
        image_input(Image.open(IMAGES / name).convert("RGB"), VISION.image_size, VISION.grid, variant == "anyres")
        for name in names
    ]
    four = interleave("four", tokens, labels, inputs)
    assert (four.tokens == SEPARATOR).sum() == 4
    assert (four.labels == SEPARATOR).sum() >= 4
    packed, model = pack([four], VISION.image_size), small_model()
    features = []
    model.adapter.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), features.append(out))[0])
    mean_step(model, packed)
    per_tile = features[0].grad.abs().sum((1, 2))
    tile_counts = np.cumsum([len(i.tiles) for i in inputs])
    for group in np.split(per_tile.numpy(), tile_counts[:-1]):
        assert (group > 0).all()
