"""A run that ended goes on to the same bits: its checkpoints, and what of its settings may have changed."""

import errno
import shutil
import threading
import time
from traceback import StackSummary
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from train_small import (
    TEXT,
    assert_curve,
    flags,
    metrics,
    train,
    train_processes,
    write_model,
    write_texts,
)

from training import state
from vistoken.errors import Preempted, UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "unitoken")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("text"))


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


def test_a_damaged_checkpoint_is_named_and_one_whose_reading_is_stopped_is_not(tmp_path, model, text, monkeypatch):
    train(model, text, tmp_path, **TEXT, max_steps=3)
    for stop, step in ((KeyboardInterrupt(), "read_metadata"), (Preempted("SIGTERM"), "read_data")):
        with monkeypatch.context() as patched, pytest.raises(type(stop)):  # no damage, and nothing to remove
            patched.setattr(FileSystemReader, step, Mock(side_effect=stop))
            train(model, text, tmp_path, **TEXT)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FileSystemWriter, "write_data", Mock(side_effect=KeyboardInterrupt()))
        train(model, text, tmp_path, **TEXT, max_steps=4)
    (data,) = tmp_path.glob("checkpoints/*/*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match="step_00000003: cannot read this checkpoint"):
        train(model, text, tmp_path, **TEXT)


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


def test_a_changed_setting_is_refused_on_resume(tmp_path, model, text):
    train(model, text, tmp_path, **TEXT, max_steps=3)
    for changed in ({"batch_size": 4}, {"seed": 1}, {"variant": "anyres"}):
        with pytest.raises(UserError, match="was trained with"):
            train(model, text, tmp_path, **TEXT | changed)
    with pytest.raises(UserError, match="--no_auto_resume"):
        train(model, text, tmp_path, **TEXT, no_auto_resume=True)


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
