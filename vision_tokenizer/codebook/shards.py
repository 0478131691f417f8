"""Shards as annotations: the items that an import would make of them, with their images, read as a stream.

A tar file's sample is one image with a `.txt`, its caption, or a `.json` that has a caption or conversations. A row of
a parquet file has them as columns; its image is `{bytes, path}`, bytes, or a list of either.
"""

import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from stat import S_ISREG
from typing import Any

import orjson

from vision_tokenizer.codebook.items import IMAGE_SUFFIXES, TEXT_FIELDS, build_item, item_line
from vision_tokenizer.images.files import SUFFIXES, embedded_format
from vistoken.errors import Failed, UserError
from vistoken.files import check_regular, reading
from vistoken.jobs.chunks import Chunk, Item
from vistoken.jobs.members import StoredMember, indexes
from vistoken.jobs.shards import (
    MAX_MEMBER,
    PARQUET,
    TAR,
    Member,
    NamedBytes,
    Sample,
    parquet_file,
    parquet_groups,
    parquet_samples,
    shard_stem,
    split_name,
    tar_samples,
)
from vistoken.store import Location, Stat

CHUNK_ROWS = 64  # of a parquet file: smaller row groups are done together

Attached = NamedBytes | Member
Embedded = Attached | StoredMember


@dataclass(frozen=True)
class ShardRules:
    """What is read from a shard: which text, as what, and which images."""

    task: str = "generation"
    text_field: str | None = None  # None: the first of `TEXT_FIELDS` that is there
    image_field: str = "image"  # of parquet


@dataclass(frozen=True)
class ShardItem(Item):
    """An item with its images."""

    attached: dict[str, Attached] = field(default_factory=dict)  # by the names in `images`; who takes one out owns it


@dataclass(frozen=True)
class ShardTable:
    """A shard by chunks: what a `ChunkTable` is for an annotation file.

    A tar file is one chunk, and nobody knows how many items it has before it is read: `items` is None. With `whole`
    images are read with their items; without, only where they are opened, before the next item is asked for.
    """

    path: Location
    rules: ShardRules
    fingerprint: str  # changes with the content; a hash would have to read it all
    items: int | None
    rows: tuple[tuple[int, int, range], ...]  # first item, items and row groups of every chunk
    whole: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Chunk:
        first, items, _ = self.rows[index]
        return Chunk(index, first, items, 0, 0, 0)

    def read(self, chunk: Chunk) -> Iterator[ShardItem]:
        """The items of `chunk`, in order; those that are none have their error."""
        if is_tar(self.path):
            yield from self._tar_items()
        else:
            yield from self._parquet_items(*self.rows[chunk.index])

    def _tar_items(self) -> Iterator[ShardItem]:
        keys: set[str | None] = set()
        for sample in tar_samples(self.path, self.whole):
            if sample.error is None and sample.key in keys:  # an import would take its image for the first one's
                twice = Failed("key occurs twice", f"{sample.key!r} stands for another sample earlier in {self.path}")
                sample = replace(sample, error=twice)
            keys.add(sample.key)
            yield self._item(sample, sample.key, self._of_members)

    def _parquet_items(self, first: int, rows: int, groups: range) -> Iterator[ShardItem]:
        names = parquet_file(self.path).schema_arrow.names
        columns = [self.rules.image_field, text_column(self.path, names, self.rules)]
        columns += ["id"] if "id" in names else []
        for sample in parquet_samples(self.path, columns, first, rows, groups):
            values = dict(sample.parts)
            item_id = values.get("id", f"{shard_stem(self.path.name)}/{sample.index}") if values else None
            yield self._item(sample, item_id, self._of_row)

    def _item(
        self, sample: Sample, item_id: Any, make: Callable[[Sample, Any], tuple[dict[str, Any], dict[str, Attached]]]
    ) -> ShardItem:
        value, raw, error = None, b"", sample.error
        attached: dict[str, Attached] = {}
        if error is None:
            try:
                value, attached = make(sample, item_id)
                raw = item_line(value)
            except Failed as failed:
                value, attached, error = None, {}, Failed(failed.reason, failed.detail)  # holds no frame of the reader
        return ShardItem(sample.index, sample.where, raw, value, error, item_id, attached)

    def _of_members(self, sample: Sample, key: str) -> tuple[dict[str, Any], dict[str, Attached]]:
        if ".." in key.split("/"):
            raise Failed("image outside image_dir", f"{key!r} leaves the folder that its tar file is unpacked to")
        pictures = [member for suffix, member in sample.parts if suffix.endswith(IMAGE_SUFFIXES)]
        if len(pictures) != 1:
            names = ", ".join(member.name for _, member in sample.parts)
            raise Failed("several images" if pictures else "no image", f"expected one image, found {names}")
        text = _text(sample, self.rules)
        attached = self._named(f"{shard_stem(self.path.name)}/{key}", pictures[0])
        return build_item(list(attached), text, self.rules.task, key), attached

    def _of_row(self, sample: Sample, item_id: Any) -> tuple[dict[str, Any], dict[str, Attached]]:
        images, text, *_ = (value for _, value in sample.parts)
        stem = f"{shard_stem(self.path.name)}/{sample.key}"
        named = {f"{stem}_{i}": image for i, image in enumerate(images)} if isinstance(images, list) else {stem: images}
        attached: dict[str, Attached] = {}
        for name, image in named.items():
            attached |= self._named(name, NamedBytes(name, _image_bytes(image)))
        return build_item(list(attached), text, self.rules.task, item_id), attached

    def _named(self, stem: str, image: Attached) -> dict[str, Attached]:
        if image.size > MAX_MEMBER:
            raise Failed("member too large", f"{image}: {image.size:,} bytes, of at most {MAX_MEMBER:,}")
        return {stem + SUFFIXES[embedded_format(image)]: image}


