"""An import and its small sources, for its tests."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vision_tokenizer.codebook.annotations import image_names, image_path, read_data_config
from vision_tokenizer.tokenizer.import_annotations import main

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cup."}]
TALK = json.dumps({"image": "photo.jpg", "conversations": TURNS})


def run(tmp_path, kind, source, *more, task="generation"):
    """Import; returns (exit code, items, problems, data set)."""
    root = tmp_path / "imported"
    code = main(["--format", kind, "--source", str(source), "--root", str(root), "--task", task, *map(str, more)])
    (dataset,) = read_data_config(root / "data_config.json")
    items = [json.loads(line) for file in dataset.annotation_files() for line in file.read_text("utf-8").splitlines()]
    rejected = sorted((root / "import").glob("*.rejected.jsonl"))
    problems = [json.loads(line) for file in rejected for line in file.read_text("utf-8").splitlines()]
    for item in items:
        assert all(image_path(dataset.image_dir, name).is_file() for name in image_names(item))
    return code, items, problems, dataset


def reasons(problems):
    return [problem["reason"] for problem in problems]


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def parquet_of(path: Path, columns: dict, rows: int) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path
