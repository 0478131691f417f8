"""Training any transformers language model on text and codes."""

import json

import pytest
import torch
import transformers
from conftest import GOLDEN
from lm_small import extended_tokenizer, golden_lines, write_lines, write_model, write_tokenizer
from tokenizers import Tokenizer
from train_small import flags, metrics, text_samples, train, train_processes, write_data_config, write_record

from pre_tokenize import concat_record, pre_tokenize
from pre_tokenize.extend_tokenizer import extend
from pre_tokenize.text import TextTokenizer
from pre_tokenize.token_file import TokenFiles
from training.assemble import open_model
from training.config import resolve
from training.data.packing import interleave, pack
from training.models import causal_lm
from vistoken.errors import UserError

SIZES = {
    "vocab_size": 10343,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LM = {"variant": "lm", "dropout": 0, "unmask_image_logits": False, "batch_size": 2, "epochs": 4, "global_batch_size": 4}


@pytest.fixture(scope="module", params=["qwen2, tied", "llama"])
def model(request, tmp_path_factory):
    """A tiny model of a kind, saved by transformers."""
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    if request.param == "llama":
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    else:
        config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_data_config(folder / "data.yaml", write_record(folder / "tokens", text_samples(16)))


def transformers_loss(folder, samples):
    """Sum over labels, one sample at a time, by transformers itself."""
    lm, total = transformers.AutoModelForCausalLM.from_pretrained(folder), 0.0
    for sample in samples:
        tokens, labels = (torch.tensor(column)[None].long() for column in (sample.tokens, sample.labels))
        with torch.no_grad():
            total += lm(input_ids=tokens, labels=labels).loss.item() * int(sample.loss_mask[1:].sum())
    return total


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_transformers_own(model, checkpointing):
    samples = text_samples(5)
    settings = {"init_from": str(model), "data_config": "x", "output_dir": "x", "variant": "lm", "z_loss_weight": 0.0}
    ours, _ = open_model(resolve({**settings, "checkpointing": checkpointing}))
    packed = pack([interleave("x", sample.tokens, sample.labels, []) for sample in samples], 1)
    loss, sums = ours(packed)
    assert loss.item() == pytest.approx(transformers_loss(model, samples), rel=1e-5)
    assert sums[0].item() == pytest.approx(loss.item())


@pytest.mark.slow
def test_one_process_or_two_it_learns_and_transformers_loads_the_result(tmp_path, model, data):
    whole = train(model, data, tmp_path / "one", **LM, lr=1e-2)
    assert sum(step["c_loss"] for step in whole[-4:]) < 0.9 * sum(step["c_loss"] for step in whole[:4])
    final = tmp_path / "one" / "final"
    samples = text_samples(16)
    labels = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    assert transformers_loss(final, samples) / labels < 0.9 * whole[0]["c_loss"]
    names = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]
        for folder in (final, model)
    ]
    assert not any(names)
    process = train_processes(2, flags(model, data, tmp_path / "two", **LM, lr=1e-2))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for one, other in zip(metrics(tmp_path / "two"), whole, strict=True):
        assert one["c_loss"] == pytest.approx(other["c_loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one(tmp_path, model, data):
    whole = train(model, data, tmp_path / "whole", **LM)
    train(model, data, tmp_path / "parts", **LM, max_steps=3)
    assert train(model, data, tmp_path / "parts", **LM) == whole


def test_embeddings_grow_for_an_extended_tokenizer(tmp_path, model, data):
    """Old words keep theirs, and the tokenizer goes into the saved folder."""
    tokenizer = Tokenizer.from_file(str(GOLDEN / "chameleon_small" / "text_tokenizer.json"))
    tokenizer.add_tokens([f"<|code{i}|>" for i in range(40)])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    manifest = {"vocab_size": 10383, "vocabulary": TextTokenizer(tmp_path / "tokenizer").vocabulary}
    samples = text_samples(8)
    samples[0].tokens[:40] = range(10343, 10343 + len(samples[0].tokens[:40]))
    record = write_record(tmp_path / "tokens", samples, manifest=manifest)
    data = write_data_config(tmp_path / "data.yaml", record)
    with pytest.raises(UserError, match="vocabulary of 10383"):
        train(model, data, tmp_path / "output", **LM)
    train(model, data, tmp_path / "output", **LM, tokenizer_from=tmp_path / "tokenizer")
    final = tmp_path / "output" / "final"
    assert (final / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    grown = transformers.AutoModelForCausalLM.from_pretrained(final).get_input_embeddings().weight
    before = transformers.AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    assert len(grown) == 10383 and (grown[: len(before)] - before).abs().max() < 0.1
    assert grown[len(before) :].std(0).min() > 0, "no two new words start alike"


@pytest.mark.slow
def test_codes_of_images_to_a_trained_model(tmp_path, capsys):
    """Lines of codebook inference, pre-tokenized, trained on, loaded again: the way of the ILLUME document."""
    tokenizer = extended_tokenizer(tmp_path)
    write_lines(tmp_path / "0000.jsonl", golden_lines("generation/fixed_256/0001", "editing/fixed_256/0000"))
    tokenize = ["--image_tokenizer", "dualvitok", "--tokenizer_dir", tokenizer, "--out_dir", tmp_path / "tokens"]
    assert pre_tokenize.main([*map(str, tokenize), "--in_filename", str(tmp_path / "0000.jsonl")]) == 0
    record = tmp_path / "tokens" / "record.json"
    concat_record.main(["--sub_record_dir", str(tmp_path / "tokens"), "--save_path", str(record)])
    small = write_model(tmp_path / "small", vocab_size=303, tie_word_embeddings=True)
    data, steps = write_data_config(tmp_path / "data.yaml", record), {"global_batch_size": 2, "epochs": 20, "lr": 1e-2}
    found = train(small, data, tmp_path / "output", **LM | steps | {"tokenizer_from": tokenizer})
    assert found[0]["c_loss"] > 6 and found[-1]["c_loss"] < 0.7 * found[0]["c_loss"]
    printed = capsys.readouterr()
    assert "the tokenizer has 8,534 words, the model 303: embeddings for the others are made" in printed.err
    assert "<height_256><width_256>" in printed.out and "image tokens>" in printed.out
    final = tmp_path / "output" / "final"
    samples = list(TokenFiles(record))
    labels = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    assert transformers_loss(final, samples) / labels < 0.7 * found[0]["c_loss"]
    words = transformers.AutoTokenizer.from_pretrained(final)
    assert words.convert_tokens_to_ids("<|image_level1_6143|>") == 8533
    again = train(final, data, tmp_path / "again", **LM | {"epochs": 1})
    assert again[0]["c_loss"] < 0.7 * found[0]["c_loss"]


def test_a_folder_whose_own_tokenizer_was_extended_grows_too(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", vocab_size=303)
    settings = {"init_from": str(folder), "data_config": "x", "output_dir": "x", "variant": "lm"}
    assert open_model(resolve(settings))[1].config["vocab_size"] == 303
    extend(str(write_tokenizer(tmp_path / "original")), folder, (3, 4))
    opened, grown = open_model(resolve(settings))
    monkeypatch.setattr(causal_lm, "draw_words", None)
    resumed, _ = open_model(resolve(settings), resumed=True)  # draws none: a checkpoint will fill them
    assert resumed.model.embed_tokens.weight.shape == opened.model.embed_tokens.weight.shape
    assert grown.config["vocab_size"] == grown.llm.vocab_size == 303 + 39 + 7
    assert len(opened.model.embed_tokens.weight) == 349 and grown.tokenizer == folder


def test_ids_that_frame_images_elsewhere_are_words_here(tmp_path, model):
    """8196 to 8198 and 8803 are marks in Chameleon's vocabulary only."""
    samples = text_samples(8)
    for sample in samples:
        sample.tokens[:4] = 8197, 8198, 8803, 8196
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", samples))
    assert len(train(model, data, tmp_path / "output", **LM | {"epochs": 1})) == 2


def test_bad_input(tmp_path, model, data):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    for change, message in (
        ({"init_from": tmp_path / "empty"}, "no config.json"),
        ({"init_from": tmp_path / "foreign"}, "no causal language model"),
        ({"dropout": 0.1}, "--dropout"),
    ):
        with pytest.raises(UserError, match=message):
            train(model, data, tmp_path / "output", **LM | change)
