"""Training through the command line: the published curve, any number of processes, interruption, and bad input."""

import errno
import json
import resource
import shutil
import threading
import time
from traceback import StackSummary
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException
from train_small import (
    flags,
    golden_samples,
    metrics,
    text_samples,
    train,
    train_processes,
    write_data_config,
    write_model,
    write_record,
    write_tower,
)
from unitoken_small import golden, synthetic_state

from pre_tokenize.record import Record
from pre_tokenize.token_file import TokenFiles, hash_of
from training import loop, run, state
from training.assemble import open_model
from training.config import build_parser, resolve
from training.data.loading import read_data_config, split_record
from training.data.packing import discrete, pack
from training.loop import learning_rate
from training.models.folder import open_unitoken
from training.models.unitoken import UniToken
from training.report import Report, peak_flops
from training.state import Progress
from training.train import main
from vistoken.errors import DataError, UserError

TEXT = {"batch_size": 2, "epochs": 2, "save_iteration_interval": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "unitoken")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The four golden samples."""
    folder = tmp_path_factory.mktemp("images")
    return write_data_config(folder / "data.yaml", write_record(folder / "tokens", golden_samples()))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Twenty short samples of text: ten steps of two an epoch."""
    folder = tmp_path_factory.mktemp("text")
    return write_data_config(folder / "data.yaml", write_record(folder / "tokens", text_samples(20)))


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


def assert_curve(found, expected, rel):
    for one, other in zip(found, expected, strict=True):
        for name in ("c_loss", "z_loss", "grad_norm", "lr", "vit_lr"):
            assert one[name] == pytest.approx(other[name], rel=rel), (one, other)


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
def test_killed_at_any_point_a_run_goes_on_as_if_nothing_had_happened(tmp_path, model, text):
    """Dropout included: the same losses to the last bit."""
    whole = train(model, text, tmp_path / "whole", **TEXT, dropout=0.1)
    process = train_processes(1, flags(model, text, tmp_path / "killed", **TEXT, dropout=0.1))
    seen = tmp_path / "killed" / "metrics.jsonl"
    while not seen.exists() or len(seen.read_text().splitlines()) < 7:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = train(model, text, tmp_path / "killed", **TEXT, dropout=0.1)
    assert resumed == whole
    final = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, model, text):
    whole = train(model, text, tmp_path / "whole", **TEXT)
    train(model, text, tmp_path / "parts", **TEXT, max_steps=5)
    process = train_processes(2, flags(model, text, tmp_path / "parts", **TEXT | {"batch_size": 1}))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on from" in output, output
    assert_curve(metrics(tmp_path / "parts"), whole, 1e-5)


@pytest.mark.slow
def test_checkpoints_are_pruned_and_a_half_written_one_is_ignored(tmp_path, model, text):
    train(model, text, tmp_path, **TEXT)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000018", "step_00000020"]
    (tmp_path / "checkpoints" / "step_00000020" / "progress.json").unlink()
    again = train(model, text, tmp_path, **TEXT)
    assert [line["step"] for line in again] == list(range(1, 21))


@pytest.mark.slow
def test_checkpoints_written_beside_the_training_are_the_same(tmp_path, model, text):
    """A run that saves every third step and one that stops and goes on in between, with copies of the weights."""
    whole = train(model, text, tmp_path / "whole", **TEXT)
    train(model, text, tmp_path / "parts", **TEXT, max_steps=11, async_save=True)
    kept = sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir())
    assert kept == ["step_00000009", "step_00000011"]
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000011")
    assert train(model, text, tmp_path / "parts", **TEXT, async_save=True) == whole


