"""Token files to batches: the data config, its records, and what data-loader processes do."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pre_tokenize.record import Record
from pre_tokenize.sequences import SequenceFormat
from pre_tokenize.token_file import IGNORE, TokenFiles, TokenSample, exif_orientation_of
from training.data.anyres import ImageInput, continuous_tokens, image_input
from training.data.packing import IMAGE_END, Batch, Sample, Skipped, discrete, interleave, pack
from training.data.sampler import RankBatches, Source, uniform
from vision_tokenizer.images.files import read_image
from vision_tokenizer.models.chameleon.vocabulary import RELEASED_IMAGE_IDS
from vistoken.errors import DataError, Failed, UserError
from vistoken.files import read_yaml
from vistoken.jobs.members import indexes
from vistoken.store import Location, location, within

MAX_RATIO = 1000  # times that a record is gone through in an epoch
REPLACEMENTS = 16  # samples tried in the place of one that fails
CANDIDATES = 16 * REPLACEMENTS  # among which those are looked for that are no longer
STRIDE = 7919  # from one to the next, in the record: far enough not to meet the same broken folder
SOURCE_KEYS = ("path", "ratio", "type", "image_dir", "validation", "split")


def read_data_config(path: Location) -> list[Source]:
    """The records of a data config, relative paths taken from its folder. Raises `UserError` naming the field."""
    content = read_yaml(path, "data config")
    if not isinstance(content, dict) or set(content) != {"META"} or not isinstance(content["META"], list):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected one key, META, with a list of path, ratio and type; found {found}")
    if not content["META"]:
        raise UserError(f"{path}: META lists no records")
    return [_source(entry, f"{path}, META entry {n}", path.parent) for n, entry in enumerate(content["META"])]


def _source(entry: Any, where: str, folder: Location) -> Source:
    if not isinstance(entry, dict) or "path" not in entry:
        raise UserError(f"{where}: expected a path, and perhaps ratio, type and image_dir, found {entry!r:.80}")
    if unknown := [key for key in entry if key not in SOURCE_KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(SOURCE_KEYS)}")
    share = _validation(entry, where)
    fields = {key: value for key, value in entry.items() if key not in ("path", "split", "validation")}
    source = Source(within(folder, str(entry["path"])), validation=share, **fields)
    ratio = source.ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= MAX_RATIO:
        raise UserError(f"{where}: ratio must be a number above 0, at most {MAX_RATIO}, found {ratio!r}")
    if not isinstance(source.type, str):
        raise UserError(f"{where}: type must be a name, found {source.type!r}")
    if not source.path.is_file():
        raise UserError(f"{where}: no such record: {source.path}")
    if source.path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{where}: a record is a .json or .jsonl file, this is {source.path}")
    if "image_dir" in entry:
        image_dir = within(folder, str(entry["image_dir"]))
        if not image_dir.is_dir():
            raise UserError(f"{where}: image_dir is no folder: {image_dir}")
        source = replace(source, image_dir=image_dir)
    return source


def _validation(entry: dict[str, Any], where: str) -> float:
    """The share of a record that is never trained on."""
    if "split" in entry:
        if entry["split"] != "validation" or "validation" in entry:
            raise UserError(f"{where}: split is validation, for a whole record, or absent; found {entry['split']!r}")
        return 1.0
    share = entry.get("validation", 0.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise UserError(f"{where}: validation is a share from 0 to below 1, found {share!r}; or `split: validation`")
    return float(share)


def split_record(record: Record, share: float) -> tuple[Record, Record | None]:
    """What is trained on, and what never is: by the items' ids, so that every run of this data holds out the same."""
    if not share:
        return record, None
    held = uniform(record.ids) < share
    return record.part(np.flatnonzero(~held)), record.part(np.flatnonzero(held))


