"""The scripts in exps/ and the commands around the trainer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_small import golden_samples, text_samples, train, write_data_config, write_model, write_record
from unitoken_small import GOLDEN

from training import export_checkpoint
from training import train as train_command
from training.config import build_parser, resolve
from vistoken.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.name for path in (ROOT / "exps").glob("UniToken-*.sh"))


def recipe_arguments(tmp_path, name, arguments=(), **environment):
    """What a script gives to torchrun: how CUDA allocates, its own flags; the trainer's flags."""
    fake = tmp_path / "bin" / "torchrun"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTORCH_CUDA_ALLOC_CONF" "$@"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "exps" / name, *arguments],
        env={**os.environ, "PATH": path, "NPROC_PER_NODE": "2", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    given = done.stdout.splitlines()
    split = given.index("training/train.py")
    return given[:split], given[split + 1 :]


def test_there_are_the_documents_four_scripts():
    assert [f"UniToken-{kind}-stage{stage}.sh" for kind in ("AnyRes", "base") for stage in (1, 2)] == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_stage(tmp_path, name):
    launcher, arguments = recipe_arguments(tmp_path, name)
    config = resolve(vars(build_parser("").parse_args(arguments)))
    stage = "I" if "stage1" in name else "II"
    assert (config.stage, config.variant) == (stage, "anyres" if "AnyRes" in name else "base")
    assert (config.lr, config.vit_lr_scale) == ((1e-3, 1e-2) if stage == "I" else (1e-5, 1))
    assert config.trainable_params == ("vit,adapter" if stage == "I" else "vit,adapter,model,lm_head")
    assert (config.wd, config.clip_grad, config.warmup_epochs, config.dropout) == (0.1, 4, 0.01, 0.05)
    assert (config.global_batch_size, config.max_seq_len, config.z_loss_weight) == (128, 4096, 1e-5)
    assert config.checkpointing and config.unmask_image_logits and config.precision == "bf16"
    assert config.output_dir == f"output/{name.removesuffix('.sh')}"
    assert launcher[0] == "expandable_segments:True" and launcher[launcher.index("--nnodes") + 1] == "1"
    assert config.cache_ann_on_disk and config.num_workers == 8


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("name", [*RECIPES, "ILLUME-lm.sh"])
def test_a_recipe_fits_every_number_of_processes(tmp_path, name, world):
    """From one process to sixteen nodes of eight, without another setting."""
    _, arguments = recipe_arguments(tmp_path, name)
    samples, batches = resolve(vars(build_parser("").parse_args(arguments))).shares(world)
    assert samples * batches * world == 128 and samples == min(4, 128 // world)


@pytest.mark.parametrize(
    ("given", "world", "shares"),
    [
        ({}, 8, (4, 1)),
        ({"batch_size": 2, "accum_iter": 3}, 8, (2, 3)),
        ({"global_batch_size": 24}, 8, (3, 1)),
        ({"global_batch_size": 40}, 8, (1, 5)),
        ({"global_batch_size": 128, "accum_iter": 4}, 8, (4, 4)),
        ({"global_batch_size": 128, "batch_size": 8}, 4, (8, 4)),
        ({"global_batch_size": 128, "batch_tokens": 16384}, 8, (16, 1)),
        ({"global_batch_size": 128, "batch_tokens": 16384}, 48, None),
        ({"global_batch_size": 128, "batch_size": 4}, 64, None),
        ({"global_batch_size": 128}, 48, None),
        ({"global_batch_size": 4}, 8, None),
    ],
)
def test_a_step_is_shared_out_or_refused(given, world, shares):
    config = resolve({"init_from": "a", "data_config": "b", "output_dir": "c", **given})
    if shares:
        assert config.shares(world) == shares
    else:
        with pytest.raises(UserError, match=f"--global_batch_size .* x {world} \\(processes\\)"):
            config.shares(world)


@pytest.mark.parametrize("given", [{}, {"global_batch_size": 8, "batch_size": 2}, {"accum_iter": 2}])
def test_a_budget_of_tokens_takes_the_place_of_the_batch_size(given):
    with pytest.raises(UserError, match="--batch_tokens goes with --global_batch_size, without --batch_size"):
        resolve({"init_from": "a", "data_config": "b", "output_dir": "c", "batch_tokens": 100, **given})


def test_the_language_model_recipe(tmp_path):
    _, arguments = recipe_arguments(tmp_path, "ILLUME-lm.sh")
    config = resolve(vars(build_parser("").parse_args(arguments)))
    assert (config.variant, config.trainable_params, config.lr, config.dropout) == ("lm", "", 1e-5, 0)


def test_a_recipe_takes_the_environment_and_flags(tmp_path):
    launcher, arguments = recipe_arguments(
        tmp_path, "UniToken-base-stage2.sh", ["--max_steps", "3"], NNODES="2", ACCUM_ITER="4", INIT_FROM="a b"
    )
    config = resolve(vars(build_parser("").parse_args(arguments)))
    assert (config.accum_iter, config.max_steps, config.init_from) == (4, 3, "a b")
    assert launcher[launcher.index("--nnodes") + 1] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RECIPES, "ILLUME-lm.sh"])
