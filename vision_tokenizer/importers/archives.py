"""Sources with the images inside their files: tar shards and parquet. The images are written to the new data set."""

import reprlib
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import orjson
import pyarrow
from pyarrow.parquet import ParquetFile

from vision_tokenizer.importers.formats import Format, file_stem
from vision_tokenizer.importers.items import IMAGE_SUFFIXES, TEXT_FIELDS, Record, build_item, store_image
from vistoken.errors import Failed, UserError
from vistoken.jobs.chunks import Chunk

_ROWS = 32  # of a parquet file, held in memory with their images


class _Folder(Format):
    """A source of one file or of a folder of files, with the images inside them."""

    embeds_images: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]]

    def files(self) -> list[Path]:
        if self.source.is_file():
            return [self.source]
        files = sorted(file for file in self.source.iterdir() if file.name.endswith(self.suffixes))
        stems = [file_stem(file) for file in files]
        if not files:
            raise UserError(f"{self.source}: no file in it ends in {' or '.join(self.suffixes)}")
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise UserError(f"{self.source}: two files would both become {twice[0]}.jsonl. Rename one of them.")
        return files


class _Member(NamedTuple):
    name: str
    key: str  # the name up to the first dot after the last slash
    suffix: str  # from that dot on, in lower case
    content: bytes


class WebDataset(_Folder):
    """Tar files whose members come in groups of one key: `000.jpg` with `000.txt` or `000.json`."""

    suffixes = (".tar", ".tar.gz", ".tgz")

    def chunks(self, file: Path) -> list[Chunk]:
        one = [Chunk(0, 0, 0, 0, 0, 0)]  # a tar file can only be read from its beginning
        return one if any(_samples(file)) else []

    def records(self, file: Path, chunk: Chunk) -> Iterator[Record]:
        seen: set[str] = set()
        for index, members in enumerate(_samples(file)):
            if isinstance(members, Failed):
                yield Record(index, f"after {index} samples", None, members)
            elif (key := members[0].key) in seen:  # its image would take the place of the first one's
                twice = Failed("key occurs twice", f"{key!r} stands for another sample earlier in {file}")
                yield Record(index, f"sample {key}", key, twice)
            else:
                seen.add(key)
                yield Record.of(index, f"sample {key}", key, self._item, file, key, members)

    def _item(self, file: Path, key: str, members: list[_Member]) -> dict[str, Any]:
        if ".." in key.split("/"):
            raise Failed("image outside image_dir", f"{key!r} leaves the folder that its tar file is unpacked to")
        pictures = [member for member in members if member.suffix.endswith(IMAGE_SUFFIXES)]
        if len(pictures) != 1:
            names = ", ".join(member.name for member in members)
            raise Failed("several images" if pictures else "no image", f"expected one image, found {names}")
        try:
            text = self._text(members)
        except orjson.JSONDecodeError as error:
            raise Failed("not JSON", f"{key}.json: {error}") from error
        except UnicodeDecodeError as error:
            raise Failed("text unreadable", f"{key}.txt: {error}") from error
        image = store_image(self.image_dir, f"{file_stem(file)}/{key}", pictures[0].content)
        return build_item([image], text, self.task, key)

    def _text(self, members: list[_Member]) -> Any:
        contents = {member.suffix: member.content for member in members}
        if ".txt" in contents:
            return contents[".txt"].decode("utf-8-sig")
        described = orjson.loads(contents.get(".json", b"{}"))
        names = (self.text_field,) if self.text_field else TEXT_FIELDS
        return next((described[name] for name in names if isinstance(described, dict) and name in described), None)


def _samples(file: Path) -> Iterator[list[_Member] | Failed]:
    """Neighbours of one key; at the end, where the file is damaged, what is wrong with it."""
    members: list[_Member] = []
    damage = None
    try:
        for member in _members(file):
            if members and member.key != members[0].key:
                yield members
                members = []
            members.append(member)
    except (tarfile.TarError, EOFError, OSError) as error:
        damage = Failed("tar file damaged", f"{file}: {error}; what follows is lost. Fetch the file again.")
    if members:
        yield members
    if damage:
        yield damage


def _members(file: Path) -> Iterator[_Member]:
    with tarfile.open(file, "r|*") as tar:
        for member in tar:
            if member.isfile():
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, rest = base.partition(".")
                content = tar.extractfile(member).read()
                yield _Member(member.name, f"{folder}/{stem}" if folder else stem, (dot + rest).lower(), content)


class Parquet(_Folder):
    """Hugging Face parquet files: a text column and an image column (`{bytes, path}`, bytes, or a list of either)."""

    suffixes = (".parquet",)

    def chunks(self, file: Path) -> list[Chunk]:
        parquet = _open_parquet(file)
        self._text_column(file, parquet.schema_arrow.names)
        metadata = parquet.metadata
        chunks, first = [], 0
        for index in range(metadata.num_row_groups):
            rows = metadata.row_group(index).num_rows
            chunks.append(Chunk(index, first, rows, 0, 0, 0))
            first += rows
        return chunks if first else []

    def records(self, file: Path, chunk: Chunk) -> Iterator[Record]:
        parquet = _open_parquet(file)
        names = parquet.schema_arrow.names
        text_field = self._text_column(file, names)
        columns = [self.image_field, text_field] + (["id"] if "id" in names else [])
        row, end = chunk.first_item, chunk.first_item + chunk.items
        try:
            for batch in parquet.iter_batches(_ROWS, row_groups=[chunk.index], columns=columns):
                for values in batch.to_pylist():
                    item_id = values.get("id", f"{file_stem(file)}/{row}")
                    given = (f"{file_stem(file)}/{row:08d}", values[self.image_field], values[text_field], item_id)
                    yield Record.of(row, f"row {row}", item_id, self._item, *given)
                    row += 1
        except (OSError, pyarrow.ArrowException) as error:
            damage = Failed("parquet file damaged", f"{file}: {error}; fetch it again")
            yield from (Record(lost, f"row {lost}", None, damage) for lost in range(row, end))

    def _item(self, stem: str, images: Any, text: Any, item_id: Any) -> dict[str, Any]:
        named = {f"{stem}_{i}": image for i, image in enumerate(images)} if isinstance(images, list) else {stem: images}
        stored = [store_image(self.image_dir, name, _image_bytes(image)) for name, image in named.items()]
        return build_item(stored, text, self.task, item_id)

    def _text_column(self, file: Path, names: list[str]) -> str:
        wanted = (self.text_field,) if self.text_field else TEXT_FIELDS
        found = [name for name in wanted if name in names]
        if self.image_field not in names or not found:
            raise UserError(
                f"{file}: expected an image column {self.image_field!r} and a text column "
                f"{' or '.join(map(repr, wanted))}, found {names}. Name yours with --image_field and --text_field."
            )
        return found[0]


def _image_bytes(value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    path = value.get("path") if isinstance(value, dict) else value
    found = f"the bytes are not in the file, only {reprlib.repr(path)}" if path else "the image is null"
    raise Failed("no image", found)


@lru_cache(maxsize=4)
def _open_parquet(file: Path) -> ParquetFile:
    try:
        return ParquetFile(file, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: not a parquet file, or a damaged one ({error})") from error
