"""Where codebook inference writes, and how its files come to be.

Per data set, in `{root}/{output_dirname}/{tokenizer_version}/{fixed_256 | fixed_512 | fixed_anchors}/`:
`{name}.jsonl` (the annotations with `image_sizes`, `image_embed_inds` and `matched_ratios` added, in input order),
`{name}.rejected.jsonl` (the items that have no codes, and why), `manifest.json`, `run_summary.json`; and
`{root}/{output_dirname}/{tag}_data_statistic.json`. `.work/` beside them holds what an unfinished run has done, and
stays while items have failed, so that a rerun need only try those.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from vision_tokenizer.codebook.annotations import Dataset
from vision_tokenizer.images.anchors import job_tag
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.errors import UserError
from vistoken.jobs.chunks import ChunkTable, chunk_table
from vistoken.jobs.counts import Account
from vistoken.jobs.files import atomic_write, remove_leftovers, write_bytes
from vistoken.jobs.manifest import MANIFEST
from vistoken.jobs.results import Parts
from vistoken.jobs.run import Source
from vistoken.jobs.summary import SUMMARY, write_summary

CHUNK_ITEMS = 64
WORK = ".work"
CHUNK_TABLE = ".chunks.json"  # after the name of an annotation file, in `WORK`
RATIO = "ratio_"  # counts of an account that go into the statistics file


@dataclass(frozen=True)
class Settings:
    """What decides the codes, besides the tokenizer, and where they go."""

    resolution_type: str = "fixed_anchors"
    resolution: int = 512
    crop_percent_thresh: float = 0.2
    torch_dtype: str = "fp32"
    batch_size: int = 4
    compile: bool = False
    tokenizer_version: str = "dualvitok"
    output_dirname: str = "jsonl_after_tokenizer"

    @property
    def tag(self) -> str:
        return job_tag(self.resolution_type, self.resolution)

    def folder(self, dataset: Dataset) -> Path:
        return dataset.root / self.output_dirname / self.tokenizer_version / self.tag

    def statistics_file(self, dataset: Dataset) -> Path:
        return dataset.root / self.output_dirname / f"{self.tag}_data_statistic.json"


@dataclass(frozen=True)
class AnnotationFile(Source):
    """One annotation file on its way to `output`."""

    dataset: Dataset
    output: Path

    @property
    def rejected(self) -> Path:
        return self.output.with_suffix(".rejected.jsonl")

    @property
    def _mark(self) -> Path:
        """Exists once `output` is complete; holds its account, size and hash."""
        return self.output.parent / WORK / f"{self.output.stem}.done.json"

    def finished(self) -> Account | None:
        """The account of a finished file in which nothing failed, else None: there is work to do."""
        if not self._mark.exists():
            return None
        try:
            stored = orjson.loads(self._mark.read_bytes())
            account, size = Account.from_dict(stored["account"]), stored["bytes"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._mark}: damaged ({error}). Run with --no-resume to make the data set anew."
            ) from error
        if account.failed:
            return None
        if not self.output.exists() or self.output.stat().st_size != size:
            raise UserError(
                f"{self.output}: finished earlier, but this is not what was written then. "
                "Restore the file, or run with --no-resume to make it anew."
            )
        return account

    def finish(self) -> Account:
        """Join the parts into `output` and `rejected`; drop them unless a rerun may retry what failed."""
        account = self.finished() or self._join()
        if not account.failed:
            self.parts.remove()
        return account

    def _join(self) -> Account:
        if _chunk_table(self.table.path, self.output.parent).sha256 != self.table.sha256:
            self.parts.remove()  # nobody knows which of them hold old items, and which new
            raise UserError(f"{self.table.path}: changed while it was encoded. Run again with --overwrite.")
        account, digest = Account(), hashlib.sha256()
        with atomic_write(self.output) as lines, atomic_write(self.rejected) as rejected:
            for index, part in enumerate(self.parts.read_all(len(self.table))):
                account.add(part.account)
                done = self.parts.path(index, ".jsonl").read_bytes()
                digest.update(done)
                lines.write(done)
                rejected.writelines(orjson.dumps(asdict(problem)) + b"\n" for problem in part.problems)
        if not account.rejected + account.failed:
            self.rejected.unlink()
        account.check(str(self.output))
        written = {"bytes": self.output.stat().st_size, "sha256": digest.hexdigest()}
        write_bytes(self._mark, orjson.dumps({"account": account.as_dict(), **written}))
        return account

    def summary(self) -> dict[str, Any]:
        """What the run's summary says of the finished file; `sha256` is what a verifier holds it against."""
        stored = orjson.loads(self._mark.read_bytes())
        return {**stored["account"], "sha256": stored["sha256"]}


