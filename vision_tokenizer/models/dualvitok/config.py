"""The `.py` config of a DualViTok, read into sizes.

A config is Python and is executed: run only those you trust. It defines
`vq_model = dict(type="DualViTok", config=dict(...))`; whatever else it holds (losses, training data) is ignored,
and so are settings of a part that do not matter at inference. A size left out is that of the released model.
"""

import runpy
import types
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from vision_tokenizer.models.dualvitok.semantic import PROJECTIONS, SemanticDecoderSizes, SemanticEncoderSizes
from vision_tokenizer.models.dualvitok.simvq import QuantizerSizes
from vision_tokenizer.models.dualvitok.vit import VitSizes
from vision_tokenizer.models.layers import ConvSizes
from vistoken.cli import note
from vistoken.errors import UserError
from vistoken.store import Location, Url, local_copy, location

# ViTs that a config may name; their weights come with the DualViTok's own checkpoint
NAMED_VITS = {
    "Emova-ollm/qwen2vit600m": VitSizes(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, mlp_ratio=4)
}
# keys of released configs that matter in training only, or repeat others
UNREAD = {
    *("attn_implementation", "channel_first", "codebook_size", "double_z", "dropout", "rotation_trick"),
    *("pixel_drop_batch_rate", "pixel_drop_rate", "pixel_noise_type", "use_vq_ckpt_ema", "vq_ckpt"),
}
LEVELS = 5  # of the pixel branch: one code is 16 x 16 pixels


@dataclass(frozen=True)
class DualViTokSizes:
    semantic_encoder: SemanticEncoderSizes
    semantic_quantizer: QuantizerSizes
    semantic_decoder: SemanticDecoderSizes
    pixel_encoder: ConvSizes
    pixel_quantizer: QuantizerSizes
    pixel_decoder: ConvSizes


MOST, MOST_LAYERS = 1 << 24, 1000  # beyond any model: sizes that memory, or the time to build them, would not bear