def test_a_recipe_without_a_gpu_says_how_to_do_without(tmp_path, name):
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "exps" / name], env={**os.environ, **environment}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"NPROC_PER_NODE=1 PRECISION=fp32 bash {ROOT / 'exps' / name}" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs/data").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_data_configs_are_well_formed(path, tmp_path):
    """Their records are examples; with records in place they are read."""
    from training.data.loading import read_data_config

    content = yaml.safe_load(path.read_text())
    for entry in content["META"]:
        record = tmp_path / "a" / "b" / entry["path"]
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("")
    copy = tmp_path / "a" / "b" / path.name
    copy.write_text(path.read_text())
    assert len(read_data_config(copy)) == len(content["META"])


@pytest.mark.slow
def test_smoke_train(tmp_path):
    record = write_record(tmp_path / "tokens", golden_samples(("caption", "text")))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RECORD": str(record),
        "TOKENIZER": str(GOLDEN / "chameleon_small"),
        "OUTPUT": str(tmp_path / "output"),
        "STEPS": "2",
        "NPROC_PER_NODE": "1",
    }
    done = subprocess.run(
        ["bash", ROOT / "exps" / "smoke-train.sh"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "output" / "stage2" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_exported_checkpoint_is_the_model_it_holds_and_no_gpu_is_taken(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", text_samples(8)))
    train(model, data, tmp_path / "output", epochs=1)
    (checkpoint,) = (tmp_path / "output" / "checkpoints").iterdir()
    assert export_checkpoint.main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "exported")]) == 0
    final, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("output/final", "exported"))
    assert final.keys() == exported.keys() and all(torch.equal(final[name], exported[name]) for name in final)
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("output/final", "exported")]
    assert files[0] == files[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that must not be touched
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail(f"took {device}"))
    with pytest.raises(UserError, match="not a complete checkpoint"):
        export_checkpoint.export(tmp_path / "output", tmp_path / "other")
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    export_checkpoint.export(copied, tmp_path / "exported_too")
    (copied / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match="copied: cannot read this checkpoint"):
        export_checkpoint.export(copied, tmp_path / "other")


@pytest.mark.parametrize("command", ["train", "export_checkpoint", "toy_model"])
def test_help_starts_without_torch(command):
    code = f"""
import sys
import training.{command} as command
try:
    command.main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--output_dir" in done.stdout


@pytest.mark.slow
def test_a_mistake_ends_the_command_with_a_message_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, train_command.__file__, "--init_from", "nowhere", "--data_config", "x", "--output_dir", "y"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: x: cannot read this data config")
