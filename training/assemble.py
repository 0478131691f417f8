"""From a configuration to its model, optimizer and data, each checked as far as the CPU can."""

import hashlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from pre_tokenize.formats import load_format
from pre_tokenize.record import Record
from pre_tokenize.text import TextTokenizer, tokenizer_file
from pre_tokenize.token_file import CheckedFiles, TokenFiles
from training.config import ALWAYS_FROZEN, TrainConfig
from training.data.index import fingerprint, open_indexed
from training.data.loading import Batches, ImageReader, SampleRules, check_manifest, split_record
from training.data.sampler import OpenSource, Sampler, Source
from training.models.folder import ModelFolder, open_unitoken
from training.models.unitoken import UniToken
from training.models.units import LayeredModel, recompute
from training.parallel import patient
from vision_tokenizer.models.chameleon.vocabulary import MARK_NAMES, RELEASED_IMAGE_IDS, RELEASED_MARKS
from vistoken.errors import UserError
from vistoken.store import Url
from vistoken.weights import load_strict

Result = TypeVar("Result")

INDEX = "index"  # in a run's output: what it keeps of its records


def open_model(config: TrainConfig, *, resumed: bool = False) -> tuple[LayeredModel, ModelFolder]:
    """The model on the CPU, its weights mapped from their files and its frozen parts frozen, and the folder it comes
    from. With `resumed`, a checkpoint will fill them. Raises `UserError` where the weights do not fit.
    """
    model: LayeredModel
    if config.variant == "lm":
        from training.models.causal_lm import open_causal_lm

        model, folder = open_causal_lm(config, drawn=not resumed)
    else:
        folder = opened = open_unitoken(Path(config.init_from), Path(config.vit_from), config.seed)
        with torch.device("meta"):
            model = UniToken(
                opened.llm,
                opened.vision,
                z_weight=config.z_loss_weight,
                masked=masked_words(config),
                dropout=config.dropout,
            )
        load_strict(model, folder.tensors, source=folder.path)
    freeze(model, config.trainable_params)
    if config.checkpointing:
        for unit in model.units():
            recompute(unit, selective=config.selective_checkpointing)
    return model, folder


def masked_words(config: TrainConfig) -> range | None:
    """Image tokens, where they are neither to be learned nor another vocabulary's."""
    return None if config.unmask_image_logits or config.variant == "lm" else RELEASED_IMAGE_IDS


def freeze(model: nn.Module, trainable: str) -> None:
    """Train the tensors whose name contains a part of `trainable`, but never those of ALWAYS_FROZEN."""
    wanted = [part.strip() for part in trainable.split(",") if part.strip()] or [""]
    names = [name for name, _ in model.named_parameters()]
    for part in wanted:
        if not any(part in name for name in names):
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise UserError(f"--trainable_params: no tensor's name contains {part!r}; the model's parts are {known}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in wanted) and not name.startswith(ALWAYS_FROZEN))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--trainable_params {trainable}: these are always frozen, so nothing would be trained")


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> AdamW:
    """AdamW over what is trained; the tower's tensors get their own share of the learning rate."""
    tower: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (tower if name.startswith("vit.") else rest).append(parameter)
    groups = [{"params": tower, "lr_scale": config.vit_lr_scale}, {"params": rest, "lr_scale": 1.0}]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=config.wd,
        fused=device.type == "cuda",
    )


@dataclass(frozen=True)
class Data:
    """The samples of a run and their order."""

    dataset: Batches
    sampler: Sampler
    identity: list  # of each record: fingerprint, ratio, type, and the share held out if there is one
    validation: Batches | None = None  # what is held out


