"""Where codebook inference writes, and how its files come to be.

Per data set, in `{root}/{output_dirname}/{tokenizer_version}/{fixed_256 | fixed_512 | fixed_anchors}/`:
`{name}.jsonl` or `.arrow` (the annotations with `image_sizes`, `image_embed_inds` and `matched_ratios` added, in input
order),
`{name}.rejected.jsonl` (the items that have no codes, and why), `manifest.json`, `run_summary.json`; and
`{root}/{output_dirname}/{tag}_data_statistic.json`. `.work/` beside them holds what an unfinished run has done, and
stays while items have failed, so that a rerun need only try those.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import orjson

from vision_tokenizer.codebook.annotations import Dataset
from vision_tokenizer.codebook.forms import Form, output_form
from vision_tokenizer.codebook.inputs import input_files, input_stem, input_table, shard_stats
from vision_tokenizer.images.anchors import job_tag
from vision_tokenizer.models.fused import kernel_facts
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.device import device_facts
from vistoken.errors import UserError
from vistoken.jobs.counts import SUMMARY, Counts
from vistoken.jobs.files import write_bytes, write_json
from vistoken.jobs.manifest import read_manifest
from vistoken.jobs.results import Final, Result, Results, WholeResult
from vistoken.jobs.run import WORK, JoinedSource, Output, Table
from vistoken.jobs.shards import shard_stem
from vistoken.store import Location, Stat, Url, read_ahead

# a GPU does 64 images in a tenth of a second; on a shared disk that would be too many small files
CHUNK_ITEMS = {"cpu": 64, "cuda": 512}
CHUNK_TABLE = ".chunks.json"  # after the name of an annotation file, in `WORK`
RATIO = "ratio_"  # tallies that go into the statistics file


@dataclass(frozen=True)
class Settings:
    """What decides the codes, besides the tokenizer, and where they go."""

    resolution_type: str = "fixed_anchors"
    resolution: int = 512
    crop_percent_thresh: float = 0.2
    exif_orientation: str = "ignore"
    torch_dtype: str = "fp32"
    batch_size: int = 1
    compile: bool = False
    cuda_graphs: bool = False
    tokenizer_version: str = "dualvitok"
    output_dirname: str = "jsonl_after_tokenizer"
    output_format: str = "jsonl"

    @property
    def tag(self) -> str:
        return job_tag(self.resolution_type, self.resolution)

    def folder(self, dataset: Dataset) -> Location:
        return dataset.root / self.output_dirname / self.tokenizer_version / self.tag

    def statistics_file(self, dataset: Dataset) -> Location:
        return dataset.root / self.output_dirname / f"{self.tag}_data_statistic.json"


class Unread(UserError):
    """An input file was not read to its end."""


@dataclass(eq=False)
class CodebookFile(JoinedSource):
    """One annotation file or shard on its way to `output`."""

    dataset: Dataset
    chunk_items: int
    form: Form

    def contents(self) -> Iterator[tuple[Result, bytes]]:
        return self.form.joined(self.results.contents(range(len(self.table)), self.form.suffix))

    def join(self) -> Final:
        """Raises `Unread` where the input, which could be read when the run began, could not be read to its end."""
        if not self.is_complete():
            missing = next(index for index in range(len(self.table)) if self.results.read(index) is None)
            try:
                deque(self.table.read(self.table[missing]), maxlen=0)
            except UserError as error:
                raise Unread(str(error)) from error
            raise Unread(f"{self.table.path}: could not be read in between. Run the same command again.")
        return super().join()

    def check_unchanged(self) -> None:
        now = _table(self.dataset, self.table.path, self.output.parent / WORK, self.chunk_items)
        if now.fingerprint != self.table.fingerprint:
            self.results.remove()  # nobody knows which of them hold old items, and which new
            raise UserError(f"{self.table.path}: changed while it was encoded. Run again with --overwrite.")


def each_table(
    dataset: Dataset, paths: Sequence[Location], work: Location, chunk_items: int
) -> Iterator[tuple[Location, Table | str]]:
    """Every input file with its chunks, or why it cannot be read. Of a store, several at a time."""
    known = shard_stats(paths)

    def of(path: Location) -> tuple[Location, Table | str]:
        try:
            return path, _table(dataset, path, work, chunk_items, known.get(path))
        except UserError as error:
            return path, str(error)

    return read_ahead(of, paths) if any(isinstance(path, Url) for path in paths) else map(of, paths)


def _table(dataset: Dataset, path: Location, work: Location, chunk_items: int, known: Stat | None = None) -> Table:
    cache = work if dataset.shards else work / f"{path.stem}{CHUNK_TABLE}"
    return input_table(dataset, path, chunk_items, cache, known=known)


class CodebookOutput(Output):
    """The output of one data set. `unreadable` says why files of it, or all of it, cannot be read."""

    sources: Sequence[CodebookFile]

    def __init__(self, dataset: Dataset, tokenizer: ImageTokenizer, settings: Settings):
        self.dataset, self.settings = dataset, settings
        folder, chunk_items = settings.folder(dataset), CHUNK_ITEMS[tokenizer.device.type]
        form = output_form(settings.output_format, tokenizer.branches, tokenizer.codebook_sizes)
        files: list[CodebookFile] = []
        self.unreadable: list[str] = []
        try:
            paths, work = input_files(dataset), folder / WORK
            for path, table in each_table(dataset, paths, work, chunk_items):
                if isinstance(table, str):
                    self.unreadable.append(table)
                    continue
                stem = input_stem(dataset, path)
                final = folder / f"{stem}{form.suffix}"
                results = WholeResult(work / stem, final) if len(table) == 1 else Results(work / stem)
                files.append(CodebookFile(table, results, final, dataset, chunk_items, form))
        except UserError as error:
            self.unreadable.append(str(error))
        super().__init__(folder, make_manifest(tokenizer, settings, files), files)

    def folders(self) -> list[Location]:
        return [*super().folders(), self.settings.statistics_file(self.dataset).parent]

    def made(self) -> list[Location]:
        """Files of other names than the inputs had are not ours and stay."""
        names = {table.name.removesuffix(CHUNK_TABLE) for table in self.work.glob(f"*{CHUNK_TABLE}")}
        if self.dataset.shards is not None:
            names |= {shard_stem(name) for name in (read_manifest(self.folder) or {}).get("inputs", ())}
        ours = {f"{name}{suffix}" for name in names for suffix in (".jsonl", ".arrow", ".rejected.jsonl")}
        files = [path for path in self.folder.glob("*") if path.name in ours | {SUMMARY}]
        return [*files, self.settings.statistics_file(self.dataset)]

    def finish(self) -> Counts:
        """Write the final files, the statistics and the summary. Returns the counts of the data set."""
        total = Counts()
        files: dict[str, Any] = {}

        def finish(file: CodebookFile) -> Final | str:
            try:
                return file.finish()
            except Unread as error:  # the others are finished all the same
                return str(error)

        in_store = isinstance(self.folder, Url)
        finals = read_ahead(finish, self.sources) if in_store else map(finish, self.sources)
        for file, final in zip(self.sources, finals, strict=True):
            if isinstance(final, str):
                self.unreadable.append(final)
            else:
                total.add(final.counts)
                files[file.table.path.name] = {**final.counts.as_dict(), "sha256": final.sha256}
        total.check(f"data set {self.dataset.name}")
        statistics = {name: n for name, n in sorted(total.tallies.items()) if name.startswith(RATIO) and n}
        write_bytes(self.settings.statistics_file(self.dataset), orjson.dumps(statistics, option=orjson.OPT_INDENT_2))
        summary = {
            "dataset": self.dataset.name,
            "image_dir": str(self.dataset.image_dir.resolve()),
            "total": total.as_dict(),
            "files": files,
            "unreadable": self.unreadable,
        }
        write_json(self.folder / SUMMARY, summary)
        return total


def check_folders(datasets: Sequence[Dataset], settings: Settings) -> None:
    """Raises `UserError` where a data set would be written over another one, or over its own annotations."""
    owners: dict[Location, Dataset] = {}
    for dataset in datasets:
        folder = settings.folder(dataset).resolve()
        other = owners.setdefault(folder, dataset)
        if other is not dataset:
            raise UserError(
                f"data sets {other.name} and {dataset.name} have the same root, {dataset.root}, so both would be "
                f"written to {folder}. Give each its own root in the data config."
            )
        if dataset.shards is None and dataset.annotation_dir.resolve() in (
            folder,
            settings.statistics_file(dataset).parent.resolve(),
        ):
            raise UserError(
                f"data set {dataset.name}: its codes would be written among its annotations in {folder}. "
                "Correct annotation_dir in the data config, or choose another --output_dirname."
            )


def unwritable(datasets: Sequence[Dataset], settings: Settings) -> list[str]:
    """What the file system will refuse, as far as can be told without writing."""
    messages = []
    for dataset in datasets:
        folder = settings.folder(dataset).absolute()
        if isinstance(folder, Url):
            continue  # a store tells when it is asked to write
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            messages.append(f"data set {dataset.name}: its codes go to {folder}, but {nearest} cannot be written")
    return messages


def make_manifest(tokenizer: ImageTokenizer, settings: Settings, files: Sequence[CodebookFile]) -> dict[str, Any]:
    """Everything that decides the bytes of the output."""
    more = ("pyarrow",) if settings.output_format == "arrow" else ()
    return {
        "format": "vistoken-codebook-1",
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "branches": list(tokenizer.branches),
            "codebook_sizes": list(tokenizer.codebook_sizes),
        },
        "settings": asdict(settings),
        "device": device_facts(tokenizer.device) | kernel_facts(tokenizer.device),
        "chunk_items": CHUNK_ITEMS[tokenizer.device.type],
        "inputs": {file.table.path.name: file.table.fingerprint for file in files},
        "versions": {name: version(name) for name in ("vistoken", "torch", "pillow", *more)},
    }
