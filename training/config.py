"""What a run is made of: defaults of its stage, then a YAML file, then flags, each overriding the one before."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vistoken.cli import command_parser
from vistoken.errors import UserError
from vistoken.files import read_yaml

STAGES: dict[str, dict[str, Any]] = {
    "I": {"trainable_params": "vit,adapter", "lr": 1e-3, "vit_lr_scale": 1e-2},
    "II": {"trainable_params": "vit,adapter,model,lm_head", "lr": 1e-5, "vit_lr_scale": 1.0},
}
ALWAYS_FROZEN = ("vit.embeddings.patch_embedding", "vit.embeddings.position_embedding", "vit.head")
LANGUAGE_MODEL: dict[str, Any] = {"trainable_params": "", "vit_lr_scale": 1.0, "dropout": 0.0}  # in either stage
CONFIG_FILE = "config.yaml"
BATCH_SIZE = 4  # samples a process takes at a time, if global_batch_size gives it as many


def option(
    default: Any, text: str, *, choices: Sequence[str] = (), low: float | None = None, above: float | None = None
) -> Any:  # as dataclasses.field itself
    """A field with its help; numbers must be at least `low`, or greater than `above`."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "above": above})


@dataclass(frozen=True)
class TrainConfig:
    # what and where
    init_from: str = option(
        "", "model folder to start from: config.json, weights, tokenizer; or a finished run's output"
    )
    vit_from: str = option("ckpts/SigLIP", "SigLIP folder, read when init_from holds no vision tower")
    tokenizer_from: str = option("", "with variant lm: folder of an extended tokenizer; embeddings grow to fit it")
    data_config: str = option("", "YAML file with META: a list of path, ratio, type, image_dir")
    output_dir: str = option("", "checkpoints, logs and the final model; running again with the same one goes on")
    stage: str = option("II", "defaults for trainable_params, lr and vit_lr_scale", choices=("I", "II"))
    variant: str = option(
        "base",
        "images as one view, as views and tiles, or no images: any transformers language model",
        choices=("base", "anyres", "lm"),
    )
    # optimisation
    trainable_params: str = option(
        "", "train tensors whose name contains one of these, separated by commas; empty: all"
    )
    lr: float = option(0.0, "peak learning rate", above=0)
    vit_lr_scale: float = option(0.0, "the vision tower's share of the learning rate", low=0)
    min_lr: float = option(0.0, "learning rate at the end", low=0)
    wd: float = option(0.1, "weight decay", low=0)
    clip_grad: float = option(4.0, "largest norm of the gradient", above=0)
    epochs: int = option(1, "passes over the data; also the length of the learning-rate schedule", low=1)
    warmup_epochs: float = option(0.01, "share of an epoch over which the learning rate rises", low=0)
    batch_size: int | None = option(
        None, f"samples a process takes at a time; default: {BATCH_SIZE}, or fewer if that is its share", low=1
    )
    batch_tokens: int | None = option(
        None,
        "instead of batch_size and accum_iter: tokens a process takes at a time, continuous ones included; a step of "
        "global_batch_size samples becomes as many batches as that takes",
        low=1,
    )
    accum_iter: int | None = option(
        None, "batches per optimizer step; default: what global_batch_size needs, or 1", low=1
    )
    global_batch_size: int | None = option(None, "samples per optimizer step over all processes", low=1)
    dropout: float = option(0.05, "of attention and MLP outputs in the language model", low=0)
    z_loss_weight: float = option(1e-5, "weight of the squared log-partition", low=0)
    unmask_image_logits: bool = option(False, "let image tokens compete; needed to learn to generate images")
    max_seq_len: int = option(4096, "cut discrete tokens here; continuous ones come on top", low=2)
    max_steps: int | None = option(None, "stop after so many optimizer steps, the schedule staying as it is", low=1)
    condition_dropout: float = option(
        0.0, "share of samples whose image is learned without its prompt, which guidance compares with", low=0
    )
    seed: int = option(0, "of the data order, dropout and a fresh adapter", low=0)
    # how it runs
    precision: str = option("bf16", "of computation; master weights are fp32", choices=("bf16", "fp16", "tf32", "fp32"))
    data_parallel: str = option("fsdp", "shard weights throughout, or gather once a batch", choices=("fsdp", "sdp"))
    shard_over: int | None = option(
        None, "processes that share one copy of the model, such as those of a node; default: all", low=1
    )
    whole_gradients: str = option(
        "auto",
        "with several batches a step: keep whole gradients until the last one, which sends less between processes and "
        "takes 4 bytes a trained weight; auto: if they fit",
        choices=("auto", "yes", "no"),
    )
    checkpointing: bool = option(False, "recompute activations in the backward pass instead of storing them")
    selective_checkpointing: bool = option(
        False, "with checkpointing, keep the results of attention and of every second matrix product"
    )
    compile: bool = option(False, "compile each layer")
    num_workers: int = option(4, "data-loader processes", low=0)
    cache_ann_on_disk: bool = option(False, "keep the records' indexes beside them, for other runs, not in output_dir")
    token_cache: str = option(
        "", "local folder for copies of token files that lie in a store: each node fetches each file once"
    )
    max_failed: float = option(0.01, "stop when a greater share of samples had to be replaced", low=0)
    # checkpoints and logs
    save_iteration_interval: int = option(1000, "iterations (batches of a process) between checkpoints", low=1)
    async_save: bool = option(
        False, "write checkpoints beside the training, from a copy in main memory that all processes share out"
    )
    ckpt_max_keep: int = option(2, "newest checkpoints kept", low=1)
    auto_resume: bool = option(True, "go on from the newest checkpoint in output_dir")
    resume_path: str = option("", "go on from this checkpoint")
    eval_interval: int = option(500, "steps between losses of what the data config holds out for validation", low=1)
    prompt_sheet: str = option("", "JSON lines, a prompt each, that are answered at every checkpoint, into samples/")
    tokenizer_dir: str = option("", "for the sheet: Chameleon's vqgan.yaml and vqgan.ckpt")
    model_config: str = option("", "for the sheet of a language model: DualViTok's .py config (code: it is run)")
    tokenizer_checkpoint: str = option("", "for the sheet of a language model: DualViTok's weights")
    log_interval: int = option(10, "steps between log lines; metrics.jsonl has every step", low=1)

    def __post_init__(self) -> None:
        for name in ("init_from", "data_config", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: {_FIELDS[name].metadata['help']}")
        for one in _FIELDS.values():
            _check(one, getattr(self, one.name))
        if self.dropout >= 1:
            raise UserError(f"--dropout must be below 1, found {self.dropout}")
        if self.variant == "lm" and self.dropout:
            raise UserError(f"--dropout {self.dropout}: a --variant lm model has its dropout in its own config.json")
        if self.variant != "lm" and self.tokenizer_from:
            raise UserError("--tokenizer_from goes with --variant lm; the tokenizer is in --init_from")
        if self.condition_dropout > 1:
            raise UserError(f"--condition_dropout is a share from 0 to 1, found {self.condition_dropout}")
        if self.batch_tokens and (self.batch_size or self.accum_iter or not self.global_batch_size):
            raise UserError("--batch_tokens goes with --global_batch_size, without --batch_size and --accum_iter")
        if self.prompt_sheet and self.variant != "lm" and not self.tokenizer_dir:
            raise UserError("--prompt_sheet needs --tokenizer_dir, a folder of Chameleon's vqgan.yaml and vqgan.ckpt")
        if bool(self.model_config) != bool(self.tokenizer_checkpoint):
            raise UserError("--model_config and --tokenizer_checkpoint belong together")
        if self.selective_checkpointing and not self.checkpointing:
            raise UserError("--selective_checkpointing goes with --checkpointing")
        if self.min_lr > self.lr:
            raise UserError(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup_epochs {self.warmup_epochs} must be below --epochs {self.epochs}")

    def shares(self, world: int) -> tuple[int, int]:
        """Samples of a batch, and batches per optimizer step, of each of `world` processes.

        With `batch_tokens`, which make the batches of each step anew, all its samples are one.
        """
        if world % (self.shard_over or world):
            raise UserError(f"--shard_over {self.shard_over} does not divide the {world} processes")
        total, at_once, batches = self.global_batch_size, self.batch_size, self.accum_iter
        if total is None:
            return at_once or BATCH_SIZE, batches or 1
        if self.batch_tokens:
            batches = 1
        if at_once is None:
            share = total // (world * (batches or 1))
            at_once = share if batches else max(n for n in range(1, BATCH_SIZE + 1) if share % n == 0)
        batches = batches or max(total // (at_once * world), 1)
        if at_once * world * batches != total:
            given = f" x {self.accum_iter} (accum_iter)" if self.accum_iter else ""
            raise UserError(
                f"--global_batch_size {total} cannot be made of {self.batch_size or 'any number'} (batch_size) x "
                f"{world} (processes){given}. Change one of them, or leave --batch_size and --accum_iter out."
            )
        return at_once, batches

    def told(self) -> dict[str, Any]:
        """What a trained model's config.json tells of its training: generation goes by it."""
        return {name: getattr(self, name) for name in ("variant", "max_seq_len", "condition_dropout")}

    def dump(self, path: Path) -> None:
        """Write a file that `--config` reads."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


_FIELDS = {one.name: one for one in dataclasses.fields(TrainConfig)}
_TYPES = typing.get_type_hints(TrainConfig)


def _kinds(name: str) -> tuple[type, ...]:
    return typing.get_args(_TYPES[name]) or (_TYPES[name],)


def _check(one: dataclasses.Field, value: Any) -> None:
    """Type and range of a value, wherever it came from."""
    kinds = _kinds(one.name)
    right = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    if not right and not (float in kinds and type(value) is int):
        raise UserError(f"--{one.name}: expected {' or '.join(k.__name__ for k in kinds)}, found {value!r}")
    if one.metadata["choices"] and value not in one.metadata["choices"]:
        raise UserError(f"--{one.name}: {value!r} is none of {', '.join(one.metadata['choices'])}")
    low, above = one.metadata["low"], one.metadata["above"]
    if value is None or (low is None and above is None):
        return
    if not (value >= low if above is None else value > above) or not value < 2**63:  # what seeds and counts can hold
        lowest = f"at least {low}" if above is None else f"above {above}"
        raise UserError(f"--{one.name} must be {lowest} and below 2^63, found {value}")


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = command_parser(description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config", type=Path, help=f"YAML file of any of the flags below, such as a run's {CONFIG_FILE}"
    )
    for one in _FIELDS.values():
        kinds = _kinds(one.name)
        default = "the stage's" if one.name in STAGES["I"] else one.default
        text = one.metadata["help"] + ("" if default in (None, "", False) else f" (default: {default})")
        if kinds == (bool,):
            parser.add_argument(f"--{one.name}", action="store_true", help=text)
        else:
            parser.add_argument(f"--{one.name}", type=kinds[0], choices=one.metadata["choices"] or None, help=text)
    parser.add_argument("--no_auto_resume", dest="auto_resume", action="store_false", help="start anew")
    return parser


def resolve(arguments: dict[str, Any]) -> TrainConfig:
    """Parsed flags -> the whole configuration. Raises `UserError` naming the field that is wrong."""
    flags, from_file = dict(arguments), {}
    if path := flags.pop("config", None):
        from_file = read_yaml(path, "configuration")
        if not isinstance(from_file, dict):
            raise UserError(f"{path}: expected fields such as `lr: 1.0e-5`, found {type(from_file).__name__}")
        if unknown := [name for name in from_file if name not in _FIELDS]:
            raise UserError(f"{path}: unknown field {unknown[0]!r}; the fields are {', '.join(_FIELDS)}")
        for name, value in from_file.items():
            try:
                if float in _kinds(name) and isinstance(value, str):  # to YAML 1e-4, without a point, is a text
                    with suppress(ValueError):
                        from_file[name] = float(value)
                _check(_FIELDS[name], from_file[name])
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
    chosen = from_file | flags
    stage = chosen.get("stage", _FIELDS["stage"].default)
    variant = LANGUAGE_MODEL if chosen.get("variant") == "lm" else {}
    defaults = STAGES[stage] if isinstance(stage, str) and stage in STAGES else {}
    return TrainConfig(**(defaults | variant | chosen))