def open_data(config: TrainConfig, sources: list[Source], folder: ModelFolder, step_size: int, local_rank: int) -> Data:
    """Raises `UserError` for a damaged or empty record, tokens of another model, or too few samples for a step."""
    own = Path(config.output_dir) / INDEX
    cache = Path(config.token_cache) if config.token_cache else None
    digests = on_rank_0(lambda: [fingerprint(source.path) for source in sources])
    records, checked = open_records(config, sources, digests, local_rank)
    parts = [split_record(record, source.validation) for record, source in zip(records, sources, strict=True)]
    identity = [
        [digest, source.ratio, source.type, *([source.validation] if source.validation else [])]
        for digest, source in zip(digests, sources, strict=True)
    ]
    opened = list(zip(sources, parts, checked, strict=True))
    held_out = [TokenFiles(held, source.image_dir, marks, cache) for source, (_, held), marks in opened if held]
    opened = [one for one in opened if one[0].validation < 1]
    if not opened:
        raise UserError(f"{config.data_config}: all records are for validation, so there is nothing to train on")
    reader = None
    if folder.vision:
        reader = ImageReader(folder.vision.image_size, folder.vision.grid, config.variant == "anyres", own / "members")
        for source, (record, _), _ in opened:
            if config.batch_tokens and (unknown := np.count_nonzero(record.image_counts < 0)):
                raise UserError(
                    f"{source.path}: it lacks the image sizes of {unknown:,} samples, so --batch_tokens cannot count "
                    "their continuous tokens. Run concat_record.py again with --image_sizes, or give --batch_size."
                )
    drawn_from = [
        OpenSource(
            **vars(source), lengths=record.lengths, continuous=partial(reader.tokens, record) if reader else None
        )
        for source, (record, _), _ in opened
    ]
    sampler = Sampler(drawn_from, step_size, config.seed)
    check_steps(sampler, config)
    files = [TokenFiles(record, source.image_dir, marks, cache) for source, (record, _), marks in opened]
    vocabulary = check_tokenizer(folder.tokenizer, chameleon=config.variant != "lm")
    for one in (*files, *held_out):
        if isinstance(one.record.file(0), Url) and not cache:
            raise UserError(
                f"{one.record.path}: its token files lie in a store, and are read in random order. Say with "
                "--token_cache which local folder may keep copies of them: each is fetched once."
            )
        check_manifest(one.manifest(), one.record.path, vocabulary, folder.llm.vocab_size)
    format = None
    if config.condition_dropout:
        kind = "dualvitok" if config.variant == "lm" else "chameleon"
        format = load_format({"image_tokenizer": {"name": kind}}, TextTokenizer(folder.tokenizer))
    rules = SampleRules(folder.llm.vocab_size, config.max_seq_len, masked_words(config), reader, format)
    return Data(Batches(files, rules), sampler, identity, Batches(held_out, rules) if held_out else None)


def open_records(
    config: TrainConfig, sources: Sequence[Source], digests: Sequence[str], local_rank: int
) -> tuple[list[Record], list[CheckedFiles]]:
    """The records, mapped from indexes that one process of each node writes, and which of their files are checked."""
    own, paths = Path(config.output_dir) / INDEX, [source.path for source in sources]
    # an index replaces those of former records of its name: records of different folders must not share one
    folders = [own / hashlib.sha256(str(path).encode()).hexdigest()[:8] for path in paths]
    beside = [path.parent if config.cache_ann_on_disk and isinstance(path, Path) else None for path in paths]
    parents = [given or folder for given, folder in zip(beside, folders, strict=True)]

    def opened() -> list[Record]:
        given = zip(paths, digests, parents, strict=True)
        return [open_indexed(path, digest, parent) for path, digest, parent in given]

    checked = [CheckedFiles(own / f"checked-{socket.gethostname()}-{number}") for number in range(len(sources))]
    with patient() as group:
        if local_rank == 0:
            for marks, record in zip(checked, opened(), strict=True):
                marks.begin(record.files)
        dist.barrier(group)
    return opened(), checked


def check_steps(sampler: Sampler, config: TrainConfig) -> None:
    """Raises `UserError` for a record, or a type, that would never be used."""
    for source in sampler.sources:
        if not source.drawn:
            raise UserError(f"{config.data_config}: ratio {source.ratio:g} of {source.path} draws no sample at all")
    for kind, steps in zip(sampler.types, sampler.type_steps, strict=True):
        if not steps:
            drawn = sum(source.drawn for source in sampler.sources if source.type == kind)
            raise UserError(
                f"{config.data_config}: {drawn} samples of type {kind!r} are too few for one step of "
                f"{sampler.step_size}, so they would never be used. Draw more of them, lower the global batch, or give "
                "them another's type."
            )


def on_rank_0(action: Callable[[], Result]) -> Result:
    """What `action` gives on rank 0, on every rank; its `UserError` is raised on every rank, too."""
    box: list = [None]
    with patient() as group:
        if dist.get_rank() == 0:
            try:
                box = [action()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, group=group)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def check_tokenizer(folder: Path, *, chameleon: bool) -> str | None:
    """The fingerprint of a model folder's vocabulary, if it has a tokenizer file. Special ids must be `chameleon`'s."""
    if not tokenizer_file(folder):
        return None
    tokenizer = TextTokenizer(folder)
    for name, expected in zip(MARK_NAMES, RELEASED_MARKS, strict=True) if chameleon else ():
        if tokenizer.ids.get(name) != expected:
            raise UserError(
                f"{tokenizer.path}: {name} has id {tokenizer.ids.get(name)}, not {expected}; this model's tokenizer is "
                "not Chameleon's"
            )
    return tokenizer.vocabulary