def is_tar(path: Location) -> bool:
    return path.name.lower().endswith(TAR)


def shard_table(
    path: Location, rules: ShardRules, chunk_rows: int = CHUNK_ROWS, whole: bool = True, known: Stat | None = None
) -> ShardTable:
    """The table of a shard; of a tar file nothing is read for it, of parquet its footer.

    `known` is what a listing said of it. Raises `UserError` for one that is missing, no shard, or a parquet file
    without the columns.
    """
    if not path.name.lower().endswith((*TAR, *PARQUET)):
        raise UserError(f"{path}: not a shard. They end in {', '.join((*TAR, *PARQUET))}.")
    with reading(path, "the shard"):
        stat = known or path.stat()
        if isinstance(stat, os.stat_result) and not S_ISREG(stat.st_mode):
            check_regular(path)  # says what it is
    fingerprint = f"{stat.st_size} bytes, {stat.st_mtime_ns}"
    if is_tar(path):
        return ShardTable(path, rules, fingerprint, None, ((0, 0, range(0)),), whole)
    file = parquet_file(path)
    text_column(path, file.schema_arrow.names, rules)
    rows = tuple(parquet_groups(file, chunk_rows))
    return ShardTable(path, rules, fingerprint, sum(count for _, count, _ in rows), rows, whole)


def text_column(path: Location, names: Sequence[str], rules: ShardRules) -> str:
    """The column of the text, of those of these names. Raises `UserError` where it, or the images', is not there."""
    wanted = (rules.text_field,) if rules.text_field else TEXT_FIELDS
    found = [name for name in wanted if name in names]
    if rules.image_field not in names or not found:
        raise UserError(
            f"{path}: expected an image column {rules.image_field!r} and a text column "
            f"{' or '.join(map(repr, wanted))}, found {names}. Name yours as image_field and text_field."
        )
    return found[0]


def _text(sample: Sample, rules: ShardRules) -> Any:
    contents = dict(sample.parts)
    try:
        if ".txt" in contents:
            return contents[".txt"].read().decode("utf-8-sig")
        described = orjson.loads(contents[".json"].read()) if ".json" in contents else {}
    except orjson.JSONDecodeError as error:
        raise Failed("not JSON", f"{sample.key}.json: {error}") from error
    except UnicodeDecodeError as error:
        raise Failed("text unreadable", f"{sample.key}.txt: {error}") from error
    names = (rules.text_field,) if rules.text_field else TEXT_FIELDS
    return next((described[name] for name in names if isinstance(described, dict) and name in described), None)


def _image_bytes(value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    path = value.get("path") if isinstance(value, dict) else value
    found = f"the bytes are not in the file, only {reprlib.repr(path)}" if path else "the image is null"
    raise Failed("no image", found)


def find_image(shards: Mapping[str, Location], rules: ShardRules, name: str) -> Embedded:
    """The image that an item calls `name`, out of its shard among `shards` (by stem). Raises `Failed`."""
    stem, _, inside = name.partition("/")
    path = shards.get(stem)
    if path is None:
        raise Failed("image not found", f"{name}: no shard {stem}")
    key = split_name(inside)[0]
    try:
        if not is_tar(path):
            return NamedBytes(name, _row_image(path, rules.image_field, key))
        if not path.name.lower().endswith(".tar"):  # compressed: only from its beginning
            parts = (part for sample in tar_samples(path, whole=True) if sample.key == key for part in sample.parts)
            if image := next((part for suffix, part in parts if suffix.endswith(IMAGE_SUFFIXES)), None):
                return image
            raise Failed("image not found", f"{name}: no image of that key in {path}")
        for member, place in indexes.of(path).items():
            if split_name(member)[0] == key and split_name(member)[1].endswith(IMAGE_SUFFIXES):
                return StoredMember(path, member, *place)
    except OSError as error:
        raise Failed("image not found", f"{name}: {path}: {error.strerror or error}") from error
    raise Failed("image not found", f"{name}: no image of that key in {path}")


def _row_image(path: Location, column: str, key: str) -> bytes:
    row, _, number = key.partition("_")
    for first, rows, groups in parquet_groups(parquet_file(path), 1):
        if first <= int(row) < first + rows:
            batch: Sequence = parquet_file(path).read_row_groups(list(groups), columns=[column])[column]
            value = batch[int(row) - first].as_py()
            return _image_bytes(value[int(number)] if number else value)
    raise Failed("image not found", f"{path} has no row {row}")
