"""What many tests share: the golden folder, and checkpoints of small models made on the spot from names and shapes."""

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from vistoken.jobs.members import indexes

os.environ["TRITON_INTERPRET"] = "1"  # read with the first import of Triton: its kernels run on a CPU, step by step

GOLDEN = Path(__file__).parent / "golden"
synthetic_tensor = runpy.run_path(str(GOLDEN / "synthetic_weights.py"))["synthetic_tensor"]


@pytest.fixture(autouse=True)
def index_folder(monkeypatch):
    """pre_tokenize.py sets where its process keeps indexes of tar files; the next test is another process."""
    monkeypatch.setattr(indexes, "folder", indexes.folder)


def synthetic_state(keys: Path) -> dict[str, torch.Tensor]:
    """The stand-in weights of a `*_keys.json` file (name -> shape)."""
    shapes = json.loads(keys.read_text())
    return {name: torch.from_numpy(synthetic_tensor(name, tuple(shape))) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def dualvitok_config() -> Path:
    return GOLDEN / "codebook" / "dualvitok_small.py"


@pytest.fixture(scope="session")
def dualvitok_checkpoint(tmp_path_factory) -> Path:
    """The small DualViTok that the golden codes were computed with."""
    file = tmp_path_factory.mktemp("dualvitok") / "pytorch_model.bin"
    torch.save(synthetic_state(GOLDEN / "dualvitok_small_keys.json"), file)
    return file


def _chameleon_folder(folder: Path, keys: Path) -> Path:
    torch.save({"state_dict": synthetic_state(keys)}, folder / "vqgan.ckpt")
    for name in ("vqgan.yaml", "text_tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "chameleon_small" / name, folder)
    return folder


@pytest.fixture(scope="session")
def chameleon_folder(tmp_path_factory) -> Path:
    """The small Chameleon tokenizers: `vqgan.yaml`, `vqgan.ckpt`, `text_tokenizer.json`."""
    return _chameleon_folder(tmp_path_factory.mktemp("chameleon"), GOLDEN / "vqgan_small_keys.json")


@pytest.fixture(scope="session")
def chameleon_attn_folder(tmp_path_factory) -> Path:
    """The variant with attention at resolutions 32 and 64."""
    folder = _chameleon_folder(
        tmp_path_factory.mktemp("chameleon_attn"), GOLDEN / "chameleon_small" / "vqgan_attn_keys.json"
    )
    config = folder / "vqgan.yaml"
    config.write_text(config.read_text().replace("attn_resolutions: []", "attn_resolutions: [32, 64]"))
    return folder


TINY_DUALVITOK = """
pixel = dict(ch=32, attn_resolutions=[4], ch_mult=[1, 1, 1, 1, 1], num_res_blocks=1, use_dc_up_down_blocks=True)
vq_model = dict(
    type="DualViTok",
    config=dict(
        semantic_encoder=dict(
            vit=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
            num_blocks=1, proj_layer="linear", z_channels=8, embed_dim=64, target_mlp="norm",
        ),
        semantic_quantizer=dict(type="SimVQ", dim=8, codebook_size=256),
        semantic_decoder=dict(z_channels=8, proj_layer="linear_norm", embed_dim=64, output_channels=32, num_blocks=1),
        pixel_encoder=dict(**pixel, embed_dim=8, z_channels=8),
        pixel_quantizer=dict(type="SimVQ", dim=8, codebook_size=512),
        pixel_decoder=dict(**pixel, embed_dim=16, z_channels=16),
    ),
)
"""


@pytest.fixture(scope="session")
def tiny_dualvitok(tmp_path_factory) -> tuple[Path, Path]:
    """(config, checkpoint) of a DualViTok so narrow that a process spends its time on the job, not on the model."""
    from vision_tokenizer.models.dualvitok.config import read_config
    from vision_tokenizer.models.dualvitok.model import DualViTok

    folder = tmp_path_factory.mktemp("tiny_dualvitok")
    (folder / "tiny.py").write_text(TINY_DUALVITOK)
    with torch.device("meta"):
        shapes = {
            name: t.shape for name, t in DualViTok(read_config(folder / "tiny.py"), decoder=True).state_dict().items()
        }
    state = {name: torch.from_numpy(synthetic_tensor(name, tuple(shape))) for name, shape in shapes.items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "tiny.py", folder / "pytorch_model.bin"


@pytest.fixture
def pictures(tmp_path, golden) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("photo.jpg", "gray.png", "palette.png"):
        shutil.copy(golden / "images" / name, folder)
    return folder
