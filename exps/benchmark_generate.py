"""Tokens a second of UniToken's decoding, with keys and values kept and with whole sequences for every token.

    python exps/benchmark_generate.py                         # a small model on the CPU
    python exps/benchmark_generate.py --size 7b --precision bf16 --batch_sizes 1 8 32 --height 512 --width 512

The last takes some 50 GB of a GPU's memory, and minutes. The model is untrained; what it draws does not matter.
Recomputing is measured in the middle of the picture: it takes longer with every token. Two limits of the machine stand
beside the figures. A step reads every weight once, whatever the batch, and each sequence's keys and values: `memory` is
the tokens a second if nothing else took time. A token costs two operations a weight: `matrix` is the same for the best
observed rate of a matrix product. With guidance a token is two.
"""

import time
from typing import cast

import numpy as np
import torch
from measure import describe_machine, matrix_rate, print_report

from pre_tokenize.sequences import SequenceFormat
from training.generation.cache import CachedUniToken, LanguageModel, Recomputing
from training.generation.decode import Decoder, Prompt, Settings
from training.generation.grammar import HEAD, Kind
from training.generation.sampling import Sampling
from training.generation.sizes import Size
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from training.models.unitoken import UniToken
from vision_tokenizer.models.chameleon.vocabulary import CODE, RELEASED_IMAGE_IDS, RELEASED_MARKS
from vistoken.cli import DTYPES, OK, add_device, at_least, command_parser, run_command
from vistoken.device import choose_dtype, float32_products, local_device

SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
PROMPT = 64  # ids
TOWER = VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)  # not used


class PictureRules:
    """A block of released ids, without a tokenizer file."""

    def __init__(self, height: int, width: int, vocab_size: int):
        h, w = height // 16, width // 16
        rows = np.full((h, w + 1), CODE)
        rows[:, w] = RELEASED_MARKS.new_line
        start = [RELEASED_MARKS.image_start, 8804 + height // 32, 8804 + width // 32]
        self.block = np.concatenate([start, rows.ravel(), [RELEASED_MARKS.image_end]])
        self.vocab_size, self.turn_end = vocab_size, RELEASED_MARKS.end_of_turn
        self.format = cast(SequenceFormat, self)  # the decoder asks it for `turn_end` alone

    def follow(self, head: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*head, token)

    def expected(self, head: tuple[int, ...]) -> Kind:
        return Kind("size")

    def layout(self, head: tuple[int, ...]) -> np.ndarray:
        return self.block

    def head(self, size: Size) -> tuple[int, ...]:
        return tuple(self.block[:HEAD].tolist())

    def allowed(self, kind: Kind, *, images: bool) -> np.ndarray:
        mask = np.zeros(self.vocab_size, bool)
        mask[RELEASED_IMAGE_IDS.start : RELEASED_IMAGE_IDS.stop] = True
        return mask


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="of the language model")
    add("--height", type=at_least(32), default=96, help="of the picture, in pixels")
    add("--width", type=at_least(32), default=96)
    add("--batch_sizes", type=at_least(1), nargs="+", default=[1, 4])
    add("--precision", choices=DTYPES, default="fp32")
    add("--recompute_tokens", type=at_least(1), default=16, help="of a picture, when recomputing: it is slow")
    add("--repeats", type=at_least(1), default=2, help="the best of so many counts")
    add_device(parser)
    args = parser.parse_args(argv)
    device, dtype = local_device(args.device), choose_dtype(args.precision)
    with torch.device("meta"):
        sizes = SIZES[args.size]
        model = UniToken(LLMConfig(num_key_value_heads=sizes["num_attention_heads"], **sizes), TOWER, z_weight=0)
    model = model.to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cached = CachedUniToken(model.requires_grad_(False))
    used = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("model.layers", "lm_head")))
    machine, memory, matrix = describe_machine(device), memory_rate(device), matrix_rate(device, args.precision)
    rules, rows = PictureRules(args.height, args.width, cached.vocab_size), []
    length, half = len(rules.block), (len(rules.block) - args.recompute_tokens) // 2
    kept_bytes = 2 * sizes["num_hidden_layers"] * sizes["hidden_size"] * dtype.itemsize * (PROMPT + length / 2)
    with float32_products(tf32=args.precision != "fp32"):
        for guidance in (1.0, 3.0):
            for batch_size in args.batch_sizes:
                sequences = batch_size * (1 if guidance == 1 else 2)
                drawn = range(3, length)
                kept = max(rate(cached, rules, batch_size, guidance, drawn) for _ in range(args.repeats))
                some = range(max(half, 3), max(half, 3) + args.recompute_tokens)
                again = max(rate(Recomputing(cached), rules, batch_size, guidance, some) for _ in range(args.repeats))
                memory_limit = batch_size * memory / (used * dtype.itemsize + sequences * kept_bytes)
                matrix_limit = batch_size / sequences * matrix / (2 * used)
                rows.append(
                    {
                        "batch": batch_size,
                        "guidance": guidance,
                        "tokens/s": round(kept, 1),
                        "recomputed": round(again, 1),
                        "memory limit": round(memory_limit, 1),
                        "matrix limit": round(matrix_limit, 1),
                        "of the limit": f"{kept / min(memory_limit, matrix_limit):.0%}",
                    }
                )
    report = {**machine, "size": args.size, "parameters": used, "precision": args.precision, "tokens": length}
    print_report(report | {"recompute_tokens": args.recompute_tokens}, rows, list(rows[0]))
    return OK


def rate(model: LanguageModel, rules: PictureRules, batch_size: int, guidance: float, drawn: range) -> float:
    """Tokens a second of `batch_size` pictures side by side, at these places of the picture; what is before them goes
    through the model at once, with the prompt.
    """
    settings = Settings(Sampling(), (Sampling(top_k=4000),), guidance)
    ids = list(range(9000, 9000 + PROMPT))
    start = tuple(np.where(rules.block == CODE, RELEASED_IMAGE_IDS.start, rules.block)[: drawn.start].tolist())
    prompts = [
        Prompt(model.embed(ids), np.random.default_rng(n), start, True, True, drawn.stop, lambda head: start)
        for n in range(batch_size)
    ]
    began = time.perf_counter()
    answers = Decoder(model, rules, settings).answer(prompts)
    return sum(len(answer.tokens) - len(start) for answer in answers) / (time.perf_counter() - began)


def memory_rate(device: torch.device) -> float:
    """The best observed rate of reading memory, bytes/s."""
    data, best = torch.ones(1 << 28 if device.type == "cuda" else 1 << 26, device=device), 0.0
    for _ in range(8):
        began = time.perf_counter()
        data.sum().item()
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    run_command(main)
