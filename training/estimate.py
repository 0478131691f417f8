"""How much memory a process will need, and how long a step will take: from sizes alone, before any GPU is touched.

docs/gpu-training.md shows these figures for the 7B and the 34B model, and how they come about.
"""

from dataclasses import dataclass, fields

from torch import nn

from training.config import TrainConfig
from training.data.anyres import CANVASES
from training.models.llm import LLMConfig
from training.models.loss import CHUNK
from training.models.siglip import VisionConfig
from training.models.units import LayeredModel


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step."""

    weights: float  # fp32 masters, this process's share
    optimizer: float  # gradients and two moments of what is trained, its share
    gathered: float  # weights in the number format of computation that are whole at the peak
    loss: float  # logits of a chunk, and the whole gradient of the head
    activations: float
    whole_gradients: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        gib = {field.name.replace("_", " "): getattr(self, field.name) / 2**30 for field in fields(self)}
        parts = " + ".join(f"{name} {value:.1f}" for name, value in gib.items() if value)
        return f"{self.total / 2**30:.1f} GiB = {parts}"


def longest_batch(config: TrainConfig, vision: VisionConfig | None, samples: int) -> tuple[int, int]:
    """(tokens, tiles) of a batch of `samples` that are as long as `max_seq_len` allows and have an image each.

    With `batch_tokens`, of a batch of so many tokens, or of one such sample.
    """
    tiles, length = 0, config.max_seq_len
    if vision:
        tiles, length = 1, length + vision.grid**2 + 1  # the separator
        if config.variant == "anyres":
            columns, rows = max(CANVASES, key=lambda canvas: canvas[0] * canvas[1])
            tiles += columns * rows
            length += rows * vision.grid * (columns * vision.grid + 1)
        if config.batch_tokens:  # of images alone
            return max(config.batch_tokens, length), max(config.batch_tokens // (vision.grid**2 + 1), tiles)
    return (max(config.batch_tokens, length) if config.batch_tokens else samples * length), samples * tiles


def memory(
    model: LayeredModel, config: TrainConfig, llm: LLMConfig, vision: VisionConfig | None, world: int, *, whole: bool
) -> Memory:
    """Weights and optimizer exactly, the rest for the longest batch, roughly."""
    parameters = dict(model.named_parameters())
    every = sum(parameter.numel() for parameter in parameters.values())
    trained = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    head_trained = next((p.requires_grad for name, p in parameters.items() if name.startswith("lm_head.")), True)
    layer = max(sum(parameter.numel() for parameter in unit.parameters()) for unit in model.units())
    words, shares = llm.vocab_size * llm.hidden_size, config.shard_over or world
    width = 4 if config.precision in ("fp32", "tf32") else 2  # bytes of a number
    tokens, tiles = longest_batch(config, vision, config.shares(world)[0])
    activations = stored(config, llm.num_hidden_layers, tokens, llm.hidden_size, llm.intermediate_size)
    if vision:
        patches = tiles * vision.grid**2
        activations += stored(config, vision.num_hidden_layers, patches, vision.hidden_size, vision.intermediate_size)
    return Memory(
        weights=every * 4 / shares,
        optimizer=trained * 12 / shares,
        gathered=width * (every if config.data_parallel == "sdp" else 2 * words + 2 * layer),  # this one and the next
        loss=CHUNK * (4 + width) + head_trained * 4 * words,
        activations=width * activations,
        whole_gradients=whole * 4 * trained,
    )


def stored(config: TrainConfig, layers: int, tokens: int, hidden: int, intermediate: int) -> int:
    """Numbers kept from the forward pass: each layer's input and, of one layer at a time or of all, what is inside."""
    inside = 13 * hidden + 4 * intermediate
    if not config.checkpointing:
        return layers * tokens * (hidden + inside)
    kept = 3 * hidden + intermediate if config.selective_checkpointing else 0  # attention's, every second product's
    return layers * tokens * (hidden + kept) + tokens * inside


def step_seconds(
    model: nn.Module,
    config: TrainConfig,
    flops: float,
    world: int,
    *,
    peak: float,
    link: float,
    across: float = 0.0,
    share: float = 0.5,
) -> tuple[float, float]:
    """(seconds of computing, seconds of sending) of a step of `flops` useful operations over all processes.

    `peak` is a GPU's operations a second, of which `share` is reached; `link` the bytes a second that a process sends
    to those it shares its copy of the model with, `across` to other copies. Computing and sending overlap.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    every, trained = sum(n for n, _ in sizes), sum(n for n, learned in sizes if learned)
    again = 0.0
    if config.checkpointing:  # one more forward pass, 2 of the 6 operations a weight, 4 where it is frozen
        again = 2 * every / (4 * every + 2 * trained) * (0.5 if config.selective_checkpointing else 1)
    shares = config.shard_over or world
    copies, batches = world // shares, config.shares(world)[1]
    gathers = batches * (2 if config.data_parallel == "fsdp" else 1)
    sums = 1 if config.whole_gradients == "yes" else batches
    sending = (2 * every * gathers + 4 * trained * sums) * (shares - 1) / shares / link
    if copies > 1:
        sending += 2 * 4 * trained / shares * (copies - 1) / copies / across
    return flops * (1 + again) / (world * peak * share), sending
