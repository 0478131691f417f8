"""What the trainer costs, measured: steps, start-up, data loading and, on a GPU, utilisation.

    python exps/benchmark_train.py                    # all parts; the last line of the output is JSON
    python exps/benchmark_train.py --parts steps,loader

A training step is bound by matrix products: 6 operations a weight and token, 4 where the weight is frozen. Whatever
does no such product, or does it for padding, is lost. `steps` runs the same model on the same samples in two ways, each
in a process of its own: the trainer (samples of similar length packed without padding, logits of labelled positions
only and a chunk at a time) and a plain loop (random batches padded to their longest, all logits in fp32 at once).
`utilisation` needs a GPU: layers of the 7B model, and the rate of the device's own matrix product to compare with.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import describe_machine, matrix_rate, timed
from PIL import Image
from torch import nn

from pre_tokenize.record import Record
from pre_tokenize.token_file import TokenFiles, TokenSample, shard_bytes
from training.assemble import freeze
from training.config import STAGES
from training.data.index import fingerprint, open_indexed
from training.data.loading import Batches, ImageReader, SampleRules, make_loader
from training.data.packing import IMAGE_END, IMAGE_START, Batch, Sample, pack
from training.data.sampler import OpenSource, RankBatches, Sampler
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from training.models.unitoken import UniToken
from training.models.units import compile_unit, recompute
from training.parallel import process_group, shard
from training.report import Flops, memory_used
from vistoken.cli import command_parser

CPU_LLM = LLMConfig(16384, 256, 688, 4, 4, 4)
GPU_LLM = LLMConfig(num_hidden_layers=4)
TOWER = VisionConfig(32, 64, 1, 2, image_size=112)
SAMPLES, BATCH = 64, 8


def samples(vocab: int, longest: int) -> list[Sample]:
    """Text of lengths from 64 to `longest`, short ones as frequent as long ones on a logarithmic scale."""
    random = np.random.default_rng(0)
    made = []
    for number in range(SAMPLES):
        length = int(64 * (longest / 64) ** random.random())
        tokens = random.integers(9000, vocab, length)
        labels = np.where(np.arange(length) > length // 2, tokens, -100)
        made.append(Sample(str(number), tokens, labels, np.full(length, -1), [], 0))
    return made


def packed_batches(items: list[Sample]) -> Iterator[Batch]:
    sampler = Sampler([OpenSource(Path("text"), lengths=np.array([len(item) for item in items]))], BATCH, seed=0)
    for numbers in sampler.epoch(0):
        yield pack([items[number] for number in numbers], TOWER.image_size)


def packed_loss(model: UniToken, batch: Batch, device: torch.device) -> torch.Tensor:
    return model(batch.to(device))[0] / batch.label_count


def padded_batches(items: list[Sample]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = np.random.default_rng(0).permutation(len(items)).reshape(-1, BATCH)
    for rows in order:
        longest = max(len(items[row]) for row in rows)
        tokens, labels = torch.zeros(BATCH, longest, dtype=torch.long), torch.full((BATCH, longest), -100)
        for place, row in enumerate(rows):
            tokens[place, : len(items[row])] = torch.from_numpy(items[row].tokens)
            labels[place, : len(items[row])] = torch.from_numpy(items[row].labels)
        yield tokens, labels


def padded_loss(model: UniToken, batch: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> torch.Tensor:
    tokens, labels = (part.to(device) for part in batch)
    count, length = tokens.shape
    positions = torch.arange(length, device=device).repeat(count)
    hidden = model.model(model.model.embed_tokens(tokens.flatten()), positions, torch.full((count,), length))
    logits = model.lm_head(hidden).float().view(count, length, -1)[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    z_loss = logits.logsumexp(-1)[targets >= 0].square().mean()
    return F.cross_entropy(logits, targets) + 1e-5 * z_loss


Make = Callable[[list[Sample]], Iterator[Any]]
Loss = Callable[[UniToken, Any, torch.device], torch.Tensor]
LOOPS: dict[str, tuple[Make, Loss]] = {
    "trainer": (packed_batches, packed_loss),
    "padded": (padded_batches, padded_loss),
}


def measure_loop(name: str) -> dict[str, float]:
    """Real tokens a second and peak memory of one way to train, over all samples after a first batch to warm up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = GPU_LLM if device.type == "cuda" else CPU_LLM
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = UniToken(sizes, TOWER, z_weight=1e-5).to(device, dtype)
    for unit in model.units():
        recompute(unit, selective=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    make, loss = LOOPS[name]
    items = samples(sizes.vocab_size, 4096 if device.type == "cuda" else 1024)

    def steps(batches: Iterable[Any]) -> None:
        for batch in batches:
            loss(model, batch, device).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps([next(make(items))])
    seconds = timed(lambda: steps(make(items)))  # data included
    return {"tokens_per_second": sum(map(len, items)) / seconds, "peak_gib": memory_used() / 2**30}


def steps() -> dict[str, dict[str, float]]:
    """Each loop in its own process, so that neither's memory counts for the other."""
    found = {}
    for name in LOOPS:
        done = subprocess.run([sys.executable, __file__, "--loop", name], capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def startup(count: int = 5_000_000) -> dict[str, float]:
    """Opening a record of `count` entries for the first time and again, and the order of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        with record.open("w") as file:
            for i in range(count):
                file.write(f'{{"file":"files/{i // 1024}.arrow","row":{i % 1024},"len":{1000 + i % 997},"id":{i}}}\n')
        found = {"entries": count, "record_mb": record.stat().st_size / 1e6}

        def open_record() -> Record:
            return open_indexed(record, fingerprint(record), record.parent)

        found["first_seconds"] = timed(open_record)
        found["again_seconds"] = timed(open_record)
        before = anonymous_memory()
        sampler = Sampler([OpenSource(record, lengths=open_record().lengths)], 128, seed=0)
        found["first_step_seconds"] = timed(lambda: next(sampler.epoch(0)))
        found["memory_mb"] = (anonymous_memory() - before) / 1e6
        found["read_record_seconds"] = timed(lambda: Record.load(record))
    return found


def loader(count: int = 96) -> dict[str, float]:
    """Samples a second with one 1024 x 768 JPEG each, by variant and number of processes."""
    random, found = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        noise = Image.fromarray(random.integers(0, 255, (96, 128, 3), np.uint8)).resize((1024, 768))
        noise.save(Path(folder) / "image.jpg")
        block = np.concatenate(([IMAGE_START], np.full(1058, 100), [IMAGE_END]))
        tokens = np.concatenate((block, random.integers(9000, 10000, 60))).astype(np.int32)
        mask = np.arange(len(tokens)) > 1060
        image = (str(Path(folder) / "image.jpg"),)
        (Path(folder) / "files").mkdir()
        (Path(folder) / "files/0.arrow").write_bytes(
            shard_bytes([TokenSample(i, tokens, mask, image) for i in range(count)], {})
        )
        lines = [f'{{"file":"files/0.arrow","row":{i},"len":{len(tokens)},"id":{i}}}' for i in range(count)]
        (Path(folder) / "record.jsonl").write_text("\n".join(lines))
        files = TokenFiles(Path(folder) / "record.jsonl")
        source = OpenSource(Path("record.jsonl"), lengths=files.lengths)
        order = RankBatches(Sampler([source], 8, seed=0), 1, 1, 0, 1, (0, 0))
        for variant in ("base", "anyres"):
            rules = SampleRules(65536, 4096, continuous=ImageReader(384, 27, variant == "anyres"))
            for workers in sorted({0, 2, os.cpu_count() or 1}):
                batches = make_loader(Batches([files], rules), order, workers, pin=False)
                found[f"{variant}, {workers} processes"] = count / timed(partial(list, batches))
    return found


def utilisation() -> dict[str, float | str]:
    """7B-shaped layers in both stages' settings, compiled and not, against the device's matrix product."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    found: dict[str, float | str] = {"matmul_tflops": matrix_rate(torch.device("cuda"), "bf16") / 1e12}
    for stage in STAGES:
        for compiled in (False, True):
            with process_group() as device:
                name = f"stage {stage}{', compiled' if compiled else ''}"
                found |= {f"{name}: {key}": value for key, value in sharded_steps(stage, compiled, device).items()}
    return found


def sharded_steps(stage: str, compiled: bool, device: torch.device) -> dict[str, float]:
    """Steps of packed text through eight layers of the 7B model and the whole tower, with the sharded trainer."""
    sizes, vision = LLMConfig(num_hidden_layers=8), VisionConfig()
    step, flops = sharded_step(stage, sizes, vision, device, compiled=compiled)
    batch = drawn_batch(sizes, vision, samples=4, length=4096, tiles=1).to(device)
    for _ in range(3):
        step(batch)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: [step(batch) for _ in range(5)]) / 5
    return {
        "tokens_per_second": len(batch.tokens) / seconds,
        "tflops": flops.of(batch) / seconds / 1e12,
        "peak_gib": memory_used() / 2**30,
    }


def sharded_step(
    stage: str,
    sizes: LLMConfig,
    vision: VisionConfig,
    device: torch.device,
    *,
    checkpointing: str = "full",
    compiled: bool = False,
) -> tuple[Callable[[Batch], torch.Tensor], Flops]:
    """An optimizer step of one batch, as the trainer makes it, of a model with drawn weights; it returns the loss.

    `checkpointing` is none, selective or full.
    """
    with torch.device("meta"):
        model = UniToken(sizes, vision, z_weight=1e-5, dropout=0.05)
    freeze(model, STAGES[stage]["trainable_params"])
    flops = Flops(model, sizes, vision)
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for unit in model.units() if checkpointing != "none" else ():
        recompute(unit, selective=checkpointing == "selective")
    shard(model, device, "bf16", reshard=True)
    for unit in model.units() if compiled else ():
        compile_unit(unit)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(batch: Batch) -> torch.Tensor:
        loss = model(batch)[0] / batch.label_count
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, flops


def drawn_batch(sizes: LLMConfig, vision: VisionConfig, *, samples: int, length: int, tiles: int) -> Batch:
    """Samples of `length` tokens, the first of them continuous ones of `tiles` tiles where there are any."""
    random, made = np.random.default_rng(0), []
    blank = np.zeros((tiles, 3, vision.image_size, vision.image_size), np.uint8)
    for number in range(samples):
        ids = random.integers(sizes.vocab_size // 2, sizes.vocab_size, length)
        rows = np.full(length, -1)
        count = min(tiles * vision.grid**2, length // 2)
        rows[:count] = np.arange(count)
        made.append(Sample(str(number), ids, ids, rows, [blank] if tiles else [], tiles * vision.grid**2))
    return pack(made, vision.image_size)


def anonymous_memory() -> int:
    """Bytes this process holds that are not pages of files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


PARTS: dict[str, Callable[[], Mapping[str, Any]]] = {
    "steps": steps,
    "startup": startup,
    "loader": loader,
    "utilisation": utilisation,
}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, separated by commas")
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.loop:
        print(json.dumps(measure_loop(args.loop)))
        return 0
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    results = {**machine, "threads": torch.get_num_threads()}
    for part in args.parts.split(","):
        results[part] = PARTS[part]()
        print(part, json.dumps(results[part], indent=2), flush=True)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
