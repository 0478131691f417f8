"""Model folders: `config.json`, weights and tokenizer files, read into a plan and written in the same layout.

Opening one reads names and shapes only (tensors are memory-mapped), so that what does not fit is refused before any
GPU memory is taken.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from vistoken.errors import UserError
from vistoken.store import Location
from vistoken.weights import read_state_dict

TRAINED_WITH = "vistoken"  # in a config.json: what generation must know of the training
FINAL = "final"  # where a finished run leaves its model, inside its output folder
SHARD_BYTES = 5 * 2**30
SUPPORTED = {
    "swin_norm": False,
    "model_parallel_size": 1,
    "rope_scaling": None,
    "rope_type": "default",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
NOT_MODEL = ("model.vqmodel.",)  # the image tokenizer that releases carry along
Sizes = TypeVar("Sizes", LLMConfig, VisionConfig)


@dataclass(frozen=True)
class ModelFolder:
    """An opened model: everything needed to build, fill and save it."""

    path: Path
    tokenizer: Path  # folder of the tokenizer; the same, but for a language model whose vocabulary grows
    config: dict[str, Any]  # its config.json, completed
    llm: LLMConfig
    vision: VisionConfig | None  # None: a language model alone
    tensors: dict[str, Tensor]  # by name in the model; mapped, not yet read
    origins: dict[str, str]  # part of the model -> where its weights come from

    def companions(self) -> list[Path]:
        """What belongs to the model beside its weights and config.json."""
        files = [file for folder in (self.path, self.tokenizer) for file in sorted(folder.iterdir())]
        files = [file for file in files if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja")]
        own = {file.name for file in files if file.name == "config.json" or file.name.endswith(".index.json")}
        return list({file.name: file for file in files if file.name not in own}.values())


@dataclass(frozen=True)
class UniTokenFolder(ModelFolder):
    """One of a model with a vision tower."""

    vision: VisionConfig


def open_unitoken(init_from: Path, vit_from: Path, seed: int) -> UniTokenFolder:
    """A language model with its tower and adapter; those it lacks come from `vit_from` and from `seed`.

    Raises `UserError` that names what a folder lacks.
    """
    path, config = read_config(init_from)
    settings = {**(config.get("rope_parameters") or {}), **config}  # where transformers 5 keeps those of the positions
    llm = language_sizes(settings, path)
    for name, supported in SUPPORTED.items():
        if settings.get(name, supported) != supported:
            raise UserError(f"{path / 'config.json'}: {name} is {settings[name]}; this trainer supports {supported}")
    tensors = {name: tensor for name, tensor in read_state_dict(path).items() if not name.startswith(NOT_MODEL)}
    origins = dict.fromkeys(("model", "lm_head"), str(path))
    if any(name.startswith("vit.") for name in tensors):
        vision = _sizes(VisionConfig, config.get("vision_config", {}), path)
        origins["vit"] = str(path)
    else:
        try:
            tower_config, tower = read_tower(vit_from)
        except UserError as error:
            raise UserError(f"{path}: holds no vision tower, and so one is read from --vit_from {error}") from error
        config["vision_config"] = tower_config
        vision = _sizes(VisionConfig, tower_config, vit_from)
        tensors |= tower
        origins["vit"] = str(vit_from)
    if any(name.startswith("adapter.") for name in tensors):
        origins["adapter"] = str(path)
    else:
        tensors |= fresh_adapter(vision.hidden_size, llm.hidden_size, seed)
        origins["adapter"] = f"fresh (seed {seed})"
    return UniTokenFolder(path, path, config, llm, vision, tensors, origins)


def read_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that holds the model, which may be `final/` in a training run's output, and its config.json."""
    path = folder / FINAL if (folder / FINAL / "config.json").is_file() else folder
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(_no_model(folder)) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'}: not a model's configuration ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'}: not a model's configuration, but a {type(config).__name__}")
    return path, config


def _no_model(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; a model folder with config.json and weights is needed"
    if (folder / "checkpoints").is_dir():
        return (
            f"{folder}: this training run has not finished, there is no {FINAL}/ in it. "
            "Run its script again to go on, or export a checkpoint: python training/export_checkpoint.py --help"
        )
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    return f"{folder}: no config.json, so this is no model folder; it holds {found}"


def language_sizes(config: dict[str, Any], path: Path) -> LLMConfig:
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if lacking := [name for name in needed if name not in config]:
        raise UserError(f"{path / 'config.json'}: no language model of a known kind, {', '.join(lacking)} missing")
    return _sizes(LLMConfig, {"num_key_value_heads": config["num_attention_heads"]} | config, path)


def _sizes(kind: type[Sizes], config: dict[str, Any], source: Path) -> Sizes:
    known = {name: right for name, right in get_type_hints(kind).items() if name in config}
    for name, right in known.items():
        value = config[name]
        if type(value) not in (int, right) or not 0 < value < 2**31:
            raise UserError(
                f"{source / 'config.json'}: {name} must be a positive number ({right.__name__}), found {value!r}"
            )
    return kind(**{name: config[name] for name in known})


def read_tower(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(vision_config, tensors named `vit.*`) of a SigLIP folder: both halves of it, or the tower alone."""
    path, config = read_config(folder)
    prefix = "vision_model."
    tower = read_state_dict(path, keep=(prefix, "embeddings.", "encoder.", "post_layernorm.", "head."))
    return config.get("vision_config", config), {f"vit.{name.removeprefix(prefix)}": t for name, t in tower.items()}


def fresh_adapter(width: int, hidden_size: int, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {"0": nn.Linear(width, hidden_size), "2": nn.Linear(hidden_size, hidden_size)}
    return {f"adapter.{i}.{name}": p.detach() for i, layer in layers.items() for name, p in layer.named_parameters()}


def save_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    total_bytes: int,
    config: dict[str, Any],
    files: Sequence[Location],
) -> None:
    """Write a model folder, whole or not at all: weights in safetensors shards, and copies of `files`.

    `tensors` are consumed one by one, so that no more than a shard is in memory; `total_bytes` is their sum.
    Raises `UserError` where the disk is full or not writable.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _name_shards(temporary, list(_write_shards(temporary, tensors)), total_bytes)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in files:
            (temporary / file.name).write_bytes(file.read_bytes())
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target}: cannot write the model ({error}). Make room, then run the same command again."
        ) from error


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give shard files their final names, which tell how many there are, and several an index."""
    if len(shards) == 1:
        (folder / "shard-00001.safetensors").replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number:05d}.safetensors").replace(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[str]]:
    """Write shard-0000i.safetensors files; yields the names in each."""
    shard: dict[str, Tensor] = {}
    size, number = 0, 1
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save_file(shard, folder / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})
            yield list(shard)
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    save_file(shard, folder / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})
    yield list(shard)
