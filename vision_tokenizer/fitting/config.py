"""The settings of a training run: a released `.py` config, and `--key.sub=value` on top of it.

A config is Python and is executed. Keys that the published trainer reads are read here, keys that it carries along
unread are named in a note, anything else is refused by name.
"""

import ast
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vision_tokenizer.models.dualvitok.config import run_config
from vistoken.errors import UserError


@dataclass(frozen=True)
class DataSettings:
    """Where pictures come from and what becomes of them; `data_args` in a config."""

    dataset: str = "folder"  # "imagenet" is a folder of folders; both are read alike
    data_path: str = ""
    size_list: str = ""  # JSON: [{"image": path below data_path, "width": w, "height": h}, ...]
    data_config: str = ""  # a metadata config as codebook inference takes it; instead of data_path
    augment: str = "dualvitok_fix_resolution_train"
    resolution: int = 256
    min_pixels: int = 32 * 32
    max_pixels: int = 512 * 512
    crop_share: tuple[float, float] = (0.2, 0.7)  # of the shorter side, for augment="random_crop"
    cache: bool = False  # keep decoded pictures in memory
    max_failed: float = 0.01  # share of unreadable pictures beyond which the run stops
    per_proc_batch_size: int = 8  # of evaluation


AUGMENTS = (
    "dualvitok_fix_resolution_train",
    "dualvitok_fix_resolution_val",
    "dualvitok_anyres_resolution_train",
    "random_crop",
)


@dataclass(frozen=True)
class LossSettings:
    """`vq_loss` in a config."""

    reconstruction_loss: str = "l2"  # or "l1"
    reconstruction_weight: float = 1.0
    l1_weight: float = 0.0  # of an absolute difference beside the squared one; the released settings have none
    perceptual_weight: float = 1.0
    codebook_weight: float = 1.0
    codebook_enlarge_ratio: float = 0.0
    codebook_enlarge_steps: int = 2000
    semantic_weight: float = 1.0
    semantic_codebook_weight: float = 1.0
    semantic_reconstruction_weight: float = 1.0
    semantic_reconstruction: str = "cos"  # or "l1"
    disc_start: int = 20000  # the first update, counted from 1, in which the discriminator matters
    disc_weight: float = 0.5
    disc_adaptive_weight: bool = False
    disc_loss: str = "hinge"
    gen_adv_loss: str = "hinge"
    disc_type: str = "patchgan"
    disc_dim: int = 64
    disc_num_layers: int = 3
    lecam_loss_weight: float | None = None

    def adversarial_weight(self, step: int) -> float:
        """Steps count from 1."""
        return self.disc_weight if step >= self.disc_start else 0.0


@dataclass(frozen=True)
class RunSettings:
    """Top-level names of a config, and our own beside them."""

    vq_model: dict = field(default_factory=dict)
    vq_loss: LossSettings = LossSettings()
    data_args: DataSettings = DataSettings()
    results_dir: str = "output/tokenizer_training"
    device: str = "auto"
    global_seed: int = 1
    global_batch_size: int = 256  # of an update, over all ranks and accumulated micro-batches
    gradient_accumulation_steps: int = 1
    epochs: int = 21
    max_steps: int | None = None  # updates; instead of `epochs`
    num_workers: int = 8
    # optimizer
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0  # 0: no clipping
    lr_decay_style: str = "constant"
    lr_decay_ratio: float = 0.1
    warmup: float = 0.0  # share of all updates
    code_transform_lr_scale: float = 1.0
    mixed_precision: str = "bf16"
    ema: bool = False
    ema_decay: float = 0.9999
    compile: bool = False
    # where weights come from
    init_from: str | None = None  # weights alone, from any checkpoint
    init_from_ema: bool = False
    vq_ckpt: str | None = None  # resume this run's checkpoint; by default the newest in results_dir
    vit_checkpoint: str | None = None  # of the frozen ViT; "random" for none
    freeze_encoder: bool = False  # the decoder alone learns: codes stay what they are
    linear_start: bool = False  # a Chameleon VQGAN begins as a linear autoencoder of the pictures
    fit_codebooks: str = "none"  # before the first step: "covariance" or "kmeans"
    perceptual: str = "lpips"  # or "lite0"
    lpips_vgg: str | None = None
    lpips_linear: str | None = None
    # what is told and kept
    log_every: int = 100
    ckpt_every: int = 5000
    keep_checkpoints: int = 2
    eval_path: str | None = None  # held-out pictures, reconstructed at every checkpoint
    eval_side: int = 256

    @property
    def folder(self) -> Path:
        return Path(self.results_dir) / self.vq_model["type"]


CHOICES = {
    "vq_loss.reconstruction_loss": ("l2", "l1"),
    "vq_loss.semantic_reconstruction": ("cos", "l1"),
    "vq_loss.disc_loss": ("hinge",),
    "vq_loss.gen_adv_loss": ("hinge",),
    "vq_loss.disc_type": ("patchgan",),
    "data_args.dataset": ("folder", "imagenet"),
    "data_args.augment": AUGMENTS,
    "lr_decay_style": ("constant", "linear", "cosine"),
    "mixed_precision": ("bf16", "fp16", "none"),
    "fit_codebooks": ("none", "covariance", "kmeans"),
    "perceptual": ("lpips", "lite0"),
}
POSITIVE = (
    "global_batch_size", "gradient_accumulation_steps", "epochs", "max_steps", "lr", "log_every", "ckpt_every",
    "keep_checkpoints", "data_args.resolution", "eval_side", "vq_loss.disc_dim", "vq_loss.disc_num_layers",
)  # fmt: skip
# in released configs, read by nothing there; our data loading does what the last three switch on there
UNREAD = (
    "finetune", "finetune_decoder", "infer_interpolate", "weight_decay", "image_size",
    "use_group_image_resolution", "training_with_anyres", "use_local_data",
)  # fmt: skip
# in vq_model's config, read for training alone; absent from many configs
MODEL_KEYS = (
    "pixel_drop_rate", "pixel_drop_batch_rate", "pixel_noise_type", "rotation_trick", "commitment_weight",
    "input_to_quantize_commit_loss_weight", "vq_ckpt", "use_vq_ckpt_ema",
)  # fmt: skip
# may differ when a run is resumed
FREE_ON_RESUME = (
    "results_dir", "device", "num_workers", "vq_ckpt", "log_every", "ckpt_every", "keep_checkpoints", "eval_path",
    "eval_side", "data_args.cache", "data_args.max_failed",
)  # fmt: skip
_PARTS = {"vq_loss": LossSettings, "data_args": DataSettings}


