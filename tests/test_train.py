"""Training through the command line: the published curve, any number of processes, both stages, what goes wrong."""

import json
import resource
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from train_small import (
    TEXT,
    assert_curve,
    flags,
    metrics,
    text_samples,
    train,
    train_processes,
    write_data_config,
    write_images,
    write_model,
    write_record,
    write_texts,
    write_tower,
)
from unitoken_small import golden, synthetic_state

from pre_tokenize.record import Record
from pre_tokenize.token_file import TokenFiles, hash_of
from training import loop, run
from training.assemble import open_model
from training.config import resolve
from training.data.loading import split_record
from training.data.packing import discrete, pack
from training.models.unitoken import UniToken
from training.report import Report, peak_flops
from training.state import Progress
from vistoken.errors import DataError, UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "unitoken")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_every_step_says_its_type(tmp_path, model):
    """And loss.png has a line for each: text alone has another loss than images."""
    records = {kind: write_record(tmp_path / kind, text_samples(8)) for kind in ("captions", "text")}
    entries = [{"path": str(record), "type": kind} for kind, record in records.items()]
    (tmp_path / "data.yaml").write_text(json.dumps({"META": entries}))
    found = train(model, tmp_path / "data.yaml", tmp_path / "out", batch_size=2, epochs=2)
    assert len(found) == 16 and [line["type"] for line in found].count("text") == 8
    assert len({tuple(line["type"] for line in found if line["epoch"] == epoch) for epoch in (0, 1)}) == 2
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "anyres"])
def test_stage2_trajectory(tmp_path, model, images, variant):
    found = train(model, images, tmp_path, variant=variant, checkpointing=True)
    assert_curve(found, golden("training/stage2_trajectory.json")[f"stage2_{variant}"], 1e-4)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        {"data_parallel": "sdp"},
        {"shard_over": 1},
        {"whole_gradients": "yes"},
        {"batch_tokens": 600, "batch_size": False},
    ],
    ids=lambda way: next(iter(way)),
)
def test_two_processes_give_the_curve_of_one(tmp_path, model, images, way):
    """Accumulating too; in each first batch one process has text only, the other an image. Of the five samples that are
    held out, the last falls to one process, and the other computes with it.
    """
    held_out = write_record(tmp_path / "held_out", text_samples(5))
    entries = [*yaml.safe_load(images.read_text())["META"], {"path": str(held_out), "split": "validation"}]
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"META": entries}))
    settings = {"batch_size": 1, "global_batch_size": 4, "num_workers": 1, **way}
    process = train_processes(2, flags(model, data, tmp_path / "out", **settings))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found = metrics(tmp_path / "out")
    assert found[-1]["validation"] == held_out_losses(tmp_path / "out", Record.load(held_out))
    assert_curve(found, golden("training/stage2_trajectory.json")["stage2_base"], 1e-4)
    assert "in [[ ]]" in output and "step 5/5" in output


@pytest.mark.slow
def test_what_goes_wrong_on_one_process_ends_all_and_its_reason_is_told(tmp_path, model, text):
    """A token file that vanishes while training."""
    copy = tmp_path / "text"
    shutil.copytree(text.parent, copy)
    data = write_data_config(copy / "data.yaml", copy / "tokens" / "record.jsonl")
    lines = (copy / "tokens" / "record.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace("0.arrow", "gone.arrow")
    (copy / "tokens" / "record.jsonl").write_text("\n".join(lines))
    process = train_processes(2, flags(model, data, tmp_path / "output", **TEXT | {"batch_size": 1}))
    output, _ = process.communicate(timeout=300)
    ours, _, of_torchrun = output.partition("training/train.py FAILED")
    assert process.returncode and ours.count("error: ") <= 1 and "files/gone.arrow" in of_torchrun, output
    assert "training/loop.py" not in output  # no traceback of ours


@pytest.mark.parametrize(
    ("way", "named"),
    [
        ({}, r"4 samples, .* Lower --batch_size \(BATCH_SIZE\) or --max_seq_len"),
        ({"batch_size": 1}, r"1 samples, .* Lower --max_seq_len"),
        ({"batch_tokens": 9999, "global_batch_size": 4, "batch_size": False}, r"Lower --batch_tokens \(BATCH_TOKENS\)"),
    ],
    ids=["samples", "one", "tokens"],
)
def test_out_of_memory_names_what_to_lower(tmp_path, model, images, monkeypatch, way, named):
    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(UniToken, "forward", full)
    with pytest.raises(UserError, match=f"too little memory for a batch of .*{named}"):
        train(model, images, tmp_path / "output", **way)


@pytest.mark.slow
def test_steps_that_overflow_fp16_are_left_out_and_told(tmp_path, model, text, monkeypatch, capsys):
    monkeypatch.setattr(run, "Progress", lambda: Progress(loss_scale=2.0**40))
    found = train(model, text, tmp_path, **TEXT, precision="fp16", max_steps=2)
    assert [line["grad_norm"] for line in found] == [None, None]
    assert "step 2 left out: a gradient overflowed fp16" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, images):
    """Stage I from a language model alone, the tower from a SigLIP folder."""
    folder = tmp_path_factory.mktemp("stage1")
    llm, tower = write_model(folder / "llm", ("model.", "lm_head.")), write_tower(folder / "siglip")
    settings = {"stage": "I", "vit_from": tower, "vit_lr_scale": 1e-2, "epochs": 2, "trainable_params": "vit,adapter"}
    train(llm, images, folder / "output", **settings)
    return folder / "output"


