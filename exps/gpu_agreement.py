"""Parts of gpu_check.py that ask what must be equal: codes, features, nearest codes, a training that was stopped."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from measure import PHOTOS, REPO

from pre_tokenize.token_file import TokenSample, shard_bytes
from training.data.packing import IMAGE_END, IMAGE_START
from vision_tokenizer.codebook.annotations import OUTPUT_FIELDS, read_data_config
from vision_tokenizer.codebook.job import run_codebook_inference
from vision_tokenizer.codebook.output import Settings
from vision_tokenizer.models.dualvitok.model import load_dualvitok
from vision_tokenizer.models.nearest import NO_CODE, nearest_codes
from vistoken.jobs.workers import OneProcess

if TYPE_CHECKING:
    from gpu_check import Check

GOLDEN = REPO / "tests" / "golden"
DATASETS = ("generation", "editing")
MODES = {"fixed_256": ("fixed", 256), "fixed_anchors": ("fixed_anchors", 512)}
STEPS = 12


def golden_codes(device: torch.device) -> Iterator[dict[str, object]]:
    """The published implementation's codes of the test images, beside those of the job on `device`."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        synthetic_tensor = runpy.run_path(str(GOLDEN / "synthetic_weights.py"))["synthetic_tensor"]
        shapes = json.loads((GOLDEN / "dualvitok_small_keys.json").read_text())
        state = {name: torch.from_numpy(synthetic_tensor(name, tuple(shape))) for name, shape in shapes.items()}
        torch.save(state, base / "pytorch_model.bin")
        for dtype in ("fp32", "tf32", "bf16"):
            config = GOLDEN / "codebook" / "dualvitok_small.py"
            model = load_dualvitok(config, base / "pytorch_model.bin", device=device, dtype=dtype)
            for tag, (kind, resolution) in MODES.items():
                root = base / dtype / tag
                data = write_data_config(root)
                batch_size = 32 if device.type == "cuda" else 1
                settings = Settings(kind, resolution, torch_dtype=dtype, batch_size=batch_size)
                run_codebook_inference(read_data_config(data), model, settings, OneProcess(), num_workers=2)
                found, wanted = [], []
                for file in sorted((GOLDEN / "codebook" / "expected").glob(f"*/{tag}/*.jsonl")):
                    name = file.parts[-3]
                    found += read_codes(root / name / "jsonl_after_tokenizer" / "dualvitok" / tag / file.name)
                    wanted += read_codes(file)
                yield {"dtype": dtype, "mode": tag, **agreement(dict(found), dict(wanted))}


def write_data_config(root: Path) -> Path:
    entries = {}
    for name in DATASETS:
        folders = {"image_dir": GOLDEN / "images", "annotation_dir": GOLDEN / "codebook" / name / "annotations"}
        entries[name] = {"root": str(root / name), "tokenizer_inference": True} | {
            k: str(v) for k, v in folders.items()
        }
    root.mkdir(parents=True)
    (root / "meta.json").write_text(json.dumps(entries))
    return root / "meta.json"


