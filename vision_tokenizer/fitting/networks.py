"""The network of a run: built from the config, its weights drawn, taken from a checkpoint, or fitted to the data.

Legend: K codes, d code width, T features.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vision_tokenizer.fitting.config import RunSettings
from vision_tokenizer.fitting.forward import (
    CodeDropping,
    QuantizerOptions,
    Trainable,
    TrainableDualViTok,
    TrainableVqgan,
)
from vision_tokenizer.models.chameleon.vqgan import TRAINING, ChameleonVQGAN, sizes_of
from vision_tokenizer.models.dualvitok.config import read_model
from vision_tokenizer.models.dualvitok.model import DualViTok
from vision_tokenizer.models.dualvitok.simvq import SimVQ
from vision_tokenizer.models.layers import AttnBlock, ResnetBlock
from vision_tokenizer.models.nearest import nearest_codes
from vistoken.cli import note
from vistoken.errors import UserError
from vistoken.weights import load_strict, read_state_dict

FEATURES_PER_CODE = 16  # that k-means looks at
ROUNDS = 6  # of k-means


def build(settings: RunSettings) -> Trainable:
    """With weights drawn at random, on the CPU. Raises `UserError` for a config that cannot train."""
    if settings.vq_model.get("type") == "ChameleonVQGAN":
        sizes = sizes_of(settings.vq_model.get("config"), "vq_model")
        return TrainableVqgan(drawn_vqgan(ChameleonVQGAN(sizes, decoder=True)))
    model = DualViTok(read_model(settings.vq_model, "vq_model"), decoder=True)
    config = settings.vq_model["config"]
    if config.get("semantic_detail_merge_type", "cat") != "cat":
        raise UserError("vq_model.config.semantic_detail_merge_type: only 'cat' is supported")
    if config.get("pixel_noise_type", "random") not in ("random", "zero"):
        raise UserError(
            f"vq_model.config.pixel_noise_type: must be 'random' or 'zero', not {config['pixel_noise_type']!r}"
        )
    draw_dualvitok(model)
    return TrainableDualViTok(
        model,
        CodeDropping(
            config.get("pixel_drop_rate") or 0.0,
            config.get("pixel_drop_batch_rate", 0.1),
            config.get("pixel_noise_type", "random"),
        ),
        _options(config["semantic_quantizer"]),
        _options(config["pixel_quantizer"]),
    )


def _options(quantizer: dict[str, Any]) -> QuantizerOptions:
    return QuantizerOptions(
        quantizer.get("rotation_trick", True),
        quantizer.get("input_to_quantize_commit_loss_weight", 0.25),
        quantizer.get("commitment_weight", 1.0),
    )


@torch.no_grad()
def draw_dualvitok(model: DualViTok) -> None:
    """As published: Xavier for the semantic parts, PyTorch's defaults for the others, normal codebooks."""
    encoder = model.semantic_encoder
    for part in (encoder.proj_in, encoder.blocks, encoder.proj_out, model.semantic_decoder):
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    for quantizer in (model.semantic_quantizer, model.pixel_quantizer):
        nn.init.normal_(quantizer.frozen_codebook, std=quantizer.frozen_codebook.shape[1] ** -0.5)


@torch.no_grad()
def drawn_vqgan(model: ChameleonVQGAN) -> ChameleonVQGAN:
    """PyTorch's defaults, but every residual branch starts at zero; the codebook uniform in +-1/K, as in VQGAN.

    The network then starts nearly linear, and learns several times faster.
    """
    for module in model.modules():
        if isinstance(module, (ResnetBlock, AttnBlock)):
            last = module.conv2 if isinstance(module, ResnetBlock) else module.proj_out
            nn.init.zeros_(last.weight)
            nn.init.zeros_(cast("Tensor", last.bias))
    bound = 1 / model.codebook_sizes[0]
    nn.init.uniform_(model.quantize.embedding.weight, -bound, bound)
    return model


