"""Every term of the generator's loss, and what the discriminator learns from.

Names of the terms are those of the published trainer's log.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_tokenizer.fitting.config import LossSettings
from vision_tokenizer.fitting.discriminator import hinge_loss
from vision_tokenizer.fitting.forward import Outputs
from vistoken.device import at_least_float32


def pixel_loss(reconstruction: Tensor, pixels: Tensor, settings: LossSettings) -> Tensor:
    if settings.reconstruction_loss == "l1":
        return F.l1_loss(reconstruction, pixels)
    loss = F.mse_loss(reconstruction, pixels)
    return loss + settings.l1_weight * F.l1_loss(reconstruction, pixels) if settings.l1_weight else loss


def semantic_loss(found: Tensor, target: Tensor, kind: str) -> Tensor:
    """(..., C) twice; the target is constant. `cos` leaves both norms out of account."""
    if kind == "l1":
        return F.smooth_l1_loss(found, target)
    return (1 - F.cosine_similarity(found, target, dim=-1)).mean()


def generator_terms(
    outputs: Outputs, pixels: Tensor, settings: LossSettings, perceptual: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """Every term but the adversarial one, unweighted, in at least fp32."""
    reconstruction = at_least_float32(outputs.reconstruction)
    terms = {"rec_loss": pixel_loss(reconstruction, pixels, settings)}
    if settings.perceptual_weight and perceptual is not None:
        terms["p_loss"] = perceptual(pixels, reconstruction).mean()
    for branch, loss in outputs.codebook_losses.items():
        terms["semantic_codebook_loss" if branch == "semantic" else "vq_loss"] = loss
    if outputs.semantic is not None and outputs.target is not None:
        found, target = at_least_float32(outputs.semantic), at_least_float32(outputs.target)
        name = f"semantic_{settings.semantic_reconstruction}_loss"
        terms[name] = semantic_loss(found, target, settings.semantic_reconstruction)
    return terms


def weighted_sum(terms: dict[str, Tensor], settings: LossSettings, step: int) -> Tensor:
    """The generator's loss without its adversarial term."""
    enlarge = settings.codebook_enlarge_ratio * max(0.0, 1 - step / settings.codebook_enlarge_steps)
    weights = {
        "rec_loss": settings.reconstruction_weight,
        "p_loss": settings.perceptual_weight,
        "vq_loss": settings.codebook_weight * (1 + enlarge),
        "semantic_codebook_loss": settings.semantic_weight * settings.semantic_codebook_weight,
        f"semantic_{settings.semantic_reconstruction}_loss": settings.semantic_weight
        * settings.semantic_reconstruction_weight,
    }
    total = torch.zeros_like(terms["rec_loss"])
    for name, term in terms.items():
        total = total + weights[name] * term
    return total


def adaptive_weight(likeness: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much larger the gradient of the pictures' likeness is than the adversarial one, where the decoder ends."""
    wanted = torch.autograd.grad(likeness, last_layer, retain_graph=True)[0].norm()
    found = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (wanted / (found + 1e-4)).clamp(0, 1e4).detach()


class Lecam(nn.Module):
    """Keeps the discriminator's verdicts near each other's running means (arXiv 2104.03310)."""

    real: Tensor
    fake: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        with torch.no_grad():
            self.real.mul_(0.999).add_(real.mean(), alpha=0.001)
            self.fake.mul_(0.999).add_(fake.mean(), alpha=0.001)
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


def discriminator_loss(real: Tensor, fake: Tensor, weight: float, settings: LossSettings, lecam: Lecam) -> Tensor:
    loss = weight * hinge_loss(real, fake)
    if settings.lecam_loss_weight and weight:
        loss = loss + weight * settings.lecam_loss_weight * lecam(real, fake)
    return loss