def read_codes(file: Path) -> list[tuple[str, list]]:
    """(item, codes of its images by branch) of each line."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        (
            json.dumps({k: v for k, v in line.items() if k not in OUTPUT_FIELDS}, sort_keys=True),
            line["image_embed_inds"],
        )
        for line in lines
    ]


def agreement(found: dict[str, list], wanted: dict[str, list]) -> dict[str, object]:
    """Whether the same items have codes, and the share of these that are equal."""
    pairs = [
        (np.array(ours), np.array(theirs))
        for item in wanted.keys() & found.keys()
        for images in zip(found[item], wanted[item], strict=True)
        for ours, theirs in zip(*images, strict=True)
    ]
    equal = sum(int((ours == theirs).sum()) for ours, theirs in pairs)
    codes = sum(theirs.size for _, theirs in pairs)
    return {"same_items": found.keys() == wanted.keys(), "codes": codes, "equal": equal / codes}


def features_elsewhere(check: "Check") -> Iterator[dict[str, object]]:
    """Features of an image again, at another place, and beside other neighbours: they should be equal."""
    batch = 4 if check.small else 32
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(3)).to(check.device)
    kept = max(1, batch // 6)
    for dtype in ("fp32", "tf32", "bf16"):
        model = check.model(dtype)
        for size in ((256, 256), (384, 512)):
            pixels = check.pixels(batch, *size)
            padded = pixels.clone()
            padded[kept:] = 0
            for branch, features in (("semantic", model.semantic_features), ("pixel", model.pixel_features)):
                with torch.no_grad():
                    first, again, moved, alone = (features(x) for x in (pixels, pixels, pixels[order], padded))
                yield {
                    "dtype": dtype,
                    "size": size,
                    "branch": branch,
                    "again": torch.equal(first, again),
                    "place": torch.equal(first[order], moved),
                    "neighbours": torch.equal(first[:kept], alone[:kept]),
                    "worst": float((first[order] - moved).abs().max() / first.abs().max()),
                }


def nearest(device: torch.device) -> dict[str, object]:
    """The search beside one in fp64: ties go to the first, and what is no number has no code."""
    generator = torch.Generator(device).manual_seed(0)
    book = torch.randn(20_000, 32, device=device, generator=generator)
    book[[300, 9000, 19_000]] = book[17].clone()
    half_norms = (book.double().square().sum(1) / 2).float()
    ties = nearest_codes(book[17].expand(2048, 32), book, half_norms)
    none = nearest_codes(torch.full((1, 32), float("nan"), device=device), book, half_norms)
    features = torch.randn(4096, 32, device=device, generator=generator)
    exact = torch.cdist(features.double(), book.double()).argmin(1)
    equal = (nearest_codes(features, book, half_norms) == exact).double().mean()
    return {"first_of_ties": bool((ties == 17).all()), "nan": int(none) == NO_CODE, "equal_to_fp64": float(equal)}


def resumed_runs(device: torch.device) -> Iterator[dict[str, object]]:
    """A toy's training in one go, and stopped in the middle and gone on with. Over two GPUs, too, where there are."""
    counts = (1, 2) if torch.cuda.device_count() > 1 else (1,)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        data, toy = write_samples(base / "data"), base / "toy"
        tokenizer = REPO / "checkpoints" / "chameleon_small"
        command([REPO / "training" / "toy_model.py", "--tokenizer", tokenizer, "--output_dir", toy], device)
        common = ["--init_from", toy / "llm", "--vit_from", toy / "siglip", "--data_config", data, "--lr", "1e-3"]
        common += ["--unmask_image_logits", "--variant", "anyres", "--global_batch_size", "4", "--epochs", "4"]
        common += ["--num_workers", "1", "--checkpointing"]
        for processes in counts:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            for precision in ("bf16", "fp16", "fp32"):
                losses = {}
                for name, stops in {"whole": (STEPS,), "parts": (STEPS // 2, STEPS)}.items():
                    output = base / f"{precision}{processes}" / name
                    for stop in stops:
                        limits = ["--output_dir", output, "--max_steps", str(stop), "--precision", precision]
                        command([*launcher, REPO / "training" / "train.py", *common, *limits], device)
                    lines = (output / "metrics.jsonl").read_text().splitlines()
                    losses[name] = np.array([json.loads(line)["c_loss"] for line in lines])
                apart = np.abs(losses["parts"] / losses["whole"] - 1)
                yield {
                    "precision": precision,
                    "processes": processes,
                    "steps": len(losses["whole"]),
                    "first_loss": float(losses["whole"][0]),
                    "last_loss": float(losses["whole"][-1]),
                    "to_the_last_bit": bool((apart == 0).all()),
                    "largest_difference": float(apart.max()),
                }


def command(arguments: list, device: torch.device) -> None:
    hidden = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    given = [sys.executable, *map(str, arguments)]
    done = subprocess.run(given, cwd=REPO, env={**os.environ, **hidden}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(given)}\n{done.stdout}\n{done.stderr}")


def write_samples(folder: Path, count: int = 32) -> Path:
    """A data config of text, and of photographs of different shapes."""
    random, made = np.random.default_rng(0), []
    photos = sorted(PHOTOS.glob("*.jpg"))
    for number in range(count):
        text = random.integers(8900, 9200, int(random.integers(20, 200)))
        block = np.concatenate(([IMAGE_START], random.integers(4, 100, 64), [IMAGE_END]))
        images = (str(photos[number % len(photos)]),) if number % 2 else ()
        tokens = np.concatenate((block, text) if images else (text,)).astype(np.int32)
        made.append(TokenSample(number, tokens, np.arange(len(tokens)) >= len(tokens) - len(text) // 2, images))
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "0.arrow").write_bytes(shard_bytes(made, {}))
    entries = [{"file": "files/0.arrow", "row": row, "len": len(s.tokens), "id": s.id} for row, s in enumerate(made)]
    (folder / "record.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "data.yaml").write_text(f"META:\n  - path: {folder / 'record.jsonl'}\n")
    return folder / "data.yaml"
