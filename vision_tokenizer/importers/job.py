"""The import as a job: chunks of the source become parts, parts become annotation files, every record is accounted for.

{root}/annotations/{name}.jsonl      the annotations, one file for each of the source's
{root}/images/...                    only where the source has them inside its files
{root}/import/                       manifest.json, {name}.rejected.jsonl, run_summary.json, parts/
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from vision_tokenizer.codebook.annotations import read_data_config
from vision_tokenizer.importers.archives import Parquet, WebDataset
from vision_tokenizer.importers.formats import Coco, Format, Llava, Pairs, file_stem
from vistoken.errors import Failed, UserError
from vistoken.jobs.chunks import Chunk
from vistoken.jobs.counts import Account, Problem
from vistoken.jobs.files import atomic_write, write_bytes
from vistoken.jobs.lock import run_lock
from vistoken.jobs.manifest import MANIFEST, check_manifest, read_manifest
from vistoken.jobs.progress import Progress
from vistoken.jobs.results import Part, Parts
from vistoken.jobs.run import Source, Task, run_chunks
from vistoken.jobs.summary import SUMMARY, write_summary
from vistoken.jobs.workers import Claims

FORMATS: dict[str, type[Format]] = {
    "llava": Llava,
    "coco": Coco,
    "pairs": Pairs,
    "webdataset": WebDataset,
    "parquet": Parquet,
}
_MANIFEST_FORMAT = "vistoken-import-"


@dataclass(frozen=True)
class _File(Source):
    """One file of the source; `table` is the list of its chunks."""

    path: Path
    format: Format

    @property
    def name(self) -> str:
        return self.parts.folder.name


def run_import(kind: str, source: Format, root: Path, claims: Claims, overwrite: bool) -> dict[str, Account]:
    """Import `source` into `root`; returns the account of each annotation file written.

    Raises `UserError` if `root` holds another import, unless it is to be overwritten; and always where writing would
    destroy what no import made.
    """
    work = root / "import"
    _check_folders(work, root, source)
    settings = {
        "format": f"{_MANIFEST_FORMAT}{kind}",
        "settings": {
            k: os.path.normpath(v.absolute()) if isinstance(v, Path) else str(v)
            for k, v in asdict(source).items()
            if k != "cache"
        },
    }
    with run_lock(work / "locks", claims.rank, claims.world_size):
        files = source.files()
        opened = [_File(source.chunks(file), Parts(work / "parts" / file_stem(file)), file, source) for file in files]
        if not any(file.table for file in opened):
            raise UserError(f"{source.source}: no records in it")
        claims.lead(lambda: _begin(work, root, settings, source, files, overwrite))  # once the source is known to fit
        total = sum(sum(chunk.items for chunk in file.table) for file in opened)
        run_chunks(opened, claims, _process, Progress(claims, total or None, "importing", rates=()))
        accounts: dict[str, Account] = {}
        claims.lead(lambda: accounts.update({file.name: _finish(file, root) for file in opened}))
        if claims.rank == 0:
            write_summary(work / SUMMARY, files={name: account.as_dict() for name, account in accounts.items()})
    return accounts


def _written(root: Path, source: Format) -> list[Path]:
    """Folders that an import fills."""
    return [root / "annotations", *([source.image_dir] if source.embeds_images else [])]


def _check_folders(work: Path, root: Path, source: Format) -> None:
    """Raises `UserError` where a folder to be written holds what is read, or something that no import wrote there."""
    earlier = FORMATS.get(str(_earlier(work).get("format")).removeprefix(_MANIFEST_FORMAT))
    for folder in _written(root, source):
        for given in (source.source, *([] if source.embeds_images else [source.image_dir])):
            if given.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{given}: the import would write over its source in {folder}. Choose another --root.")
        made = earlier and (earlier.embeds_images or folder != source.image_dir)
        if not made and folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: no manifest in {work} says that an import made what is there, so it is not written over. "
                "Choose another --root, or move the folder away."
            )


def _earlier(work: Path) -> dict[str, Any]:
    """The manifest in `work`; empty where there is none, or a broken one."""
    with suppress(UserError):
        return read_manifest(work) or {}
    return {}


def _remove_earlier(work: Path, root: Path, source: Format) -> None:
    """Delete what the import of the manifest in `work` made, and nothing else that came to lie beside it."""
    for name in _earlier(work).get("inputs", ()):
        stem = file_stem(Path(name))
        for file in (root / "annotations" / f"{stem}.jsonl", work / f"{stem}.rejected.jsonl"):
            file.unlink(missing_ok=True)
        if source.embeds_images:
            shutil.rmtree(source.image_dir / stem, ignore_errors=True)
    shutil.rmtree(work / "parts", ignore_errors=True)
    (work / MANIFEST).unlink(missing_ok=True)


def _begin(work: Path, root: Path, settings: dict, source: Format, files: Sequence[Path], overwrite: bool) -> None:
    if overwrite:
        _remove_earlier(work, root, source)
    if source.embeds_images:
        source.image_dir.mkdir(parents=True, exist_ok=True)
    check_manifest(work, {**settings, "inputs": {file.name: source.fingerprint(file) for file in files}})


def _process(tasks: Iterator[Task]) -> Iterator[tuple[Task, Part]]:
    for task in tasks:
        yield task, _part(task.source, task.chunk)


def _part(file: _File, chunk: Chunk) -> Part:
    lines, problems = [], []
    for record in file.format.records(file.path, chunk):
        if isinstance(record.line, Failed):
            problems.append(Problem.of(record.line, file.path, record))
        else:
            lines.append(record.line)
    if file.format.embeds_images:
        os.sync()  # the part says that its images are there, even after a power cut
    account = Account(items=len(lines) + len(problems), done=len(lines))
    account.reasons.update((problem.kind, problem.reason) for problem in problems)
    return Part(account, problems, {file.parts.path(chunk.index, ".jsonl"): b"".join(lines)})


def _finish(file: _File, root: Path) -> Account:
    """Join the parts of a file. They stay where they are: a rerun reads them, and does again only what failed."""
    account = Account()
    rejected = root / "import" / f"{file.name}.rejected.jsonl"
    with atomic_write(root / "annotations" / f"{file.name}.jsonl") as output, atomic_write(rejected) as problems:
        for index, part in enumerate(file.parts.read_all(len(file.table))):
            account.add(part.account)
            with file.parts.path(index, ".jsonl").open("rb") as lines:
                shutil.copyfileobj(lines, output)
            for problem in part.problems:
                problems.write(orjson.dumps(asdict(problem), option=orjson.OPT_APPEND_NEWLINE))
    account.check(str(file.path))
    if not account.failed:
        rejected.unlink()
    return account


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
        content = orjson.dumps({**stored, name: entry}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        write_bytes(config, content)