class _Part:
    """One dict of a config; its errors name the file and the key."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise UserError(f"{where}: must be a dict, found {values!r}")
        self.values, self.where = values, where

    def known(self, *names: str) -> None:
        """Tell of keys that nothing reads. Raises `UserError` for one that is near to one of `names`, a slip."""
        unread = [str(key) for key in self.values if key not in names and key not in UNREAD]
        for key in unread:
            if near := get_close_matches(key, names, n=1, cutoff=0.75):
                raise UserError(f"{self.where}: unknown key {key!r}: did you mean {near[0]!r}?")
            if key == "_base_":
                raise UserError(f"{self.where}: `_base_` is not read: write out what the other config has")
        if unread:
            note(f"{self.where}: nothing here reads {', '.join(unread)}")

    def fail(self, key: str, wanted: str) -> UserError:
        return UserError(f"{self.where}[{key!r}]: must be {wanted}, found {self.values.get(key)!r}")

    def part(self, key: str) -> "_Part":
        if key not in self.values:
            raise UserError(f"{self.where}: has no {key!r}; it has {', '.join(map(repr, self.values)) or 'nothing'}")
        return _Part(self.values[key], f"{self.where}[{key!r}]")

    def size(self, key: str, default: int) -> int:
        value = self.values.get(key, default)
        most = MOST_LAYERS if key in ("depth", "num_blocks", "num_res_blocks") else MOST
        if type(value) is not int or not 1 <= value <= most:
            raise self.fail(
                key, "a positive integer" + (f" up to {most:,}" if type(value) is int and value > most else "")
            )
        return value

    def sizes(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        values = self.values.get(key, default)
        if not isinstance(values, (list, tuple)) or not all(
            type(value) is int and 0 <= value <= MOST for value in values
        ):
            raise self.fail(key, f"a list of integers, at most {MOST:,}")
        return tuple(values)

    def one_of(self, key: str, choices: tuple[Any, ...]) -> Any:
        value = self.values.get(key, choices[0])
        if value not in choices:
            raise self.fail(key, f"one of {', '.join(map(repr, choices))}")
        return value


def run_config(path: str | Location) -> dict[str, Any]:
    """Execute a config file; the names it defines. Raises `UserError`."""
    where = location(path)
    if isinstance(where, Url) and where.is_file():
        with local_copy(where) as copy:
            return run_config(copy)
    path = where.expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such config; the shipped ones are in configs/example/dualvitok/")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # it is somebody else's program
        raise UserError(f"{path}: this config does not run: {type(error).__name__}: {error}") from error
    if "_base_" in names:
        raise UserError(f"{path}: `_base_` is not read: write out what the other config has, or import it")
    imported = (types.ModuleType, types.FunctionType, type)
    names = {n: value for n, value in names.items() if not n.startswith("_") and not isinstance(value, imported)}
    if "vq_model" not in names:
        raise UserError(f"{path}: defines no `vq_model`; it defines {', '.join(names) or 'nothing'}")
    return names


def read_config(path: str | Location) -> DualViTokSizes:
    """Execute a config file and read its `vq_model`. Raises `UserError`, which names the file and the key."""
    return read_model(run_config(path)["vq_model"], f"{path}: vq_model")


def read_model(vq_model: Any, where: str) -> DualViTokSizes:
    """The sizes in `vq_model`; `where` begins the messages of errors."""
    model = _Part(vq_model, where)
    model.one_of("type", ("DualViTok",))
    model.known("type", "config")
    return _dualvitok(model.part("config"))


def _dualvitok(config: _Part) -> DualViTokSizes:
    config.known(*DualViTokSizes.__dataclass_fields__)
    sizes = DualViTokSizes(
        semantic_encoder=_semantic_encoder(config.part("semantic_encoder")),
        semantic_quantizer=_quantizer(config.part("semantic_quantizer"), codebook_size=32768),
        semantic_decoder=_semantic_decoder(config.part("semantic_decoder")),
        pixel_encoder=_conv(config.part("pixel_encoder"), ch=128, channels=32),
        pixel_quantizer=_quantizer(config.part("pixel_quantizer"), codebook_size=98304),
        pixel_decoder=_conv(config.part("pixel_decoder"), ch=384, channels=64),
    )
    semantic, pixel = sizes.semantic_quantizer.dim, sizes.pixel_quantizer.dim
    _agree(config, "semantic_encoder", "z_channels", sizes.semantic_encoder.z_channels, semantic)
    _agree(config, "semantic_decoder", "z_channels", sizes.semantic_decoder.z_channels, semantic)
    _agree(config, "pixel_encoder", "embed_dim", config.part("pixel_encoder").size("embed_dim", 32), pixel)
    _agree(config, "pixel_decoder", "embed_dim", config.part("pixel_decoder").size("embed_dim", 64), semantic + pixel)
    return sizes


def _agree(config: _Part, part: str, key: str, found: int, quantizers: int) -> None:
    if found != quantizers:
        raise UserError(f"{config.where}[{part!r}][{key!r}]: is {found}, but the quantizers' dim makes it {quantizers}")


def _vit(encoder: _Part) -> VitSizes:
    if "vit" not in encoder.values:
        return NAMED_VITS[encoder.one_of("semantic_encoder", tuple(NAMED_VITS))]
    vit = encoder.part("vit")
    vit.known(*VitSizes.__dataclass_fields__)
    released = next(iter(NAMED_VITS.values()))
    sizes = VitSizes(**{key: vit.size(key, getattr(released, key)) for key in VitSizes.__dataclass_fields__})
    if sizes.embed_dim % (4 * sizes.num_heads):  # each head has frequencies for rows and columns, in pairs
        raise vit.fail("num_heads", f"a divisor of {sizes.embed_dim} / 4, a quarter of embed_dim")
    return sizes


def _semantic_encoder(part: _Part) -> SemanticEncoderSizes:
    part.known(*SemanticEncoderSizes.__dataclass_fields__, "semantic_encoder", "vit", "target_mlp")
    part.one_of("target_mlp", ("norm",))
    return SemanticEncoderSizes(
        vit=_vit(part),
        num_blocks=part.size("num_blocks", 4),
        embed_dim=part.size("embed_dim", 1280),
        z_channels=part.size("z_channels", 32),
        proj_layer=part.one_of("proj_layer", tuple(PROJECTIONS)),
    )


def _semantic_decoder(part: _Part) -> SemanticDecoderSizes:
    part.known(*SemanticDecoderSizes.__dataclass_fields__)
    return SemanticDecoderSizes(
        z_channels=part.size("z_channels", 32),
        num_blocks=part.size("num_blocks", 4),
        embed_dim=part.size("embed_dim", 1280),
        output_channels=part.size("output_channels", 3584),
        proj_layer=part.one_of("proj_layer", ("linear_norm", *PROJECTIONS)),
    )


def _quantizer(part: _Part, codebook_size: int) -> QuantizerSizes:
    part.known("type", *QuantizerSizes.__dataclass_fields__)
    part.one_of("type", ("SimVQ",))
    return QuantizerSizes(codebook_size=part.size("codebook_size", codebook_size), dim=part.size("dim", 32))


def _conv(part: _Part, ch: int, channels: int) -> ConvSizes:
    plain = ("use_dc_up_down_blocks", "double_z", "in_channels", "out_channels")
    part.known(*plain, "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels", "embed_dim")
    part.one_of("use_dc_up_down_blocks", (True,))
    part.one_of("double_z", (False,))
    part.one_of("in_channels", (3,))
    part.one_of("out_channels", (3,))
    mults = part.sizes("ch_mult", (1, 1, 2, 2, 4))
    if len(mults) != LEVELS:
        raise part.fail("ch_mult", f"{LEVELS} integers (16 pixels per code)")
    if min(mults) < 1:
        raise part.fail("ch_mult", "integers of at least 1")
    if part.size("ch", ch) % 32:
        raise part.fail("ch", "a multiple of 32, the groups of its normalisation")
    return ConvSizes(
        ch=part.size("ch", ch),
        ch_mult=mults,
        num_res_blocks=part.size("num_res_blocks", 2),
        attn_levels=part.sizes("attn_resolutions", (4,)),
        z_channels=part.size("z_channels", channels),
    )
