"""Checkpoints of a training run: everything that resuming needs, in plain tensors, numbers and JSON text."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vision_tokenizer.fitting.config import FREE_ON_RESUME, RunSettings, flatten
from vision_tokenizer.fitting.update import Updater
from vistoken.errors import UserError
from vistoken.jobs.files import atomic_write


def save(folder: Path, fit: Updater, settings: RunSettings, extra: Mapping[str, Any]) -> Path:
    """Write `{step:07d}.pt`, then delete all but the newest `keep_checkpoints`."""
    state: dict[str, Any] = {
        "model": fit.network.model.state_dict(),
        "steps": fit.step,
        "args": json.dumps(asdict(settings)),
        "optimizer": fit.sides[0].optimizer.state_dict(),
        "scaler": fit.sides[0].scaler.state_dict(),
        "lecam": fit.lecam.state_dict(),
        **extra,
    }
    if fit.ema is not None:
        state["ema"] = fit.ema.state(fit.network.model)
    if fit.discriminator is not None:
        state["discriminator"] = fit.discriminator.state_dict()
        state["optimizer_disc"] = fit.sides[1].optimizer.state_dict()
        state["scaler_disc"] = fit.sides[1].scaler.state_dict()
    path = folder / f"{fit.step:07d}.pt"
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer hides the full disk behind it
            raise OSError(f"torch could not write: {error}") from error
    for old in checkpoints(folder)[: -settings.keep_checkpoints]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("*.pt") if path.stem.isdigit()) if folder.is_dir() else []


def resume(path: Path, fit: Updater, settings: RunSettings) -> Mapping[str, Any]:
    """Put `fit` where the checkpoint was written. Raises `UserError`, also where a setting differs."""
    try:
        state = torch.load(path, map_location=fit.device, weights_only=True)
        before = json.loads(state["args"])
        steps = int(state["steps"])
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, pickle.UnpicklingError) as error:
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"
        raise UserError(
            f"{path}: damaged, or no checkpoint of this command ({why}). Remove it to go on from the one before; for "
            "weights alone, use --init_from="
        ) from error
    require_same(path, before, settings)
    fit.network.model.load_state_dict(state["model"])
    fit.sides[0].optimizer.load_state_dict(state["optimizer"])
    fit.sides[0].scaler.load_state_dict(state["scaler"])
    fit.lecam.load_state_dict(state["lecam"])
    if fit.ema is not None:
        fit.ema.means = {name: state["ema"][name] for name in fit.ema.trained}
    if fit.discriminator is not None:
        fit.discriminator.load_state_dict(state["discriminator"])
        fit.sides[1].optimizer.load_state_dict(state["optimizer_disc"])
        fit.sides[1].scaler.load_state_dict(state["scaler_disc"])
    fit.step = steps
    return state


def require_same(path: Path, before: dict[str, Any], settings: RunSettings) -> None:
    """Settings that decide the curve must be those of the checkpoint."""
    was: dict[str, Any] = {}
    for key, value in before.items():
        was |= {f"{key}.{k}": v for k, v in value.items()} if key in ("vq_loss", "data_args") else {key: value}
    now = json.loads(json.dumps(flatten(settings)))
    differ = [key for key in now if key not in FREE_ON_RESUME and now[key] != was.get(key)]
    if differ:
        lines = "".join(f"\n  {key}: {was.get(key)!r} there, {now[key]!r} now" for key in differ[:5])
        raise UserError(
            f"{path} was written with other settings:{lines}\n"
            "Give the same ones, or another --results_dir (with --init_from= to start from these weights)."
        )