def test_stage1_trains_tower_and_adapter_and_leaves_the_language_model_bit_for_bit(stage1):
    before, after = synthetic_state(), load_file(stage1 / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if name.startswith("vit") and not torch.equal(before[name], after[name])}
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(("model.", "lm_head.")))
    assert "vit.encoder.layers.0.mlp.fc1.weight" in changed
    assert not {name for name in changed if "_embedding" in name or ".head." in name}
    assert not torch.equal(before["adapter.0.weight"], after["adapter.0.weight"])


@pytest.mark.slow
def test_stage1s_output_is_stage2s_input(stage1, images, tmp_path, capsys):
    """A published folder's files are all there, transformers reads its configuration, and nothing else is needed."""
    import transformers

    found = train(stage1, images, tmp_path, epochs=1, vit_from="nowhere")
    assert len(found) == 1
    printed = capsys.readouterr().out
    assert f"vit                 17,152          50,688  {stage1 / 'final'}" in printed
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "final")
    assert (config.hidden_size, config.vocab_size) == (64, 10343)


@pytest.mark.slow
def test_sharded_and_bin_folders_and_what_releases_carry_along(tmp_path, model, text):
    """The golden weights as .bin shards with an image tokenizer in between give the same first step."""
    folder = tmp_path / "bin"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    state = {**synthetic_state(), "model.vqmodel.encoder.weight": torch.ones(3)}
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    weight_map = {}
    for number, half in enumerate(halves):
        torch.save(half, folder / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(half, f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = train(folder, text, tmp_path / "one", **TEXT, max_steps=2)
    assert found == train(model, text, tmp_path / "other", **TEXT, max_steps=2)


@pytest.mark.slow
def test_a_large_model_is_saved_in_shards_that_load_again(tmp_path, model, text, monkeypatch):
    monkeypatch.setattr("training.models.folder.SHARD_BYTES", 1 << 20)
    one = train(model, text, tmp_path / "one", **TEXT, max_steps=2)
    index = json.loads((tmp_path / "one" / "final" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == synthetic_state().keys()
    again = train(tmp_path / "one", text, tmp_path / "two", **TEXT, max_steps=1)
    assert len(one) == 2 and len(again) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_other_precisions_learn(tmp_path, model, text, precision):
    found = train(model, text, tmp_path, **TEXT, precision=precision, data_parallel="sdp")
    assert found[0]["c_loss"] == pytest.approx(9.7, rel=0.05)  # what fp32 gives
    assert found[-1]["c_loss"] < found[0]["c_loss"]


def test_a_number_that_is_none_stops_the_run_and_names_the_samples(tmp_path, model, text):
    state = synthetic_state()
    state["lm_head.weight"][9000] = float("nan")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    save_file(state, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"step 1: cross-entropy nan.*record\.jsonl, id \d+; .*record\.jsonl, id \d+"):
        train(broken, text, tmp_path / "output", **TEXT)


@pytest.mark.slow
def test_too_many_unusable_samples_stop_the_run(tmp_path, model, monkeypatch):
    """A few are replaced and logged."""
    samples = text_samples(20)
    samples[::4] = [sample._replace(images=("/nowhere.png",)) for sample in samples[::4]]
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", samples))
    train(model, data, tmp_path / "few", **TEXT | {"epochs": 1})
    skipped = [json.loads(line) for line in (tmp_path / "few" / "skipped.jsonl").read_text().splitlines()]
    assert len({line["name"] for line in skipped}) == 5, "one of them was tried in the place of another, too"
    assert all("images do not match" in line["reason"] for line in skipped)
    monkeypatch.setattr(loop, "FEW_FAILURES", 3)
    with pytest.raises(UserError, match=r"4 of \d+ samples could not be used.*images do not match"):
        train(model, data, tmp_path / "many", **TEXT)


def test_logs_on_a_full_disk_are_told(tmp_path):
    report = Report(tmp_path, 0, total_steps=9, interval=5, world=1, precision="fp32")
    metrics = dict.fromkeys(("epoch", "iter", "step", "c_loss", "z_loss", "grad_norm", "lr", "vit_lr", "tokens"), 2)
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    for action in (lambda: report.step(metrics, [], 1.0), report.close):
        with pytest.raises(UserError, match="cannot write the logs"):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, allowed[1]))  # no file may grow any more
                action()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


@pytest.mark.parametrize(("precision", "known"), [("bf16", True), ("fp16", True), ("tf32", False), ("fp32", False)])
def test_utilisation_is_told_where_the_peak_of_the_precision_is_known(monkeypatch, precision, known):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert bool(peak_flops(precision)) is known


def held_out_losses(run, *records):
    """Cross-entropy of each record's samples, and of all, by the finished model as it is, in one batch."""
    paths = {"init_from": str(run), "data_config": "-", "output_dir": "-"}
    model, _ = open_model(resolve({**paths, "unmask_image_logits": True}))
    model.eval()
    sums = {}
    for record in records:
        batch = pack([discrete("", sample.tokens, sample.labels) for sample in TokenFiles(record)], 384)
        with torch.no_grad():
            sums[str(record.path)] = (model(batch)[1][0].item(), batch.label_count)
    sums["all"] = [sum(column) for column in zip(*sums.values(), strict=True)]
    return {name: pytest.approx(loss / labels, rel=1e-5) for name, (loss, labels) in sums.items()}


@pytest.mark.slow
def test_held_out_samples_are_measured_and_never_trained_on(tmp_path, monkeypatch):
    """By id, so that a run that goes on holds out the same ones."""
    trained_on = set()
    step = loop.train_step

    def seen(run, batches, *rest):
        trained_on.update(name for batch in batches for name in batch.names)
        return step(run, batches, *rest)

    monkeypatch.setattr(loop, "train_step", seen)
    model = write_model(tmp_path / "model")
    records = [write_record(tmp_path / name, text_samples(count, count)) for name, count in (("a", 24), ("b", 6))]
    entries = [{"path": str(records[0]), "validation": 0.25}, {"path": str(records[1]), "split": "validation"}]
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"META": entries}))
    settings = {"eval_interval": 2, "epochs": 2, "batch_size": 4, "save_iteration_interval": 2}
    first = train(model, data, tmp_path / "run", max_steps=2, **settings)
    lines = train(model, data, tmp_path / "run", **settings)
    assert lines[:2] == first
    assert len(list((tmp_path / "run" / "index").glob("*/record.jsonl.index-*"))) == 2  # of the same name
    evaluated = {line["step"]: line["validation"] for line in lines if "validation" in line}
    assert list(evaluated) == sorted({*range(2, len(lines) + 1, 2), len(lines)})

    record = Record.load(records[0])
    kept, held = split_record(record, 0.25)
    assert not set(kept.ids) & set(held.ids) and len(kept) + len(held) == 24 and 0 < len(held) < 12
    assert len(trained_on) > 12 and trained_on <= {f"{records[0]}, id {number}" for number in kept.ids}
    assert evaluated[len(lines)] == held_out_losses(tmp_path / "run", held, Record.load(records[1]))
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_token_file_that_changed_since_it_was_written_ends_the_run(tmp_path, model):
    record = write_record(tmp_path / "tokens", text_samples(8))
    shard = tmp_path / "tokens" / "files" / "0.arrow"
    first, *rest = record.read_text().splitlines(keepends=True)
    record.write_text("".join([json.dumps({**json.loads(first), "sha256": hash_of(shard.read_bytes())}) + "\n", *rest]))
    data = write_data_config(tmp_path / "data.yaml", record)
    train(model, data, tmp_path / "whole", max_steps=1)
    content = bytearray(shard.read_bytes())
    content[content.index(text_samples(8)[3].tokens.tobytes())] ^= 1
    shard.write_bytes(content)  # another token of the vocabulary, which nothing but the hash can tell
    with pytest.raises(DataError, match=r"0\.arrow: not the bytes that were written"):
        train(model, data, tmp_path / "damaged", max_steps=1)