def read_settings(config: Path, overrides: Sequence[str] = ()) -> tuple[RunSettings, list[str]]:
    """The settings, and the keys that nothing reads. Raises `UserError`, which names file and key."""
    names = dict(run_config(config))
    if "vq_loss" not in names:
        raise UserError(f"{config}: defines no `vq_loss`: it says nothing of how to train")
    for text in overrides:
        _override(names, text)
    unread = [key for key in names if key in UNREAD]
    top = {f.name: f for f in fields(RunSettings)}
    values: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for key, value in names.items():
        if key in _PARTS:
            if not isinstance(value, dict):
                raise UserError(f"{config}: {key}: must be a dict, found {value!r}")
            parts[key] |= {k: v for k, v in value.items() if k not in ("type", "config")} | value.get("config", {})
        elif key in {f.name for f in fields(DataSettings)}:  # the released configs have these at the top
            parts["data_args"].setdefault(key, value)
        elif key in top:
            values[key] = value
        elif key not in UNREAD and not isinstance(value, dict):  # a dict that others are made of
            raise UserError(f"{config}: unknown key {key!r}; {_nearby(key, [*top, *UNREAD])}")
    for part, kind in _PARTS.items():
        values[part] = kind(**{k: _typed(kind, k, v, f"{config}: {part}") for k, v in parts[part].items()})
    values = {k: v if k in _PARTS else _typed(RunSettings, k, v, str(config)) for k, v in values.items()}
    settings = RunSettings(**values)
    _check(settings, config)
    return settings, unread


def _nearby(key: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=3)
    return f"did you mean {', '.join(close)}?" if close else "nothing here would read it"


def _override(names: dict[str, Any], text: str) -> None:
    key, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not equals:
        raise UserError(f"{text}: settings are given as --key=value or --key.sub=value")
    *path, last = key.split(".")
    if last in UNREAD:
        raise UserError(f"{text}: nothing reads {last}, so setting it would change nothing")
    if not path and last in {f.name for f in fields(DataSettings)}:
        path = ["data_args"]
    place = names
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"{text}: {part} is no dict of settings")
    if path and path[0] in _PARTS and "config" in place:
        place = place["config"]
    if path[:1] == ["vq_model"] and last not in (*place, *MODEL_KEYS):
        raise UserError(f"{text}: unknown key {last!r}; {_nearby(last, [*place, *MODEL_KEYS])}")
    try:
        place[last] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        place[last] = value  # a string without quotes


def _typed(kind: type, key: str, value: Any, where: str) -> Any:
    """`value` as the field's type has it. Raises `UserError` for an unknown key or another type."""
    hints = typing.get_type_hints(kind)
    if key not in hints:
        raise UserError(f"{where}: unknown key {key!r}; {_nearby(key, list(hints))}")
    wanted = hints[key]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        base = typing.get_origin(option) or option
        if base is float and type(value) is int:
            return float(value)
        if base is tuple and isinstance(value, (list, tuple)):
            return tuple(float(v) for v in value)
        if type(value) is base:
            return value
    raise UserError(f"{where}: {key}: must be {' or '.join(o.__name__ for o in options)}, found {value!r}")


def _check(settings: RunSettings, config: Path) -> None:
    flat = flatten(settings)
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"{config}: {key}: {flat[key]!r} is not supported, only {', '.join(map(repr, choices))}")
    for key in POSITIVE:
        if flat[key] is not None and flat[key] <= 0:
            raise UserError(f"{config}: {key}: must be above 0, found {flat[key]}")
    if settings.linear_start and (settings.init_from or settings.vq_model.get("type") != "ChameleonVQGAN"):
        raise UserError(f"{config}: linear_start: for a ChameleonVQGAN without init_from; leave one of them out")
    for key in ("data_args.resolution", "eval_side"):
        if flat[key] % 16:
            raise UserError(f"{config}: {key}: must be a multiple of 16, found {flat[key]}")
    data = settings.data_args
    if not 16 * 16 <= data.min_pixels <= data.max_pixels:
        raise UserError(
            f"{config}: data_args: min_pixels {data.min_pixels} must be at least 16 * 16, and max_pixels "
            f"{data.max_pixels} no less"
        )
    if len(data.crop_share) != 2 or not 0 < data.crop_share[0] <= data.crop_share[1] <= 1:
        raise UserError(f"{config}: data_args.crop_share: two shares, the lower first, found {data.crop_share}")


def flatten(settings: RunSettings) -> dict[str, Any]:
    """`part.key` -> value; the model's own config stays one value."""
    flat: dict[str, Any] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.name in _PARTS:
            flat |= {f"{f.name}.{g.name}": getattr(value, g.name) for g in fields(value)}
        else:
            flat[f.name] = value
    return flat