def load_weights(network: Trainable, settings: RunSettings) -> None:
    """What the run starts from: a whole checkpoint, or a pretrained ViT alone. Raises `UserError`."""
    config = settings.vq_model["config"]
    start = settings.init_from or config.get("vq_ckpt")
    if start:
        use_ema = settings.init_from_ema or bool(config.get("use_vq_ckpt_ema"))
        state = {name: tensor.float() for name, tensor in read_state_dict(start, use_ema=use_ema).items()}
        trains = {name: p.requires_grad for name, p in network.model.named_parameters()}
        load_strict(network.model, state, source=start, ignore=TRAINING)
        for name, parameter in network.model.named_parameters():
            parameter.requires_grad_(trains[name])
        return
    if not isinstance(network, TrainableDualViTok):
        return
    named = config["semantic_encoder"].get("semantic_encoder") if "vit" not in config["semantic_encoder"] else None
    source = settings.vit_checkpoint or named
    if source is None or source == "random":
        note("the ViT is untrained: semantic codes will group by appearance, not by meaning")
        return
    prefix = "semantic_encoder.model."
    try:
        state = {name.removeprefix(prefix): tensor.float() for name, tensor in read_state_dict(source).items()}
    except UserError as error:
        raise UserError(
            f"{error}\nThese are to be the ViT's weights: give their path with --vit_checkpoint="
        ) from error
    vit = network.model.semantic_encoder.model
    load_strict(vit, {name: state[name] for name in state if name in vit.state_dict()} or state, source=source)
    vit.requires_grad_(False)


@torch.no_grad()
def fit_codebooks(network: Trainable, batches: Iterable[Tensor], how: str) -> None:
    """Move every codebook to where the encoder's features are, which else outrun it within some steps.

    `covariance` gives a random codebook the features' spread; `kmeans` puts a code where many features are. `batches`
    are (B, 3, H, W) in [-1, 1]; as many are taken as are needed.
    """
    sizes = dict(zip(network.model.branches, network.model.codebook_sizes, strict=True))
    found: dict[str, list[Tensor]] = {branch: [] for branch in sizes}
    for pixels in batches:
        for branch, features in network.features(pixels)[0].items():
            found[branch].append(features.flatten(0, -2).float())
        wanted = {branch: FEATURES_PER_CODE * size if how == "kmeans" else 1000 for branch, size in sizes.items()}
        if all(sum(map(len, found[branch])) >= wanted[branch] for branch in sizes):
            break
    for branch, parts in found.items():
        features = torch.cat(parts)
        quantizer = network.quantizer(branch)
        codes = quantizer.frozen_codebook if isinstance(quantizer, SimVQ) else quantizer.embedding.weight
        if how == "kmeans":
            codes.copy_(kmeans(features, len(codes)))
            if isinstance(quantizer, SimVQ):
                quantizer.code_transform.weight.copy_(torch.eye(codes.shape[1]))
        elif isinstance(quantizer, SimVQ):
            root = _root(features.T @ features / len(features))
            quantizer.code_transform.weight.copy_(codes.shape[1] ** 0.5 * root)
        else:
            mean = features.mean(0)
            spread = _root((features - mean).T @ (features - mean) / len(features))
            codes.copy_(mean + torch.randn_like(codes) @ spread)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(1e-12).sqrt() @ vectors.T).float()


def kmeans(features: Tensor, count: int) -> Tensor:
    """(T, d) -> (count, d). Codes that no feature is nearest to move next to one that stands for many."""
    generator = torch.Generator().manual_seed(0)
    spread = features.std(0)

    def some(number: int) -> Tensor:
        rows = features[torch.randint(len(features), (number,), generator=generator)]
        return rows + 0.05 * spread * torch.randn(rows.shape, generator=generator).to(rows)

    if len(features) >= count:
        codes = features[torch.randperm(len(features), generator=generator)[:count]].clone()
    else:
        codes = torch.cat([features, some(count - len(features))])
    for _ in range(ROUNDS):
        index = nearest_codes(features, codes, codes.square().sum(1) / 2)
        sizes = torch.bincount(index, minlength=count)
        means = torch.zeros_like(codes).index_add_(0, index, features) / sizes.clamp_min(1)[:, None]
        codes = torch.where(sizes[:, None] > 0, means, codes)
        empty = (sizes == 0).nonzero()[:, 0]
        codes[empty] = some(len(empty))
    return codes