def check_manifest(
    manifest: Mapping[str, Any] | None, record: Location, vocabulary: str | None, vocab_size: int
) -> None:
    """Refuse tokens that were made for another model. Published pickles carry no manifest and are taken on trust.

    `vocabulary` is the fingerprint of the model's own, None if its folder has no tokenizer file.
    """
    manifest = manifest or {}
    size, other = manifest.get("vocab_size"), manifest.get("vocabulary")
    if size is not None and size > vocab_size:
        raise UserError(
            f"{record}: its tokens come from a vocabulary of {size} ids, the model knows {vocab_size}. "
            "Tokenize the data with the model's tokenizer, or extend the model's vocabulary."
        )
    if other and vocabulary and other != vocabulary:
        raise UserError(
            f"{record}: its tokens were made with another vocabulary ({other[:12]}...) than the model's "
            f"({vocabulary[:12]}...). Tokenize the data with the model's tokenizer."
        )


@dataclass(frozen=True)
class SampleRules:
    """How tokens become samples."""

    vocab_size: int
    max_seq_len: int
    masked: range | None = RELEASED_IMAGE_IDS  # words that cannot be learned
    continuous: "ImageReader | None" = None  # None: discrete codes only
    format: SequenceFormat | None = None  # for samples without their condition


@dataclass(frozen=True)
class ImageReader:
    """Image file -> tower input: tiles of `side` pixels with `grid` patches along it."""

    side: int
    grid: int
    anyres: bool
    members: Path | None = None  # folder for the indexes of tar files in which images lie, shared by all processes

    def __call__(self, path: str, orientation: str = "ignore") -> ImageInput:
        """`orientation` as pre-tokenization had it. Raises `Failed` where the file cannot be read."""
        indexes.folder = self.members
        image = read_image(location(path).absolute(), orientation).convert("RGB")
        return image_input(image, self.side, self.grid, self.anyres)

    def tokens(self, record: Record, rows: np.ndarray) -> np.ndarray:
        """How many tokens the images of these samples add, as far as the record knows their sizes."""
        owners, heights, widths = record.image_sizes(rows)
        counts = continuous_tokens(heights, widths, self.side, self.grid, self.anyres)
        return np.bincount(owners, counts, minlength=len(rows)).astype(np.int64)


def build_sample(tokens: TokenSample, name: str, rules: SampleRules, orientation: str = "ignore") -> Sample:
    """`orientation` is that in which the images were encoded.

    Raises `Failed` for a sample that cannot be used, `UserError` for one that shows that the data is wrong.
    """
    if len(tokens.tokens) == 0 or tokens.tokens.min() < 0 or tokens.tokens.max() >= rules.vocab_size:
        raise UserError(f"{name}: token ids must lie in 0..{rules.vocab_size - 1}, the model's vocabulary")
    ids, mask = tokens.tokens[: rules.max_seq_len], tokens.loss_mask[: rules.max_seq_len]
    learned = ids[mask]
    if rules.masked is not None and ((learned >= rules.masked.start) & (learned < rules.masked.stop)).any():
        raise UserError(
            f"{name}: there is an image to be learned, but image tokens are masked. Run with --unmask_image_logits."
        )
    labels = np.where(mask, ids, IGNORE)
    if rules.continuous is None:
        return discrete(name, ids, labels)
    blocks = int((tokens.tokens == IMAGE_END).sum())
    if blocks != len(tokens.images):
        raise Failed("images do not match", f"{len(tokens.images)} images for {blocks} blocks of image tokens")
    images = [rules.continuous(path, orientation) for path in tokens.images[: int((ids == IMAGE_END).sum())]]
    return interleave(name, ids, labels, images)