def test_a_damaged_checkpoint_is_named(tmp_path, model, text):
    train(model, text, tmp_path, **TEXT, max_steps=3)
    (data,) = tmp_path.glob("checkpoints/*/*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match="step_00000003: cannot read this checkpoint"):
        train(model, text, tmp_path, **TEXT)


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


@pytest.mark.slow
def test_a_run_by_tokens_goes_on_to_the_last_bit_and_has_the_steps_of_one_by_samples(tmp_path, model, text):
    by_samples = train(model, text, tmp_path / "samples", global_batch_size=8, epochs=2)
    way = {"global_batch_size": 8, "batch_size": False, "batch_tokens": 70, "epochs": 2, "dropout": 0.1}
    whole = train(model, text, tmp_path / "whole", **way)
    train(model, text, tmp_path / "parts", **way, max_steps=3)
    assert train(model, text, tmp_path / "parts", **way) == whole
    assert [line["tokens"] for line in whole] == [line["tokens"] for line in by_samples]
    whole = train(model, text, tmp_path / "plain", **way | {"dropout": 0})
    assert_curve(whole, by_samples, 1e-4)


def test_other_changed_settings_are_told_on_resume(tmp_path, model, text, capsys):
    train(model, text, tmp_path, **TEXT, max_steps=3)
    train(model, text, tmp_path, **TEXT, max_steps=4, lr=1e-4)
    assert "step_00000003; changed since: lr 0.001 -> 0.0001, max_steps 3 -> 4" in capsys.readouterr().out


@pytest.mark.slow
def test_weight_decay_is_this_runs_not_the_checkpoints(tmp_path, model, text):
    train(model, text, tmp_path / "same", **TEXT, max_steps=3)
    shutil.copytree(tmp_path / "same", tmp_path / "decayed")
    same = train(model, text, tmp_path / "same", **TEXT, max_steps=6)
    decayed = train(model, text, tmp_path / "decayed", **TEXT, max_steps=6, wd=50)
    assert decayed[3] == pytest.approx(same[3]) and decayed[5]["c_loss"] != pytest.approx(same[5]["c_loss"], rel=1e-4)


def test_a_budget_of_tokens_wants_the_sizes_of_images(tmp_path, model):
    samples = [sample._replace(image_sizes=None) for sample in golden_samples()]
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", samples))
    way = {"batch_tokens": 600, "global_batch_size": 4, "batch_size": False}
    with pytest.raises(UserError, match="lacks the image sizes of 4 samples"):
        train(model, data, tmp_path / "output", **way)


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
def test_a_refused_resume_leaves_the_runs_configuration(tmp_path, model, text):
    train(model, text, tmp_path, **TEXT, max_steps=3)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="was trained with"):
        train(model, text, tmp_path, **TEXT | {"seed": 1})
    (data,) = tmp_path.glob("checkpoints/*/*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read this checkpoint"):
        train(model, text, tmp_path, **TEXT, lr=1)
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.slow
def test_steps_that_overflow_fp16_are_left_out_and_told(tmp_path, model, text, monkeypatch, capsys):
    monkeypatch.setattr(run, "Progress", lambda: Progress(loss_scale=2.0**40))
    found = train(model, text, tmp_path, **TEXT, precision="fp16", max_steps=2)
    assert [line["grad_norm"] for line in found] == [None, None]
    assert "step 2 left out: a gradient overflowed fp16" in capsys.readouterr().out


def test_a_changed_setting_is_refused_on_resume(tmp_path, model, text):
    train(model, text, tmp_path, **TEXT, max_steps=3)
    for changed in ({"batch_size": 4}, {"seed": 1}, {"variant": "anyres"}):
        with pytest.raises(UserError, match="was trained with"):
            train(model, text, tmp_path, **TEXT | changed)
    with pytest.raises(UserError, match="--no_auto_resume"):
        train(model, text, tmp_path, **TEXT, no_auto_resume=True)


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
    assert len(skipped) == 5 and all("images do not match" in line["reason"] for line in skipped)
    monkeypatch.setattr(loop, "FEW_FAILURES", 3)
    with pytest.raises(UserError, match=r"4 of \d+ samples could not be used.*images do not match"):
        train(model, data, tmp_path / "many", **TEXT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_from": "nowhere"}, "nowhere: no such folder"),
        ({"init_from": "tests"}, "no config.json, so this is no model folder; it holds"),
        ({"data_config": "nowhere.yaml"}, "nowhere.yaml: cannot read"),
        ({"global_batch_size": 7}, "--global_batch_size 7 cannot be made of 4 .* x 1"),
        ({"batch_size": 400}, "too few for one step of 400"),
        ({"lr": -1}, "--lr must be above 0"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"trainable_params": "vit,lora"}, "no tensor's name contains 'lora'"),
        ({"trainable_params": "vit.head"}, "nothing would be trained"),
        ({"dropout": 1.5}, "--dropout"),
        ({"unmask_image_logits": False}, "--unmask_image_logits"),
        ({"resume_path": "nowhere"}, "not a complete checkpoint"),
    ],
)
def test_bad_input(tmp_path, model, images, change, message):
    with pytest.raises(UserError, match=message):
        main(flags(model, images, tmp_path / "output", **change))
    assert not list(tmp_path.glob("output/metrics.jsonl")) or metrics(tmp_path / "output") == []


def test_a_model_that_does_not_fit_its_config(tmp_path, model, text):
    for change, message in (
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
        ({"hidden_size": 128}, "model.embed_tokens.weight"),
        ({"swin_norm": True}, "swin_norm"),
        ({"vocab_size": "many"}, "vocab_size must be a positive number"),
    ):
        folder = tmp_path / message.split()[0]
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            train(folder, text, tmp_path / "output")


