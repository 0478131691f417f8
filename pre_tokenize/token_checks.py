"""Checks token files: the record against its files and its input, every sequence against the rules of its vocabulary,
and a sample of items against the same items tokenised again.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pre_tokenize.output import open_table
from pre_tokenize.record import Record, companions
from pre_tokenize.sequences import Block, SequenceFormat
from pre_tokenize.token_file import TokenFiles, TokenSample
from vision_tokenizer.codebook.encoder import Encoded
from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.chameleon.vqgan import ChameleonVQGAN
from vision_tokenizer.review.issues import Issues, draw, rejected_entries
from vision_tokenizer.review.reencode import Agreement, differences
from vistoken.errors import ItemError, UserError
from vistoken.jobs.chunks import Item
from vistoken.jobs.run import Table
from vistoken.store import Location

_CHUNK_ITEMS = 512


def check_record(record: Record, manifest: dict[str, Any] | None, issues: Issues) -> None:
    """Items must be in order, each once; every item of the input must be in the record or among the rejected."""
    steps = np.diff(record.ids)
    for index in np.flatnonzero(steps <= 0).tolist():
        kind = "item twice" if steps[index] == 0 else "items out of order"
        issues.add(kind, f"{record.path}: item {record.ids[index + 1]} after item {record.ids[index]}")
    entries = rejected_entries(companions(record.path)[0], issues)
    rejected = np.array([entry["item"] for entry in entries], np.int64)
    ids = np.unique(record.ids)
    for item in np.intersect1d(ids, rejected).tolist():
        issues.add("item twice", f"{record.path}: item {item} is in the record and among the rejected")
    if manifest and "input" in manifest:
        missing = np.setdiff1d(np.arange(manifest["input"]["items"]), np.concatenate([ids, rejected]))
        for item in missing.tolist():
            issues.add("item lost", f"{record.path}: item {item} of {manifest['input']['name']}")


def check_sequences(
    files: TokenFiles, reader: SequenceFormat, issues: Issues, on_item: Callable[[], object]
) -> dict[str, int]:
    """Check every sequence by the rules of its vocabulary. Returns the numbers of tokens, learned tokens and images."""
    found = {"tokens": 0, "learned": 0, "images": 0}
    for index in range(len(files)):
        on_item()
        try:
            sample = files[index]
        except UserError as error:
            issues.add("token file", str(error))
            continue
        found["tokens"] += len(sample.tokens)
        found["learned"] += int(sample.loss_mask.sum())
        found["images"] += len(sample.images)
        for kind, detail in sequence_errors(sample, reader):
            issues.add(kind, f"{files.record.where(index)}: {detail}")
    return found


def sequence_errors(sample: TokenSample, reader: SequenceFormat) -> Iterator[tuple[str, str]]:
    """(kind, detail) of what is wrong with a sequence."""
    tokens = sample.tokens
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= reader.vocab_size:
        yield "token out of range", f"ids lie in [0, {reader.vocab_size}), and there is at least one"
        return
    try:
        learned = reader.learned(tokens)
        if (learned != sample.loss_mask).any():
            first = int(np.flatnonzero(learned != sample.loss_mask)[0])
            yield "loss mask", f"from token {first} on it does not follow the turns"
        if not sample.loss_mask.any():
            yield "loss mask", "nothing is learned"
    except ValueError as error:
        yield "turns", str(error)
    try:
        blocks = reader.blocks(tokens)
        if len(blocks) != len(sample.images):
            yield "image count", f"{len(blocks)} image blocks, {len(sample.images)} image names"
    except ValueError as error:
        yield "image block", str(error)


@dataclass(frozen=True)
class Reencoder:
    """Encodes images again. `max_gap` is how near a tie must be for another code to be no issue."""

    prepare: Callable[[Location], tuple[torch.Tensor, Any]]
    vqgan: ChameleonVQGAN
    max_gap: float

    def encode(self, path: Location) -> tuple[torch.Tensor, Encoded]:
        """(h, w, d), what the codebook sees, and the codes that it is. Raises `ItemError`."""
        pixels, info = self.prepare(path)
        with torch.no_grad():
            features = self.vqgan.features(normalize(pixels[None].to(self.vqgan.device)))[0]
            return features, Encoded((self.vqgan.quantize.encode(features).cpu().numpy(),), info)


@dataclass
class Retokenizer:
    """Tokenises items again and compares. Without `images` the items bring their codes, and all ids must be equal."""

    reader: SequenceFormat
    issues: Issues
    images: Reencoder | None = None
    agreement: Agreement = field(default_factory=Agreement)

    def compare(self, item: Item, stored: TokenSample, where: str) -> None:
        """Whatever differs becomes an issue, except codes that were nearly tied."""
        draft = next(iter(self.reader.drafts([item])))
        if isinstance(draft, ItemError):
            self.issues.add("item fails now", f"{where}: {draft}")
            return
        features: list[torch.Tensor] = []
        try:
            if self.images is None:
                fresh = self.reader.sample(draft, {})
            else:
                encoded = [self.images.encode(path) for path in draft.paths]
                features = [seen for seen, _ in encoded]
                codes = [codes for _, codes in encoded]
                fresh = self.reader.sample(draft, dict(zip(draft.paths, codes, strict=True)))
        except ItemError as error:
            self.issues.add("item fails now", f"{where}: {error}")
            return
        if len(fresh.tokens) != len(stored.tokens) or (fresh.loss_mask != stored.loss_mask).any():
            self.issues.add("another sequence", f"{where}: {len(stored.tokens)} tokens, now {len(fresh.tokens)}")
            return
        differs = fresh.tokens != stored.tokens
        if self.images is not None:
            for number, block in enumerate(self.reader.blocks(fresh.tokens)):
                there = slice(block.start, block.end)
                place = f"{where}, image {number}"
                self._compare_image(self.images, place, stored.tokens[there], block, features[number])
                differs[there] = False
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            self.issues.add("another text", f"{where}: token {at} is {stored.tokens[at]}, now {fresh.tokens[at]}")

    def _compare_image(
        self, images: Reencoder, where: str, stored: np.ndarray, block: Block, features: torch.Tensor
    ) -> None:
        try:
            (codes,) = self.reader.blocks(stored)[0].grids
        except (ValueError, IndexError) as error:
            self.issues.add("image block", f"{where}: {error}")
            return
        self.agreement.codes += codes.size
        fresh, codebook = torch.from_numpy(block.grids[0]), images.vqgan.quantize.embedding.weight
        for (row, column), gap in differences(features, codes, fresh, codebook).items():
            self.agreement.gaps.append(gap)
            if gap > images.max_gap:
                detail = f"{where}, row {row} column {column}: {codes[row, column]}, gap {gap:.2g}"
                self.issues.add("code is not the nearest", detail)


def retokenize(files: TokenFiles, table: Table, again: Retokenizer, count: int, seed: int) -> int:
    """Compare `count` items, drawn evenly, with the input. Returns how many were compared."""
    drawn = draw(len(files), count, seed)
    for index in drawn:
        try:
            again.compare(_item(table, int(files.record.ids[index])), files[index], files.record.where(index))
        except UserError as error:
            again.issues.add("token file", str(error))
    return len(drawn)


def _item(table: Table, number: int) -> Item:
    if table.items is not None and number >= table.items:
        raise UserError(f"{table.path}: has {table.items} items, so there is no item {number}. Is it another input?")
    chunk = table[number // _CHUNK_ITEMS]
    return next(item for item in table.read(chunk) if item.index == number)


def check_input(manifest: dict[str, Any], source: Location, issues: Issues) -> Table | None:
    """The items of `source`, if that is the file that the tokens were made from."""
    with tempfile.TemporaryDirectory() as cache:
        table = open_table(source, _CHUNK_ITEMS, Path(cache) / "chunks.json")
    if table.fingerprint == manifest["input"]["sha256"]:
        return table
    issues.add("input changed", f"{source}: not the file that the tokens were made from, so none was made again")
    return None


def check_tokenizer(manifest: dict[str, Any], text_sha256: str, fingerprint: str | None, issues: Issues) -> None:
    """Whether the tokenizers given are those of the manifest."""
    if manifest["text_tokenizer"] != text_sha256:
        issues.add("another text tokenizer", f"made with {manifest['text_tokenizer'][:16]}, given {text_sha256[:16]}")
    made_with = manifest["image_tokenizer"]["fingerprint"]
    if fingerprint is not None and made_with != fingerprint:
        issues.add("another image tokenizer", f"made with {made_with}, given {fingerprint}")
