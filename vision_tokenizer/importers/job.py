"""The import as a job: chunks of the source become results, these annotation files; every record is accounted for.

{root}/annotations/{name}.jsonl      the annotations, one file for each of the source's
{root}/images/...                    only where the source has them inside its files
{root}/import/                       manifest.json, {name}.rejected.jsonl, run_summary.json
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.importers.archives import Parquet, WebDataset
from vision_tokenizer.importers.formats import Coco, Format, Llava, Pairs
from vistoken.errors import UserError
from vistoken.jobs.chunks import Chunk, Item
from vistoken.jobs.counts import SUMMARY, Counts
from vistoken.jobs.files import write_bytes, write_json
from vistoken.jobs.manifest import read_manifest
from vistoken.jobs.progress import Progress
from vistoken.jobs.results import Results
from vistoken.jobs.run import WORK, JoinedSource, OpenChunk, Output, todo
from vistoken.jobs.shards import shard_stem
from vistoken.jobs.workers import Workers
from vistoken.store import Location

FORMATS: dict[str, type[Format]] = {
    "llava": Llava,
    "coco": Coco,
    "pairs": Pairs,
    "webdataset": WebDataset,
    "parquet": Parquet,
}
_MANIFEST_FORMAT = "vistoken-import-"


def run_import(kind: str, source: Format, root: Path, workers: Workers, overwrite: bool) -> dict[str, Counts]:
    """Import `source` into `root`; returns, on the first worker, the counts of each annotation file written.

    Raises `UserError` if `root` holds another import, unless it is to be overwritten; and always where writing would
    destroy what no import made.
    """
    output = ImportOutput(kind, source, root)
    output.check_targets()
    items = sum(file.table.items or 0 for file in output.sources)
    with (
        output.begin(workers, "any" if overwrite else None),
        Progress(workers, items or None, "importing", rates=()) as progress,
    ):
        for task in todo(output.sources, workers, progress):
            chunk = OpenChunk(replace(task, previous=None))  # one that failed in part is imported anew
            lines = []
            for item in chunk.todo():
                if item.error:
                    chunk.fail(item, item.error)
                else:
                    lines.append(item.raw + b"\n")
            if source.embeds_images:
                os.sync()  # the result says that its images are there, even after a power cut
            annotations = chunk.source.results.path(chunk.chunk.index, ".jsonl")
            chunk.save({annotations: b"".join(lines)}, progress=progress)
        progress.wait_for_all()
        return output.finish() if workers.rank == 0 else {}


class SourceTable:
    """A file of the source as the table that a job reads."""

    def __init__(self, source: Format, path: Path):
        self.path, self.fingerprint = path, source.fingerprint(path)
        self._source, self._chunks = source, source.chunks(path)
        self.items = sum(self[index].items for index in range(len(self)))  # 0 of a tar file, which does not tell

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> Chunk:
        return self._chunks[index]

    def read(self, chunk: Chunk) -> Iterator[Item]:
        return self._source.items(self.path, chunk)


@dataclass(eq=False)
class SourceFile(JoinedSource):
    """One file of the source on its way to an annotation file."""

    table: SourceTable
    rejected_dir: Path

    @property
    def rejected(self) -> Path:
        return self.rejected_dir / f"{self.output.stem}.rejected.jsonl"


class ImportOutput(Output):
    """The folders of a data set that an import makes. Raises `UserError` for a source without records."""

    sources: Sequence[SourceFile]

    def __init__(self, kind: str, source: Format, root: Path):
        self.root, self.source, folder = root, source, root / "import"
        files = []
        for path in source.files():
            stem = shard_stem(path.name)
            results, output = Results(folder / WORK / stem), root / "annotations" / f"{stem}.jsonl"
            files.append(SourceFile(SourceTable(source, path), results, output, folder))
        if not any(len(file.table) for file in files):
            raise UserError(f"{source.source}: no records in it")
        settings = {
            name: os.path.normpath(value.absolute()) if isinstance(value, Path) else str(value)
            for name, value in asdict(source).items()
            if name != "cache"
        }
        inputs = {file.table.path.name: file.table.fingerprint for file in files}
        manifest = {"format": f"{_MANIFEST_FORMAT}{kind}", "settings": settings, "inputs": inputs}
        super().__init__(folder, manifest, files)

    def check_targets(self) -> None:
        """Raises `UserError` where a folder to be written holds what is read, or what no import wrote there."""
        source = self.source
        earlier = FORMATS.get(str(self._earlier().get("format")).removeprefix(_MANIFEST_FORMAT))
        read = [source.source, *([] if source.embeds_images else [source.image_dir])]
        for folder in (self.root / "annotations", *([source.image_dir] if source.embeds_images else [])):
            for given in read:
                if given.resolve().is_relative_to(folder.resolve()):
                    raise UserError(
                        f"{given}: the import would write over its source in {folder}. Choose another --root."
                    )
            made = earlier and (earlier.embeds_images or folder != source.image_dir)
            if not made and folder.is_dir() and any(folder.iterdir()):
                raise UserError(
                    f"{folder}: no manifest in {self.folder} says that an import made what is there, so it is not "
                    "written over. Choose another --root, or move the folder away."
                )

    def prepare(self, workers: Workers) -> None:
        if self.source.embeds_images:
            self.source.image_dir.mkdir(parents=True, exist_ok=True)
        state = orjson.dumps({file.table.path.name: self.source.state(file.table.path) for file in self.sources})
        stored = self.work / "state.json"
        if not stored.exists() or stored.read_bytes() != state:
            for file in self.sources:
                if self.source.state(file.table.path):
                    file.results.mark.unlink(missing_ok=True)
                    file.results.remove()
            write_bytes(stored, state)

    def _earlier(self) -> dict[str, Any]:
        """The manifest of an earlier import; empty where there is none, or a broken one."""
        with suppress(UserError):
            return read_manifest(self.folder) or {}
        return {}

    def _earlier_stems(self) -> list[str]:
        return [shard_stem(name) for name in self._earlier().get("inputs", ())]

    def made(self) -> list[Location]:
        """What the import of the manifest wrote, and nothing else that came to lie beside it."""
        stems = self._earlier_stems()
        annotations = (self.root / "annotations" / f"{stem}.jsonl" for stem in stems)
        return [*annotations, *(self.folder / f"{stem}.rejected.jsonl" for stem in stems), self.folder / SUMMARY]

    def remove(self) -> None:
        if self.source.embeds_images:
            for stem in self._earlier_stems():
                shutil.rmtree(self.source.image_dir / stem, ignore_errors=True)
        super().remove()

    def finish(self) -> dict[str, Counts]:
        """Write the annotation files and the summary. Returns the counts of each file."""
        counts = {file.output.stem: file.finish().counts for file in self.sources}
        write_json(self.folder / SUMMARY, {"files": {name: of_file.as_dict() for name, of_file in counts.items()}})
        return counts


def config_entry(root: Path, image_dir: Path, task: str) -> dict[str, Any]:
    """The metadata config entry of an imported data set. Paths are absolute, so that it can be pasted anywhere."""
    return {
        "root": str(root.resolve()),
        "image_dir": str(image_dir.resolve()),
        "annotation_dir": str((root / "annotations").resolve()),
        "tokenizer_inference": task == "generation",
    }


def write_entry(config: Path, name: str, entry: dict[str, Any], overwrite: bool) -> None:
    """Add the entry to the metadata config `config`, which is made if it is missing.

    Raises `UserError` where the config has another data set of that name, unless it is to be overwritten.
    """
    stored: dict[str, Any] = {}
    if config.exists():
        read_data_config(config)  # a broken config is not made worse
        stored = orjson.loads(config.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if stored.get(name, entry) != entry and not overwrite:
        raise UserError(
            f"{config}: has another data set {name!r}. Choose another --name, or replace it by --overwrite."
        )
    if stored.get(name) != entry:
        write_json(config, {**stored, name: entry})