def _chunk_table(path: Path, folder: Path) -> ChunkTable:
    return chunk_table(path, CHUNK_ITEMS, folder / WORK / f"{path.stem}{CHUNK_TABLE}")


def open_files(dataset: Dataset, settings: Settings) -> tuple[list[AnnotationFile], list[str]]:
    """The annotation files of a data set with their chunk tables, and why others of its files cannot be read."""
    folder, files, errors = settings.folder(dataset), [], []
    try:
        for path in dataset.annotation_files():
            try:
                table = _chunk_table(path, folder)
            except UserError as error:
                errors.append(str(error))
            else:
                parts, output = Parts(folder / WORK / path.stem), folder / f"{path.stem}.jsonl"
                files.append(AnnotationFile(table, parts, dataset, output))
    except UserError as error:
        errors.append(str(error))
    return files, errors


def check_folders(datasets: Sequence[Dataset], settings: Settings) -> None:
    """Raises `UserError` where a data set would be written over another one, or over its own annotations."""
    owners: dict[Path, Dataset] = {}
    for dataset in datasets:
        folder = settings.folder(dataset).resolve()
        other = owners.setdefault(folder, dataset)
        if other is not dataset:
            raise UserError(
                f"data sets {other.name} and {dataset.name} have the same root, {dataset.root}, so both would be "
                f"written to {folder}. Give each its own root in the data config."
            )
        if dataset.annotation_dir.resolve() in (folder, settings.statistics_file(dataset).parent.resolve()):
            raise UserError(
                f"data set {dataset.name}: its codes would be written among its annotations in {folder}. "
                "Correct annotation_dir in the data config, or choose another --output_dirname."
            )


def unwritable(datasets: Sequence[Dataset], settings: Settings) -> list[str]:
    """What the file system will refuse, as far as can be told without writing."""
    messages = []
    for dataset in datasets:
        folder = settings.folder(dataset).absolute()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            messages.append(f"data set {dataset.name}: its codes go to {folder}, but {nearest} cannot be written")
    return messages


def make_manifest(tokenizer: ImageTokenizer, settings: Settings, files: Sequence[AnnotationFile]) -> dict[str, Any]:
    """Everything that decides the bytes of the output."""
    return {
        "format": "vistoken-codebook-1",
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "branches": list(tokenizer.branches),
            "codebook_sizes": list(tokenizer.codebook_sizes),
        },
        "settings": asdict(settings),
        "device": tokenizer.device.type,
        "chunk_items": CHUNK_ITEMS,
        "inputs": {file.table.path.name: file.table.sha256 for file in files},
        "versions": {name: version(name) for name in ("vistoken", "torch", "pillow")},
    }


def remove_output(dataset: Dataset, settings: Settings) -> None:
    """Delete all that earlier runs of these settings' folder made, but for chunk tables and locks.

    Files that belong to no chunk table are not ours and stay.
    The manifest goes last: whatever is still there when we are killed is never taken for the work of other settings.
    """
    folder = settings.folder(dataset)
    names = [table.name.removesuffix(CHUNK_TABLE) for table in (folder / WORK).glob(f"*{CHUNK_TABLE}")]
    made = [folder / f"{name}{suffix}" for name in names for suffix in (".jsonl", ".rejected.jsonl")]
    try:
        for mark in (folder / WORK).glob("*.done.json"):
            mark.unlink()
        for path in (folder / WORK).glob("*"):
            if path.is_dir():
                Parts(path).remove()
        for path in (*made, folder / SUMMARY, settings.statistics_file(dataset), folder / MANIFEST):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot remove ({error.strerror}). Fix the permissions.") from error


def remove_unfinished(dataset: Dataset, settings: Settings) -> None:
    """Delete what a run that was killed while it wrote its final files has left of them."""
    for folder in (settings.folder(dataset), settings.folder(dataset) / WORK, settings.statistics_file(dataset).parent):
        remove_leftovers(folder)


def finish_dataset(
    dataset: Dataset, settings: Settings, files: Sequence[AnnotationFile], errors: Sequence[str]
) -> Account:
    """Write a data set's output, statistics and summary from the parts of its `files`; `errors` are of the others."""
    total = Account()
    for file in files:
        total.add(file.finish())
    total.check(f"data set {dataset.name}")
    statistics = {name: n for name, n in sorted(total.counts.items()) if name.startswith(RATIO) and n}
    write_bytes(settings.statistics_file(dataset), orjson.dumps(statistics, option=orjson.OPT_INDENT_2))
    write_summary(
        settings.folder(dataset) / SUMMARY,
        dataset=dataset.name,
        total=total.as_dict(),
        files={file.table.path.name: file.summary() for file in files},
        unreadable=errors,
    )
    return total