class Batches(Dataset):
    """Sample numbers of one batch -> the batch; -1 - n stands for sample n without its condition. What goes wrong for
    good comes back as a value: raised in a data-loader process, it would arrive wrapped in a traceback.
    """

    def __init__(self, sources: Sequence[TokenFiles], rules: SampleRules):
        self.sources, self.rules = sources, rules
        self.starts = np.cumsum([0] + [len(files) for files in sources])
        self.orientations = [exif_orientation_of(files.manifest() if rules.continuous else None) for files in sources]
        self.reading = torch.zeros(0, 2, dtype=torch.int64)  # of each loader process: its id, and the sample it reads

    def __getitem__(self, samples: list[int]) -> Batch | UserError:
        skipped: list[Skipped] = []
        try:
            usable = [self._usable(number, skipped) for number in samples]
        except UserError as error:
            return error
        return pack(usable, self.rules.continuous.side if self.rules.continuous else 1, skipped)

    def sample(self, number: int) -> Sample:
        """Raises `Failed` for a sample that cannot be used."""
        if worker := get_worker_info():
            self.reading[worker.id] = torch.tensor([os.getpid(), number])
        source, row, dropped = self._place(number)
        tokens = self.sources[source][row]
        name = f"{self.sources[source].record.path}, id {tokens.id}"
        if dropped:
            assert self.rules.format is not None  # whoever drops conditions gives it
            try:
                tokens = self.rules.format.without_condition(tokens)
            except ValueError as error:
                raise Failed("not a whole sequence", str(error)) from error
        return build_sample(tokens, name, self.rules, self.orientations[source])

    def read_by(self, process: int) -> str | None:
        """The place of the sample that a loader process has read last."""
        for pid, number in self.reading.tolist():
            if pid == process:
                source, row, _ = self._place(number)
                return self.sources[source].record.where(row)
        return None

    def _place(self, number: int) -> tuple[int, int, bool]:
        """The source of a sample, its row there, and whether its condition is dropped."""
        number, dropped = (-1 - number, True) if number < 0 else (number, False)
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return source, number - int(self.starts[source]), dropped

    def _in_turn(self, source: int, row: int) -> Iterator[int]:
        """The rows that are tried: `row`, and others at fixed steps from it, first those that are no longer, since its
        batch may have no room for more.
        """
        yield row  # nearly always the only one
        record = self.sources[source].record
        stride = STRIDE + (len(record) % STRIDE == 0)  # or all would be the row itself
        rows = (row + np.arange(min(CANDIDATES, len(record))) * stride) % len(record)
        lengths = np.minimum(record.lengths[rows], self.rules.max_seq_len).astype(np.int64)
        if self.rules.continuous:
            lengths += self.rules.continuous.tokens(record, rows)
        yield from rows[np.argsort(lengths > lengths[0], kind="stable")][1:REPLACEMENTS].tolist()

    def _usable(self, number: int, skipped: list[Skipped]) -> Sample:
        """The sample, or the first of those that may stand in for it that can be used."""
        (source, first, dropped), failures = self._place(number), []
        path, start = self.sources[source].record.path, int(self.starts[source])
        for row in self._in_turn(source, first):
            try:
                sample = self.sample(-1 - start - row if dropped else start + row)
            except Failed as failure:
                failures.append((f"{path}, row {row}", str(failure)))
                continue
            skipped += [Skipped(name, reason, sample.name) for name, reason in failures]
            return sample
        raise UserError(f"{failures[0][0]}: {failures[0][1]}; {REPLACEMENTS} samples in a row could not be used")


def make_loader(
    dataset: Batches, order: RankBatches | list[list[int]], num_workers: int, pin: bool = False
) -> DataLoader:
    """Batches in the order of `order`, whatever the number of processes that make them."""
    dataset.reading = torch.zeros(num_workers, 2, dtype=torch.int64).share_memory_()
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin,
        prefetch_factor=4 if num_workers else None,
    )


@contextmanager
def loader_deaths_named(dataset: Batches) -> Iterator[None]:
    """Where a data-loader process dies, PyTorch raises `RuntimeError` wherever this process happens to be; we know what
    the dead one was reading.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        read = [place for pid in re.findall(r"\d+", str(error)) if (place := dataset.read_by(int(pid)))]
        raise DataError(
            f"{error}. It was reading {' and '.join(read) or 'nothing yet'}: look whether that file, or an image it "
            "names, is damaged; or the machine ran out of memory, then lower --num_workers."
        ) from error
