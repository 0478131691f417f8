"""The figures of docs/gpu-training.md are those of training/estimate.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.assemble import freeze
from training.config import STAGES, resolve
from training.data.anyres import feature_layout
from training.estimate import longest_batch, memory, step_seconds
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from training.models.unitoken import UniToken
from training.preflight import memory_lines
from training.report import Flops
from training.run import keeps_whole_gradients

PAGE = (Path(__file__).parents[1] / "docs" / "gpu-training.md").read_text()
MODELS = {"7B": LLMConfig(), "34B": LLMConfig(65536, 8192, 22016, 48, 64, 8)}
TOWER = VisionConfig()
DISCRETE, LEARNED = 1160, 580  # tokens of a sample: an image of 512 x 512 and a hundred words, half of them learned
PEAK = 989e12  # of an H100 or H200, bf16
NVLINK, NETWORK = 300e9, 40e9  # bytes a second of a process, as reached


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    with torch.device("meta"):
        return request.param, UniToken(MODELS[request.param], TOWER, z_weight=0)


def rows(name, model, stage, variant):
    """Lines of both tables: memory of a process on 8 GPUs, seconds of a step on 8 in a node and on 64 in eight."""
    freeze(model, STAGES[stage]["trainable_params"])
    settings = {"init_from": "a", "data_config": "b", "output_dir": "c", "global_batch_size": 128, "stage": stage}
    settings |= {"variant": variant, "checkpointing": True}
    config, llm = resolve(settings), MODELS[name]
    plain, larger = (memory(model, config, llm, TOWER, 8, whole=whole) for whole in (False, True))
    small = memory(model, resolve({**settings, "batch_size": 1}), llm, TOWER, 8, whole=False)
    assert f"a process: about {plain.total / 2**30:.1f} GiB = weights" in memory_lines(plain, config, TOWER, 8)
    gib = [f"{part / 2**30:.0f}" for part in (plain.weights, plain.optimizer, plain.gathered + plain.loss)]
    gib += [f"{part / 2**30:.0f}" for part in (plain.activations, plain.total, larger.total, small.total)]
    yield f"| {name} | {stage} | {variant} | {' | '.join(gib)} |"

    tiles = 5 if variant == "anyres" else 1
    continuous = len(feature_layout(1000, 1000, 384, 27, variant == "anyres")) + 1
    flops = 128 * Flops(model, llm, TOWER).count(DISCRETE + continuous, LEARNED, tiles, (DISCRETE + continuous) ** 2)
    cells = []
    ways = (
        (8, NVLINK, {}),
        (8, NVLINK, {"whole_gradients": "yes"}),
        (64, NETWORK, {}),
        (64, NVLINK, {"shard_over": 8}),
    )
    for world, link, extra in ways:
        config = resolve(settings | extra)
        computing, sending = step_seconds(model, config, flops, world, peak=PEAK, link=link, across=NETWORK)
        cells += [f"{one:.2f}" if one < 10 else f"{one:.0f}" for one in ([] if extra else [computing]) + [sending]]
    yield f"| {name} | {stage} | {variant} | {flops / 1e15:.1f} | {' | '.join(cells)} |"


@pytest.mark.parametrize("variant", ["base", "anyres"])
@pytest.mark.parametrize("stage", ["I", "II"])
def test_the_page_has_the_figures_of_the_formulas(model, stage, variant):
    name, module = model
    for row in rows(name, module, stage, variant):
        assert row in PAGE, row


@pytest.mark.parametrize(
    ("change", "world", "kept"),
    [({}, 8, True), ({"batch_size": 16}, 8, False), ({}, 1, False), ({"whole_gradients": "no"}, 8, False)],
    ids=["several batches", "one batch", "one process", "no"],
)
def test_gradients_stay_whole_where_that_saves_sending_and_fits(monkeypatch, change, world, kept):
    room = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    config = resolve({"init_from": "a", "data_config": "b", "output_dir": "c", "global_batch_size": 128} | change)
    assert keeps_whole_gradients(config, 61 * 2**30, world, torch.device("cuda")) == kept
    assert not keeps_whole_gradients(config, 70 * 2**30, world, torch.device("cuda")), "fragments need room, too"
    assert not keeps_whole_gradients(config, 1, world, torch.device("cpu"))


def test_the_longest_batch_counts_continuous_tokens():
    config = {"init_from": "a", "data_config": "b", "output_dir": "c", "batch_size": 2}
    assert longest_batch(resolve(config), TOWER, 2) == (2 * (4096 + 730), 2)
    assert longest_batch(resolve({**config, "variant": "anyres"}), TOWER, 2) == (2 * (4096 + 729 + 1 + 54 * 55), 10)
    assert longest_batch(resolve({**config, "variant": "lm", "dropout": 0.0}), None, 2) == (8192, 0)
