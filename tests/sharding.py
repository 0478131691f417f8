"""Shards made on the spot, the codebook command run over them, and what it wrote."""

import io
import tarfile
from pathlib import Path

from codebook_job import read_lines, run_here, write_config
from PIL import Image

FAST = ("--resolution_type", "fixed", "--resolution", "64", "--max_failed", "1")


def picture(number: int, size: tuple[int, int] = (80, 64), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").rotate(7 * number).resize(size).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for number in range(first, first + count):
        members.append((f"{number:05}.jpg", picture(number)))
        members.append((f"{number:05}.txt", f"Picture {number}".encode()))
    return members


def shard_dataset(root: Path, pattern: Path | str, **more: str) -> dict:
    return {"root": str(root), "shards": str(pattern), "tokenizer_inference": True, **more}


def encode(tiny: tuple[Path, Path], base: Path, pattern: Path | str, *more: str, **options: str) -> tuple[int, Path]:
    """Run the command over shards; its exit code and the folder of its output."""
    base.mkdir(parents=True, exist_ok=True)
    config = write_config(base / "meta.json", set=shard_dataset(base / "root", pattern, **options))
    code = run_here(*tiny, config, *FAST, *more)
    return code, output(base)


def output(base: Path) -> Path:
    (folder,) = (base / "root" / "jsonl_after_tokenizer" / "dualvitok").iterdir()
    return folder


def lines(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def codes(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in lines(folder).items() if not name.endswith(".rejected.jsonl")}


def problems(folder: Path) -> list[tuple[str, str]]:
    return [(line["where"], line["reason"]) for path in folder.glob("*.rejected.jsonl") for line in read_lines(path)]
