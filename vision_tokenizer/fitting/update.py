"""One update of the tokenizer and of its discriminator: what the training command does at every step.

Legend: B batch, H W pixels. G is the tokenizer, D the discriminator.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vision_tokenizer.fitting.config import RunSettings
from vision_tokenizer.fitting.discriminator import PatchDiscriminator
from vision_tokenizer.fitting.forward import Outputs, Trainable
from vision_tokenizer.fitting.losses import Lecam, adaptive_weight, discriminator_loss, generator_terms, weighted_sum
from vistoken.cli import note
from vistoken.device import at_least_float32
from vistoken.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
GRAD_NORMS = ("grad_norm", "discriminator_grad_norm")  # of the two sides


class Ema:
    """Running means of the trained weights, without a warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        self.means = {name: parameters[name].detach().clone() for name in self.trained}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        means = [self.means[name] for name in self.trained]
        weights: list[Tensor] = [parameters[name] for name in self.trained]
        torch._foreach_lerp_(means, weights, 1 - self.decay)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state dict, with running means where there are some."""
        return {**model.state_dict(), **self.means}


class Updater:
    """Holds everything that an update changes.

    Args:
        network: on its device.
        discriminator: None where the adversarial weight is 0 throughout.
        perceptual: (B, 3, H, W) twice -> (B,), None where its weight is 0.
    """

    def __init__(
        self,
        network: Trainable,
        settings: RunSettings,
        discriminator: PatchDiscriminator | None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    ):
        self.network, self.discriminator, self.perceptual = network, discriminator, perceptual
        self.losses, self.settings = settings.vq_loss, settings
        self.step = 0  # updates made
        self.lecam = Lecam().to(next(network.parameters()).device)
        self.ema = Ema(network.model, settings.ema_decay) if settings.ema and settings.ema_decay else None
        self.sides = [_Side(network.named_parameters(), settings, self.device)]
        if discriminator is not None:
            self.sides.append(_Side(discriminator.named_parameters(), settings, self.device))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def autocast(self) -> AbstractContextManager:
        kind = AUTOCAST.get(self.settings.mixed_precision)
        return torch.autocast(self.device.type, kind) if kind else nullcontext()

    def update(
        self, batches: Sequence[Tensor], lr: float, names: Sequence[str] = (), **forward: Tensor
    ) -> tuple[dict[str, Tensor], Outputs]:
        """Learn from micro-batches (B, 3, H, W) in [-1, 1]; returns the means of all terms, and the last outputs.

        `names` says which pictures these are, for the message if a loss is not finite: then nothing is changed.
        """
        step = self.step + 1
        sums: dict[str, Tensor] = {}
        for side in self.sides:
            side.optimizer.zero_grad(set_to_none=True)
        for pixels in batches:
            terms, outputs = self._generator_pass(pixels, step, len(batches), forward)
            if self.discriminator is not None:
                terms |= self._discriminator_pass(self.discriminator, pixels, outputs.reconstruction, len(batches))
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / len(batches)
        for name, side in zip(GRAD_NORMS, self.sides, strict=False):
            sums[name] = side.clip(self.settings.max_grad_norm)
        self._require_finite(sums, step, names)
        for norm, side in zip(GRAD_NORMS, self.sides, strict=False):
            if not torch.isfinite(sums[norm]):
                side.tell_overflow(step, norm)
            side.step(lr)
        if self.ema is not None:
            self.ema.update(self.network.model)
        self.step = step
        return sums, outputs

    def _generator_pass(
        self, pixels: Tensor, step: int, micro_batches: int, forward: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Outputs]:
        losses = self.losses
        with self.autocast():
            outputs = self.network(pixels, **forward)
            terms = generator_terms(outputs, pixels, losses, self.perceptual)
            total = weighted_sum(terms, losses, step)
            if self.discriminator is not None:
                self.discriminator.requires_grad_(False)  # this pass teaches G alone
                adversarial = -at_least_float32(self.discriminator(outputs.reconstruction)).mean()
                weight: float | Tensor = losses.adversarial_weight(step)
                if losses.disc_adaptive_weight and weight:
                    likeness = losses.reconstruction_weight * terms["rec_loss"]
                    if "p_loss" in terms:
                        likeness = likeness + losses.perceptual_weight * terms["p_loss"]
                    last = self.network.model.get_parameter(self.network.last_layer)
                    weight = weight * adaptive_weight(likeness, adversarial, last)
                terms["generator_adv_loss"] = adversarial
                total = total + weight * adversarial
        self.sides[0].backward(total / micro_batches)
        return terms | {"generator_total": total}, outputs

    def _discriminator_pass(
        self, discriminator: PatchDiscriminator, pixels: Tensor, reconstruction: Tensor, micro_batches: int
    ) -> dict[str, Tensor]:
        discriminator.requires_grad_(True)
        with self.autocast():
            real = at_least_float32(discriminator(pixels))
            fake = at_least_float32(discriminator(reconstruction.detach()))
            weight = self.losses.adversarial_weight(self.step + 1)
            loss = discriminator_loss(real, fake, weight, self.losses, self.lecam)
        self.sides[1].backward(loss / micro_batches)
        return {"discriminator_adv_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def _require_finite(self, sums: dict[str, Tensor], step: int, names: Sequence[str]) -> None:
        scaled = self.settings.mixed_precision == "fp16"  # its gradients may overflow: then the step is left out
        bad = [n for n, value in sums.items() if not (torch.isfinite(value) or (scaled and n in GRAD_NORMS))]
        anywhere = torch.tensor(float(bool(bad)), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        if not anywhere:
            return
        where = f"{', '.join(bad)} of the batch {', '.join(names)}" if bad else "a loss on another rank"
        raise UserError(
            f"step {step}: {where} is not finite; the weights are unchanged. Resume from the last checkpoint with a "
            "lower lr or without 16-bit numbers, or leave these pictures out."
        )


class _Side:
    """G's or D's optimizer, with the scaling of gradients that fp16 needs."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: RunSettings, device: torch.device):
        ordinary: list[nn.Parameter] = []
        codes: list[nn.Parameter] = []
        for name, parameter in parameters:
            if parameter.requires_grad:
                (codes if "quantize" in name else ordinary).append(parameter)
        groups = [{"params": ordinary, "scale": 1.0}]  # each group's share of the learning rate
        if codes:
            groups.append({"params": codes, "scale": settings.code_transform_lr_scale})
        self.optimizer = torch.optim.Adam(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self, max_grad_norm: float) -> Tensor:
        """Average gradients over ranks and clip them. Returns their norm before that."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        average_gradients(parameters)
        self.scaler.unscale_(self.optimizer)  # after averaging: every rank finds the same overflows
        limit = max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=False).detach()

    def tell_overflow(self, step: int, norm: str) -> None:
        """A gradient is not finite, so `step` will change nothing but the scale. Raises `UserError` below 1."""
        scale = self.scaler.get_scale()
        if scale < 1:
            raise UserError(
                f"step {step}: {norm} is not finite in fp16, whatever the scale (now {scale:g}); the weights are "
                "unchanged. Resume from the last checkpoint with mixed_precision bf16 or none."
            )
        note(f"step {step} left out: a gradient overflowed fp16 ({norm}, scaled by {scale:g})")

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.scaler.step(self.optimizer)
        self.scaler.update()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every rank gets the mean of all ranks' gradients."""
    if not dist.is_initialized():
        return
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in works:
        if work is not None:
            work.wait()
    torch._foreach_div_(gradients, dist.get_world_size())
