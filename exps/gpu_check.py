"""What a first hour on a GPU should settle: speed, memory, whether codes are the same everywhere, and the training.

    python exps/gpu_check.py speed,invariance            some parts
    python exps/gpu_check.py                             all of them
    python exps/gpu_check.py --small --device cpu        the rehearsal: small model, few images

Every line is JSON, and several parts are a process each. `expected` is what counting FLOPs and bytes says of one H100;
a figure far below it names the place to look at. Weights are drawn, which changes no timing. Parts:

    env         matrix rates of the number formats and the rate of a copy: what bounds everything else; versions
    golden      codes of the test images against the published implementation's
    speed       images/s at 256 and the anchors, by number format and batch, with peak memory; by plain formulas, our
                kernels and compiled, the two also as CUDA graphs, and whether the codes are the same
    vqgan       the same of Chameleon's, for pre-tokenization at 512
    kernels     the 25 kernels that take most of the time in bf16
    invariance  an image's features beside other neighbours, at another place, again, and in padding: all equal
    search      nearest codes against fp64, ties and NaN
    syncs       encoding never waits for the GPU
    attention   which kernel runs, and how far it is from fp64
    job         the whole job from JPEGs, by decoding threads: what is the limit?
    train       tokens/s and MFU of eight 7B-shaped layers and the whole tower, by stage, recomputation and shape
    packed      attention over packed samples in one call against one call a sample
    resume      a toy's training in bf16, fp16 and fp32, in one go and gone on with; on two GPUs, too, where there are
"""

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_codebook import CONFIGS, flop_per_image, write_dataset
from benchmark_train import drawn_batch, sharded_step
from gpu_agreement import features_elsewhere, golden_codes, nearest, resumed_runs
from measure import describe_machine, make_images, matrix_rate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import training.models.attention as attention_of
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from training.parallel import process_group
from training.report import peak_flops
from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.codebook.graphs import Recordings
from vision_tokenizer.codebook.job import run_codebook_inference
from vision_tokenizer.codebook.output import Settings
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN, VqganSizes
from vision_tokenizer.models.compiled import compile_modules
from vision_tokenizer.models.dualvitok.config import read_config
from vision_tokenizer.models.dualvitok.model import DualViTok, compile_encoder, place
from vision_tokenizer.models.fused import kernel_facts, plain_formulas, prepare
from vision_tokenizer.models.layers import ConvSizes
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.cli import command_parser
from vistoken.device import choose_dtype, default_workers, device_facts, float32_products, local_device
from vistoken.jobs.workers import OneProcess

EXPECTED = {"bf16": 650, "tf32": 200, "fp32": 70}  # images/s at 256, batch 32: half of the peak, a third, all of it


def tell(part: str, **figures: object) -> None:
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"part": part, **rounded}), flush=True)


