"""Every shipped config builds the published names and shapes; what a config gets wrong is named."""

import json
from pathlib import Path

import pytest
import torch

from vision_tokenizer.models.dualvitok.config import read_config
from vision_tokenizer.models.dualvitok.model import ENCODING, DualViTok
from vistoken.errors import UserError

SHIPPED = Path(__file__).parent.parent / "configs" / "example" / "dualvitok"


def shapes_of(config, *, decoder):
    with torch.device("meta"):
        model = DualViTok(read_config(config), decoder=decoder)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "config, keys",
    [
        ("dualvitok_anyres_max512.py", "dualvitok_full_keys.json"),
        ("dualvitok_fix256.py", "dualvitok_full_keys.json"),
    ],
)
def test_names_and_shapes(config, keys, golden):
    wanted = json.loads((golden / keys).read_text())
    assert shapes_of(SHIPPED / config, decoder=True) == wanted
    encoding = {name: shape for name, shape in wanted.items() if name.startswith(ENCODING)}
    assert shapes_of(SHIPPED / config, decoder=False) == encoding


def test_the_reference_small_model_has_its_names_and_shapes(dualvitok_config, golden):
    wanted = json.loads((golden / "dualvitok_small_keys.json").read_text())
    assert shapes_of(dualvitok_config, decoder=True) == wanted


def test_other_keys_are_ignored_and_sizes_default_to_the_released_ones(tmp_path):
    (tmp_path / "released.py").write_text(
        "losses = [1]\n"
        "vq_model = dict(type='DualViTok', config=dict(\n"
        "    semantic_encoder=dict(semantic_encoder='Emova-ollm/qwen2vit600m', attn_implementation='sdpa'),\n"
        "    semantic_quantizer=dict(type='SimVQ', channel_first=True, rotation_trick=True),\n"
        "    semantic_decoder=dict(), pixel_encoder=dict(codebook_size=1, dropout=0.1, z_noise=0.5),\n"
        "    pixel_quantizer=dict(type='SimVQ'), pixel_decoder=dict(), teacher=dict(x=1)))\n"
    )
    assert read_config(tmp_path / "released.py") == read_config(SHIPPED / "dualvitok_anyres_max512.py")


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("vq_model =", "model =", "defines no `vq_model`; it defines .*model"),
        ('type="DualViTok"', 'type="VQGAN"', r"vq_model\['type'\].*'VQGAN'"),
        ("semantic_decoder=", "decoder_of_meaning=", "has no 'semantic_decoder'; it has"),
        ('target_mlp="norm"', 'target_mlp="identity"', r"\['target_mlp'\]: must be one of 'norm', found 'identity'"),
        ('proj_layer="linear",', 'proj_layer="conv",', r"semantic_encoder'\]\['proj_layer'\].*'conv'"),
        ("use_dc_up_down_blocks=True", "use_dc_up_down_blocks=False", r"\['use_dc_up_down_blocks'\]"),
        ("ch_mult=[1, 1, 2, 4, 4]", "ch_mult=[1, 2, 4]", r"\['ch_mult'\]: must be 5 integers"),
        ("ch=32", "ch='32'", r"\['ch'\]: must be a positive integer, found '32'"),
        ("ch=32", "ch=40", r"\['ch'\]: must be a multiple of 32, .* found 40"),
        ("ch_mult=[1, 1, 2, 4, 4]", "ch_mult=[1, 0, 2, 4, 4]", r"\['ch_mult'\]: must be integers of at least 1"),
        ("num_heads=4", "num_heads=1180591620717411303424", r"\['num_heads'\]: must be a positive integer up to"),
        ('type="SimVQ", dim=16', 'type="VQ", dim=16', r"\['semantic_quantizer'\]\['type'\]"),
        ('type="SimVQ", dim=16', 'type="SimVQ", dim=8', r"\['z_channels'\]: is 16, but .* dim makes it 8"),
        ("num_heads=4", "num_head=4", r"\['vit'\]: unknown key 'num_head': did you mean 'num_heads'"),
        ("num_heads=4", "num_heads=3", r"\['vit'\]\['num_heads'\]: must be a divisor of 128 / 4, .* found 3"),
        ("ch_mult=", "ch_mults=[1], ch_mult=", r"unknown key 'ch_mults': did you mean 'ch_mult'"),
        ("vq_model =", "_base_ = 'other.py'\nvq_model =", "`_base_` is not read"),
        ('type="DualViTok",', 'type="DualViTok", _base_="x",', "`_base_` is not read"),
        ("vit=dict(", "semantic_encoder='other/vit', v=dict(", r"'Emova-ollm/qwen2vit600m', found 'other/vit'"),
        ("dict(", "dict((", "does not run: SyntaxError"),
        ("vq_model", "1 / 0\nvq_model", "does not run: ZeroDivisionError"),
        ("vq_model", "raise SystemExit(3)\nvq_model", "does not run: SystemExit: 3"),
        ("vq_model", "open('/no/where')\nvq_model", "does not run: FileNotFoundError: .*'/no/where'"),
    ],
)
def test_bad_configs_are_named(old, new, named, tmp_path):
    text = (SHIPPED / "dualvitok_small.py").read_text()
    assert old in text
    (tmp_path / "bad.py").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"bad\.py.*{named}"):
        read_config(tmp_path / "bad.py")


def test_a_missing_config(tmp_path):
    with pytest.raises(UserError, match="no such config"):
        read_config(tmp_path / "none.py")
