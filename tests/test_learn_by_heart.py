"""Four captions and pictures are learned by heart; greedy answers are then the very codes that were learned."""

import json

import numpy as np
import pytest
import torch
from lm_small import extended_tokenizer, made_line
from lm_small import write_model as write_lm
from train_small import train, write_data_config, write_record

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.sequences import as_it_is
from pre_tokenize.text import TextTokenizer
from training.generation.cache import CachedLM
from training.generation.decode import Decoder, Settings
from training.generation.interpreter import LMInterpreter, UniTokenInterpreter, Wishes, prompts
from training.generation.load import load_unitoken
from training.generation.sampling import Sampling
from training.models.causal_lm import load_causal_lm
from training.toy_model import write_toy
from vision_tokenizer.codebook.encoder import Encoded
from vision_tokenizer.images.dualvitok import ImageInfo
from vistoken.jobs.chunks import Item

CAPTIONS = ("a red barn", "a cat asleep", "the moon over water", "two apples")
LEARN = {"batch_size": 4, "warmup_epochs": 3, "wd": 0, "lr": 5e-3, "log_interval": 100}
GREEDY = Settings(Sampling(), (Sampling(), Sampling()), guidance=1.0, greedy=True)


def answers(model, interpreter, items):
    questions = [interpreter.question(item) for item in items]
    asked = [prompts(question, model, interpreter.rules, interpreter.wishes, 1)[0] for question in questions]
    decoder = Decoder(model, interpreter.rules, GREEDY, interpreter.close_image)
    return [answer.tokens for answer in decoder.answer(asked)]


@pytest.mark.slow
def test_unitoken_draws_what_it_learned(tmp_path, chameleon_folder):
    random = np.random.default_rng(0)
    format = ChameleonFormat(TextTokenizer(chameleon_folder), image_dir=tmp_path)
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "<|image|>"}] for text in CAPTIONS]
    items = [Item(n, "", b"", {"conversations": turn, "image": [f"{n}.png"]}) for n, turn in enumerate(turns)]
    codes = [random.integers(0, 8192, (4, 4)) for _ in items]
    for item in items:
        write_image(tmp_path / f"{item.index}.png", random)
    info = ImageInfo((64, 64), (64, 64))
    samples = [
        format.sample(draft, {draft.paths[0]: Encoded((grid,), info)})._replace(images=(str(draft.paths[0]),))
        for draft, grid in zip(format.drafts(items), codes, strict=True)
    ]
    write_toy(TextTokenizer(chameleon_folder), tmp_path / "toy")
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", samples))
    more = {"variant": "base", "vit_from": tmp_path / "toy" / "siglip", "dropout": 0, "epochs": 90, **LEARN}
    metrics = train(tmp_path / "toy" / "llm", data, tmp_path / "run", **more)
    assert metrics[-1]["c_loss"] < 0.1
    assert told(tmp_path / "run") == {"variant": "base", "max_seq_len": 4096, "condition_dropout": 0.0}

    model, _ = load_unitoken(tmp_path / "run", torch.device("cpu"), "fp32")
    interpreter = UniTokenInterpreter(format, model.vocab_size, None, None, [(64, 64)], Wishes(size=(64, 64)), as_it_is)
    for tokens, grid in zip(answers(model, interpreter, items), codes, strict=True):
        [block] = format.blocks(np.array(tokens))
        np.testing.assert_array_equal(block.grids[0], grid)


@pytest.mark.slow
def test_a_language_model_draws_what_it_learned(tmp_path):
    folder = extended_tokenizer(tmp_path)
    format = DualViTokFormat(TextTokenizer(folder))
    random = np.random.default_rng(1)
    lines = [made_line(f"Draw {text}, {{resolution_tag}}\n", "<image>", anchors=[(64, 64)]) for text in CAPTIONS]
    for line in lines:
        sizes = zip(line["image_embed_inds"][0], format.codebook_sizes, strict=True)
        line["image_embed_inds"] = [[random.integers(0, size, np.shape(grid)).tolist() for grid, size in sizes]]
    items = [Item(n, "", b"", line) for n, line in enumerate(lines)]
    samples = [format.sample(draft, {}) for draft in format.drafts(items)]
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", samples))
    write_lm(tmp_path / "toy")
    more = {"variant": "lm", "tokenizer_from": folder, "epochs": 180, "unmask_image_logits": False, **LEARN}
    metrics = train(tmp_path / "toy", data, tmp_path / "run", **more | {"dropout": 0, "lr": 1e-2})
    assert metrics[-1]["c_loss"] < 0.1

    model = CachedLM(load_causal_lm(tmp_path / "run")[0])
    interpreter = LMInterpreter(format, model.vocab_size, None, Wishes(), as_it_is)
    for tokens, line in zip(answers(model, interpreter, items), lines, strict=True):
        [block] = format.blocks(np.array(tokens))
        assert [grid.tolist() for grid in block.grids] == line["image_embed_inds"][0]


def told(run):
    return json.loads((run / "final" / "config.json").read_text())["vistoken"]


def write_image(path, random):
    from PIL import Image

    Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