class Check:
    """The device, the model's size, and what every part measures with."""

    def __init__(self, device: torch.device, small: bool):
        self.device, self.small = device, small
        self.on_gpu = device.type == "cuda"
        self.config = CONFIGS["small" if small else "full"]

    def model(self, dtype: str) -> DualViTok:
        """An encoder with drawn weights; the same numbers on every call."""
        self.free()
        with torch.device("meta"):
            model = DualViTok(read_config(self.config), decoder=False).eval().requires_grad_(False)
        model.to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        for name, tensor in model.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
            else:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        place(model, self.device, dtype)
        return model

    def images(self, batch: int, height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        made = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        return made.pin_memory() if self.on_gpu else made

    def pixels(self, batch: int, height: int, width: int) -> Tensor:
        return normalize(self.images(batch, height, width).to(self.device))

    def encode(self, tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, ...]:
        """As the job does it."""
        return tokenizer.encode(normalize(images.to(self.device, non_blocking=True)))

    def seconds(self, work: Callable[..., object], *given: object, calls: int = 5) -> tuple[float, float]:
        """Seconds of `work(*given)` on the device, and until it returns: what Python and the launches cost."""
        work(*given)
        self.wait()
        began, launching = time.perf_counter(), 0.0
        for _ in range(calls):
            call = time.perf_counter()
            work(*given)
            launching += time.perf_counter() - call
        self.wait()
        return (time.perf_counter() - began) / calls, launching / calls

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0


def env(check: Check) -> None:
    for dtype in ("bf16", "tf32", "fp32"):
        tell("env", matrix=dtype, tflops=matrix_rate(check.device, dtype) / 1e12)
    source = torch.empty(2**30 if check.on_gpu else 2**22, device=check.device)
    target = torch.empty_like(source)
    took, _ = check.seconds(target.copy_, source)
    tell("env", copy_tb_s=2 * source.nbytes / took / 1e12, **describe_machine(check.device))
    prepare(check.device, torch.bfloat16)
    tell("env", **device_facts(check.device), **kernel_facts(check.device))


def speed(check: Check) -> None:
    sizes = {(256, 256): (1, 8, 32, 64, 128), (384, 512): (32,), (512, 512): (8, 32, 64)}
    if check.small:
        sizes = {(256, 256): (1, 4), (384, 512): (2,)}
    for dtype in ("bf16", "tf32", "fp32"):
        model = check.model(dtype)
        for figures in ways(check, model, compile_encoder, sizes):
            size, batch, images_s = figures["size"], figures["batch"], figures.get("images_s")
            if images_s:
                figures["tflops"] = images_s * flop_per_image(check.config, *size) / 1e12
                figures["expected"] = EXPECTED[dtype] if size == (256, 256) and batch == 32 else None
            tell("speed", dtype=dtype, **figures)


def vqgan(check: Check) -> None:
    conv = ConvSizes(32, (1, 2), 1, (), 32) if check.small else ConvSizes(128, (1, 1, 2, 2, 4), 2, (), 256)
    sizes = {(64, 64): (2,)} if check.small else {(512, 512): (8, 32), (640, 384): (32,)}
    for dtype in ("bf16", "fp32"):
        check.free()
        torch.manual_seed(0)
        model = ChameleonVQGAN(VqganSizes(conv, 8192, conv.z_channels), decoder=False).eval().requires_grad_(False)
        torch.nn.init.normal_(model.quantize.embedding.weight)
        model.quantize.prepare()
        for part in (model.encoder, model.quant_conv):
            part.to(choose_dtype(dtype)).to(memory_format=torch.channels_last)
        model.to(check.device)
        prepare(check.device, choose_dtype(dtype))
        for figures in ways(check, model, lambda model: compile_modules([model.encoder], check.device), sizes):
            tell("vqgan", dtype=dtype, **figures)


def ways(
    check: Check,
    model: ImageTokenizer,
    compile: Callable[..., None],
    sizes: Mapping[tuple[int, int], Sequence[int]],
) -> Iterator[dict[str, Any]]:
    """What it takes to encode batches in each way, and whether their codes are those of the first way."""
    plain: dict[object, tuple[Tensor, ...]] = {}
    for way in ("plain", "fused", "fused, graphs", "compiled", "compiled, graphs"):
        if way == "compiled":
            compile(model)
        if way not in ("plain", "compiled") and not check.on_gpu:
            continue  # a CPU has neither graphs nor kernels of our own
        for size, batches in sizes.items():
            for batch in batches if way == "fused" or not check.on_gpu else [max(b for b in batches if b <= 32)]:
                check.free()
                encode = Recordings(model).encode if "graphs" in way else partial(check.encode, model)
                figures: dict[str, object] = {"way": way, "size": size, "batch": batch}
                images = check.images(batch, *size)
                try:
                    with plain_formulas() if way == "plain" else nullcontext():
                        took, launching = check.seconds(encode, images, calls=3)
                        codes = tuple(grid.clone() for grid in encode(images))
                except torch.OutOfMemoryError:
                    yield figures | {"out_of_memory": True}
                    continue
                first = plain.setdefault((size, batch), codes)
                yield figures | {
                    "images_s": batch / took,
                    "launch_ms": launching * 1e3,
                    "device_ms": took * 1e3,
                    "peak_gib": check.peak_gib(),
                    "codes": digest(codes),
                    "codes_as_plain": [float((a == b).double().mean()) for a, b in zip(codes, first, strict=True)],
                }
                del encode  # and the memory of its recordings


def digest(codes: tuple[Tensor, ...]) -> str:
    return hashlib.sha256(b"".join(grid.cpu().numpy().tobytes() for grid in codes)).hexdigest()[:16]


def kernels(check: Check) -> None:
    model, pixels = check.model("bf16"), check.pixels(2 if check.small else 32, 256, 256)
    model.encode(pixels)
    kind = torch.profiler.ProfilerActivity.CUDA if check.on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        model.encode(pixels)
        check.wait()

    def took(row: Any) -> float:
        return row.self_device_time_total if check.on_gpu else row.self_cpu_time_total

    for row in sorted(profile.key_averages(), key=took, reverse=True)[:25]:
        tell("kernels", name=row.key[:90], calls=row.count, ms=took(row) / 1e3)


def syncs(check: Check) -> None:
    model, pixels = check.model("bf16"), check.pixels(2, 256, 256)
    model.encode(pixels)
    if check.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.encode(pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    tell("syncs", encode="none" if check.on_gpu else "not on a CPU")


def attention(check: Check) -> None:
    heads, width, batch = (4, 32, 2) if check.small else (16, 80, 32)
    cases = {
        "ViT": (batch, heads, 324, width),
        "pixel attention": (batch, 1, 1024, 64 if check.small else 512),
    }
    backends = (None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    for name, shape in cases.items():
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v = (torch.randn(shape, device=check.device, dtype=dtype) for _ in range(3))
            took: dict[str, float | None] = {}
            for backend in backends:
                label = backend.name if backend else "chosen"
                try:
                    if backend:
                        with sdpa_kernel(backend):
                            took[label] = check.seconds(F.scaled_dot_product_attention, q, k, v)[0] * 1e3
                    else:
                        took[label] = check.seconds(F.scaled_dot_product_attention, q, k, v)[0] * 1e3
                except RuntimeError:  # this kernel does not take these inputs
                    took[label] = None
            exact = F.scaled_dot_product_attention(q[:2].double(), k[:2].double(), v[:2].double())
            error = (F.scaled_dot_product_attention(q, k, v)[:2].double() - exact).abs().max() / exact.abs().max()
            tell("attention", case=name, dtype=str(dtype), ms=took, error=float(error))


def job(check: Check) -> None:
    count, distinct, batch = (8, 4, 2) if check.small else (6144, 64, 32)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        made = make_images(base / "made", distinct)
        (base / "images").mkdir()
        for number in range(count):
            os.link(made[number % distinct], base / "images" / f"{number}.jpg")
        for dtype in ("bf16", "tf32"):
            model = check.model(dtype)
            alone, _ = check.seconds(model.encode, check.pixels(batch, 256, 256))
            for workers, graphs in product((2,) if check.small else (4, 8, 16), (False, True)):
                if graphs and not check.on_gpu:
                    continue
                names, root = [[f"{n}.jpg"] for n in range(count)], base / f"{dtype}{workers}{graphs}"
                data = write_dataset(root, base / "images", names)
                settings = Settings("fixed", 256, torch_dtype=dtype, batch_size=batch, cuda_graphs=graphs)
                began = time.perf_counter()
                counts, _ = run_codebook_inference(
                    read_data_config(data), model, settings, OneProcess(), num_workers=workers
                )
                tell(
                    "job",
                    dtype=dtype,
                    decode_threads=workers,
                    cuda_graphs=graphs,
                    cores=default_workers(),
                    images_s=counts["bench"].done / (time.perf_counter() - began),
                    device_alone_images_s=batch / alone,
                    seconds={stage: round(took, 2) for stage, took in counts["bench"].seconds.items()},
                )


def train(check: Check) -> None:
    """Expected: half of the peak without recomputation, an MFU of 37 % with all of it, 43 % with `selective`."""
    sizes, vision = LLMConfig(num_hidden_layers=8), VisionConfig()
    shapes = {"pictures": (4, 4096, 1), "anyres": (4, 4096, 5), "short": (4, 200, 0), "many short": (64, 200, 0)}
    if check.small:
        sizes, vision = LLMConfig(9100, 64, 128, 2, 4, 4), VisionConfig(32, 64, 2, 2, image_size=56)
        shapes = {"pictures": (2, 64, 1), "many short": (8, 16, 0)}
    ways = [("I", "full"), ("II", "full"), ("II", "selective"), ("II", "none")]
    for (stage, checkpointing), compiled in product(ways, (False, True) if check.on_gpu else (False,)):
        with process_group(check.device.type), float32_products(tf32=True):
            train_in_a_way(check, sizes, vision, shapes, stage, checkpointing, compiled)


def train_in_a_way(
    check: Check,
    sizes: LLMConfig,
    vision: VisionConfig,
    shapes: Mapping[str, tuple[int, int, int]],
    stage: str,
    checkpointing: str,
    compiled: bool,
) -> None:
    """In a function of its own, so that the model and its optimizer are gone before there are the next."""
    check.free()
    step, flops = sharded_step(stage, sizes, vision, check.device, checkpointing=checkpointing, compiled=compiled)
    for shape, (samples, length, tiles) in shapes.items():
        on_cpu = drawn_batch(sizes, vision, samples=samples, length=length, tiles=tiles)
        way = {"stage": stage, "recomputed": checkpointing, "compiled": compiled, "shape": shape}
        check.free()
        try:
            batch = on_cpu.to(check.device)
            began = time.perf_counter()
            step(batch)
            check.wait()
            first = time.perf_counter() - began
            took, launching = check.seconds(step, batch)
        except torch.OutOfMemoryError:  # what FSDP had gathered stays: this way ends here
            tell("train", **way, out_of_memory=True)
            return
        rate = flops.of(on_cpu) / took
        tell(
            "train",
            **way,
            tokens_s=len(batch.tokens) / took,
            tflops=rate / 1e12,
            mfu=rate / peak if (peak := peak_flops("bf16")) else None,
            ms=took * 1e3,
            launch_ms=launching * 1e3,
            first_seconds=first,
            peak_gib=check.peak_gib(),
        )
    if check.on_gpu:  # does a step wait for the GPU? clipping's norm is not asked for here
        torch.cuda.set_sync_debug_mode("warn")
        step(batch)
        torch.cuda.set_sync_debug_mode("default")


def packed(check: Check) -> None:
    heads, width = (4, 16) if check.small else (32, 128)
    dtype = torch.bfloat16 if check.on_gpu else torch.float32
    for sizes in ([64, 3, 17], [16] * 4) if check.small else ([4096] * 4, [200] * 64, [100, 4000, 700, 3000]):
        q, k, v = (torch.randn(sum(sizes), heads, width, device=check.device, dtype=dtype) for _ in "qkv")
        spans = attention_of.Spans.of(sizes, check.device)
        together = attention_of.packed_attention(q, k, v, spans)
        alone = attention_of.attention_by_sample(q, k, v, spans.bounds, causal=True)
        tell(
            "packed",
            samples=len(sizes),
            tokens=sum(sizes),
            one_call_ms=check.seconds(attention_of.packed_attention, q, k, v, spans)[0] * 1e3,
            by_sample_ms=check.seconds(attention_of.attention_by_sample, q, k, v, spans.bounds, True)[0] * 1e3,
            largest_difference=float((together - alone).abs().max()),
        )


def golden(check: Check) -> None:
    for figures in golden_codes(check.device):
        tell("golden", **figures)


def invariance(check: Check) -> None:
    for figures in features_elsewhere(check):
        tell("invariance", **figures)


def search(check: Check) -> None:
    tell("search", **nearest(check.device))


def resume(check: Check) -> None:
    for figures in resumed_runs(check.device):
        tell("resume", **figures)


ALL = (env, golden, speed, vqgan, kernels, invariance, search, syncs, attention, job, train, packed, resume)
PARTS = {part.__name__: part for part in ALL}


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("parts", nargs="?", default=",".join(PARTS), help="names with commas between")
    parser.add_argument("--small", action="store_true", help="rehearse with a small model")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if unknown := [name for name in args.parts.split(",") if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    names = args.parts.split(",")
    if len(names) > 1:  # a process each: one that fails takes neither the figures nor the memory of others
        more = ["--device", args.device, *(["--small"] if args.small else [])]
        failed = [name for name in names if subprocess.run([sys.executable, __file__, name, *more]).returncode]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    check = Check(local_device(args.device), args.small)
    began = time.perf_counter()
    PARTS[names[0]](check)
    tell(names[0], took_seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