def test_an_unfinished_run_is_no_model(tmp_path, text):
    (tmp_path / "stage1" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has not finished"):
        train(tmp_path / "stage1", text, tmp_path / "output")


def test_configuration_comes_from_stage_then_file_then_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("stage: I\nlr: 0.5\ninit_from: a\ndata_config: b\noutput_dir: c\nclip_grad: 1\n")
    parser = build_parser("")
    config = resolve(vars(parser.parse_args(["--config", str(tmp_path / "c.yaml"), "--lr", "0.25"])))
    assert (config.lr, config.clip_grad, config.vit_lr_scale, config.trainable_params) == (0.25, 1, 1e-2, "vit,adapter")
    config.dump(tmp_path / "again.yaml")
    assert resolve({"config": tmp_path / "again.yaml"}) == config
    (tmp_path / "c.yaml").write_text("lerning_rate: 1")
    with pytest.raises(UserError, match="unknown field 'lerning_rate'"):
        resolve({"config": tmp_path / "c.yaml"})
    (tmp_path / "c.yaml").write_text("lr: fast\ninit_from: a\ndata_config: b\noutput_dir: c\n")
    with pytest.raises(UserError, match="--lr: expected float, found 'fast'"):
        resolve({"config": tmp_path / "c.yaml"})
    (tmp_path / "c.yaml").write_text("stage: [I]\ninit_from: a\ndata_config: b\noutput_dir: c\n")
    with pytest.raises(UserError, match=r"--stage: expected str, found \['I'\]"):
        resolve({"config": tmp_path / "c.yaml"})


def test_learning_rate_rises_then_falls_along_half_a_cosine():
    config = resolve({"init_from": "a", "data_config": "b", "output_dir": "c", "lr": 1.0, "min_lr": 0.1, "epochs": 2})
    assert learning_rate(0, config) == 0
    assert learning_rate(0.005, config) == pytest.approx(0.5)
    assert learning_rate(0.01, config) == pytest.approx(1)
    assert learning_rate(1.005, config) == pytest.approx(0.55)
    assert learning_rate(2, config) == pytest.approx(0.1)


def test_images_that_have_moved_are_found_where_the_data_config_says(tmp_path, model):
    sample = golden_samples(["caption"])[0]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(sample.images[0], moved / "picture.png")
    record = write_record(
        tmp_path / "tokens", [sample._replace(images=("picture.png",))], manifest={"image_dir": "/gone"}
    )
    settings = {"batch_size": 1, "epochs": 1}
    with pytest.raises(UserError, match=r"/gone/picture\.png"):
        train(model, write_data_config(tmp_path / "data.yaml", record), tmp_path / "output", **settings)
    assert train(
        model, write_data_config(tmp_path / "data.yaml", record, image_dir="moved"), tmp_path / "output", **settings
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 2.0),
        ("vocab_size", 1e9),
        ("vocab_size", 10**30),
        ("hidden_size", True),
        ("rms_norm_eps", float("nan")),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
    ],
)
def test_what_the_model_cannot_be_is_refused_by_its_field(tmp_path, model, name, value):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=rf"config\.json: {name.replace('parameters', 'type')} "):
        open_unitoken(tmp_path / "model", tmp_path, 0)


def test_positions_are_read_where_transformers_5_writes_them(tmp_path, model):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "rope_theta"}
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}))
    assert open_unitoken(tmp_path / "model", tmp_path, 0).llm.rope_theta == 5e5


def test_a_model_without_a_tokenizer_file_is_told(tmp_path, model, text, capsys):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    train(tmp_path / "model", text, tmp_path / "output", **TEXT, max_steps=1)
    assert f"{tmp_path / 'model'}: no tokenizer file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("lr", float("inf")), ("lr", float("nan")), ("seed", 10**23), ("wd", 1e30)]
)
def test_numbers_that_nothing_can_hold_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} must be .* below 2"):
        resolve({"init_from": "a", "data_config": "b", "output_dir": "c", name: value})


def test_a_world_size_that_is_not_torchruns_is_left_alone(tmp_path, model, text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "a lot")
    train(model, text, tmp_path, **TEXT, max_steps=1)


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


def test_a_full_disk_is_said_where_a_checkpoint_or_a_log_cannot_be_written(tmp_path, model, text, monkeypatch, capsys):
    failure = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")  # what PyTorch says

    def save(*given, **more):
        raise CheckpointException("save", {0: (failure, StackSummary())})

    monkeypatch.setattr(state.dcp, "save", save)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(
        UserError, match=r"step_00000001\.tmp: cannot write .*the disk is full, 0\.0 MB are left and the"
    ):
        train(model, text, tmp_path / "output", max_steps=1)

    capsys.readouterr()
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("a defect")):
        thread = threading.Thread(target=lambda error=error: (_ for _ in ()).throw(error))
        thread.start()  # as TensorBoard's dies, whose error comes back in ours
        thread.join()
    told = capsys.readouterr().err
    assert "a defect" in told and "No space" not in told


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


@pytest.mark.parametrize("entry", [{"validation": 1.0}, {"validation": "x"}, {"split": "test"}])
def test_a_wrong_share_for_validation_is_refused(tmp_path, entry):
    record = write_record(tmp_path / "a", text_samples(4))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"META": [{"path": str(record), **entry}]}))
    with pytest.raises(UserError, match=r"META entry 0: (validation is a share|split is validation)"):
        read_data_config(tmp_path / "data.yaml")


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
