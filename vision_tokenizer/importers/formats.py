"""Sources whose images lie in a folder: there they stay, and are only referred to.

A format lists its files, cuts each into chunks, and reads a chunk. Those with the images inside are in `archives`.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import orjson

from vision_tokenizer.codebook.annotations import check_conversations, image_names, image_path
from vision_tokenizer.codebook.items import IMAGE_SUFFIXES, build_item, item_line
from vistoken.errors import Failed, ItemError, Rejected, UserError
from vistoken.files import check_regular, is_text, read_file, reading
from vistoken.jobs.chunks import Chunk, ChunkTable, Item, chunk_table
from vistoken.jobs.run import Chunks

CHUNK_ITEMS = 1000
_LONG_INTEGER = re.compile(rb"\d{19}")  # beyond 64 bits orjson reads a float


@dataclass(frozen=True)
class Format:
    """A source to import.

    Args:
        source: the file or folder.
        image_dir: where its images lie, or are written to by formats that embed them.
        task: "understanding" or "generation"; decides how a caption becomes a conversation.
        text_field, image_field: names of the source's own, where it has such.
        cache: a folder for chunk tables.
    """

    source: Path
    image_dir: Path
    task: str
    text_field: str | None
    image_field: str
    cache: Path

    embeds_images: ClassVar[bool] = False

    def files(self) -> list[Path]:
        """The files of the source; each becomes one annotation file."""
        return [self.source]

    def fingerprint(self, file: Path) -> str:
        """Changes with the content of `file`. Size and time of change: a hash would read terabytes of images."""
        stat = file.stat()
        return f"{stat.st_size} bytes, {stat.st_mtime_ns}"

    def state(self, file: Path) -> str:
        """Changes with what may be edited between runs; then `file` is imported anew, which must be cheap."""
        return ""

    def chunks(self, file: Path) -> Chunks:
        """`file` in chunks that are done, and after an interruption done again, as a whole."""
        raise NotImplementedError

    def items(self, file: Path, chunk: Chunk) -> Iterator[Item]:
        """What the records of a chunk become. Images in the file are written as their items are asked for."""
        raise NotImplementedError


def made_item(index: int, where: str, id: Any, make: Callable[..., dict[str, Any]], *given: Any) -> Item:
    """What a record of the source becomes: the item that `make(*given)` returns, or the error that it raises."""
    try:
        value = make(*given)
        return Item(index, where, item_line(value), value, id=id)
    except ItemError as error:
        return Item(index, where, b"", None, error, id)


def existing_image(image_dir: Path, name: str) -> str:
    """`name` itself, if that image lies in `image_dir`. Raises `Failed` if not."""
    path = image_path(image_dir, name)
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise Failed("image not found", str(path)) from error
    except OSError as error:
        raise Failed("image unreadable", f"{path}: {error.strerror}") from error
    return name


def _ranges(items: int) -> list[Chunk]:
    starts = range(0, items, CHUNK_ITEMS)
    return [Chunk(i, first, min(CHUNK_ITEMS, items - first), 0, 0, 0) for i, first in enumerate(starts)]


class Llava(Format):
    """A `.json` list or `.jsonl` of `{"id", "image": name or names, "conversations": [...]}`; other fields are kept."""

    def chunks(self, file: Path) -> ChunkTable:
        return self._table

    @cached_property
    def _table(self) -> ChunkTable:
        return chunk_table(self.source, CHUNK_ITEMS, self.cache / f"{self.source.stem}.chunks.json")

    def items(self, file: Path, chunk: Chunk) -> Iterator[Item]:
        for item in self._table.read(chunk):
            rounded = item.error is None and _LONG_INTEGER.search(item.raw)
            value = json.loads(item.raw) if rounded else item.value
            yield made_item(item.index, item.where, item.id, self._item, value, item.error)

    def _item(self, value: Any, error: Failed | None) -> dict[str, Any]:
        if error:
            raise error
        if not isinstance(value, dict):
            raise Failed("not an object", f"expected a JSON object, found {type(value).__name__}")
        rest = {key: content for key, content in value.items() if key not in ("image", "images")}
        given = value.get("images", value.get("image"))
        item = rest if given is None or given == [] else {"images": given, **rest}
        if "images" in item:
            item["images"] = [existing_image(self.image_dir, name) for name in image_names(item)]
        check_conversations(item)
        return item


class Coco(Format):
    """A COCO captions file: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`.

    Every caption becomes an item; those of one image follow each other, so that it is encoded once.
    """

    def chunks(self, file: Path) -> list[Chunk]:
        return _ranges(len(self._captions))

    def items(self, file: Path, chunk: Chunk) -> Iterator[Item]:
        for index in range(chunk.first_item, chunk.first_item + chunk.items):
            where, image, annotation = self._captions[index]
            yield made_item(index, where, annotation.get("id"), self._item, image, annotation)

    def _item(self, image: dict[str, Any] | None, annotation: dict[str, Any]) -> dict[str, Any]:
        if image is None:
            raise Failed("unknown image_id", f"image_id {annotation.get('image_id')!r} is not among the images")
        if not annotation:
            raise Rejected("no caption", f"no annotation has image_id {image['id']!r}")
        if not isinstance(annotation.get("caption"), str):
            raise Failed("no caption", "the annotation has no caption; is this a captions_*.json file?")
        images = [existing_image(self.image_dir, image["file_name"])]
        return build_item(images, annotation["caption"], self.task, annotation.get("id"))

    @cached_property
    def _captions(self) -> list[tuple[str, dict[str, Any] | None, dict[str, Any]]]:
        """(where, image, annotation): by image, an image without captions once, then the annotations of no image."""
        images, annotations = _read_lists(self.source, ("images", "annotations"))
        for index, image in enumerate(images):
            if "id" not in image or not isinstance(image.get("file_name"), str):
                raise UserError(f"{self.source}: images[{index}]: expected id and file_name, found {sorted(image)}")
        of_image = defaultdict(list)
        for index, annotation in enumerate(annotations):
            of_image[str(annotation.get("image_id"))].append((f"annotations[{index}]", annotation))
        captions = []
        for index, image in enumerate(images):
            found = of_image.pop(str(image["id"]), [(f"images[{index}]", {})])
            captions += [(where, image, annotation) for where, annotation in found]
        return captions + [(where, None, annotation) for rest in of_image.values() for where, annotation in rest]


def _read_lists(file: Path, fields: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    try:
        with reading(file):
            content = orjson.loads(read_file(file))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    for field in fields:
        objects = content.get(field) if isinstance(content, dict) else None
        if not isinstance(objects, list) or not all(isinstance(entry, dict) for entry in objects):
            raise UserError(f"{file}: not a COCO captions file: expected an object with a list of objects as {field!r}")
    return [content[field] for field in fields]


class Pairs(Format):
    """A folder, with folders in it or not, of images that each have a `.txt` of the same name beside them."""

    def fingerprint(self, file: Path) -> str:
        return "any"  # captions are added and corrected all the time, and read in a minute: see `state`

    def state(self, file: Path) -> str:
        digest = hashlib.sha256()
        for name, text in self._pairs:
            digest.update(f"{name}\n".encode(errors="surrogateescape"))
            if text:
                with suppress(OSError):  # what cannot be read fails as an item
                    digest.update(super().fingerprint(self.source / text).encode())
        return digest.hexdigest()

    def chunks(self, file: Path) -> list[Chunk]:
        return _ranges(len(self._pairs))

    def items(self, file: Path, chunk: Chunk) -> Iterator[Item]:
        for index in range(chunk.first_item, chunk.first_item + chunk.items):
            name, text = self._pairs[index]
            if not is_text(name):
                shown = name.encode(errors="backslashreplace").decode()
                strange = Failed("name not UTF-8", f"{self.source / shown}: rename the file")
                yield Item(index, shown, b"", None, strange, shown)
                continue
            item_id = str(PurePosixPath(name).with_suffix(""))
            yield made_item(index, name, item_id, self._item, name, text, item_id)

    def _item(self, name: str, text: str | None, item_id: str) -> dict[str, Any]:
        if text is None:
            raise Failed("no text", f"{self.source / item_id}.txt does not exist")
        if text == name:
            raise Failed("no image", f"{self.source / text}: no image of that name beside it")
        try:
            caption = read_file(self.source / text).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise Failed("text unreadable", f"{self.source / text}: {error}") from error
        return build_item([existing_image(self.source, name)], caption, self.task, item_id)

    @cached_property
    def _pairs(self) -> list[tuple[str, str | None]]:
        """Images with their texts, and texts of no image with themselves, relative to the folder, in name order."""
        images, texts = [], set()
        for folder, inner, files in os.walk(self.source, onerror=_unreadable, followlinks=True):
            inner[:] = [name for name in inner if not _leads_back(Path(folder, name))]
            inside = PurePosixPath(Path(folder).relative_to(self.source))
            for file in files:
                kind = PurePosixPath(file).suffix.lower()
                if kind in IMAGE_SUFFIXES:
                    images.append(inside / file)
                elif kind == ".txt":
                    texts.add(str(inside / file))
        if not images:
            raise UserError(f"{self.source}: no image in it ({', '.join(IMAGE_SUFFIXES)})")
        pairs: dict[str, str | None] = {text: text for text in texts}
        for image in images:
            beside = (str(image.with_suffix(suffix)) for suffix in (".txt", ".TXT"))
            pairs[str(image)] = text = next((name for name in beside if name in texts), None)
            if text:
                pairs.pop(text, None)
        return sorted(pairs.items())


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot read it ({error.strerror})") from error


def _leads_back(folder: Path) -> bool:
    """Whether `folder` is a link to one that it lies in."""
    return folder.is_symlink() and any(folder.samefile(above) for above in folder.absolute().parents)
