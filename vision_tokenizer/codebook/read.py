"""The output of codebook inference read back and checked: what verify, preview and later steps build on."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import orjson

from vision_tokenizer.codebook.annotations import OUTPUT_FIELDS, Dataset
from vision_tokenizer.codebook.forms import read_rows
from vision_tokenizer.codebook.output import Settings
from vision_tokenizer.images.anchors import anchors, match_anchor, model_size
from vision_tokenizer.models.dualvitok.model import grid_sizes
from vistoken.errors import Failed, UserError
from vistoken.files import open_file, reading
from vistoken.jobs.manifest import MANIFEST, read_manifest
from vistoken.store import Location

Grids = tuple[np.ndarray, ...]


class StoredImage(NamedTuple):
    name: str
    size: tuple[int, int]  # (h, w) of the file
    anchor: tuple[int, int]  # (h, w) it was matched to
    grids: Grids  # one a branch, int64 (h, w)


class Output(NamedTuple):
    """A data set's codes and what they were made with."""

    dataset: Dataset
    settings: Settings
    manifest: dict[str, Any]

    @property
    def folder(self) -> Location:
        return self.settings.folder(self.dataset)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.manifest["tokenizer"]["codebook_sizes"])

    @property
    def fingerprint(self) -> str:
        return self.manifest["tokenizer"]["fingerprint"]

    @property
    def choices(self) -> tuple[tuple[int, int], ...]:
        return anchors(self.settings.resolution_type, self.settings.resolution)

    def files(self) -> list[Location]:
        """The files of codes, in name order."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in (".jsonl", ".arrow") and not path.name.endswith(".rejected.jsonl")
        )


class Place(NamedTuple):
    """An image in the output."""

    output: Output
    file: Location
    line: int
    number: int  # among the images of the line
    image: StoredImage

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, image {self.number}"


def open_output(dataset: Dataset, where: Settings) -> Output:
    """The output of a data set. `where` need only have the settings that name its folder; the rest comes from the
    manifest. Raises `UserError` if there is no output, or its manifest is not one of this tag.
    """
    folder = where.folder(dataset)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"data set {dataset.name}: {folder / MANIFEST} does not exist. Run codebook inference first.")
    try:
        stored = {"exif_orientation": "ignore", "cuda_graphs": False, **manifest["settings"]}  # of earlier versions
        settings = Settings(**{field.name: stored[field.name] for field in fields(Settings)})
        complete = all(key in manifest["tokenizer"] for key in ("name", "fingerprint", "branches", "codebook_sizes"))
        complete = complete and isinstance(manifest["inputs"], dict)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: not a manifest of codebook inference, lacks {error}") from error
    if not complete or settings.tag != where.tag:
        raise UserError(f"{folder / MANIFEST}: not the manifest of this folder ({where.tag}); it was changed")
    return Output(dataset, settings, manifest)


def read_lines(path: Location) -> Iterator[bytes]:
    """The lines of an output file, without their ends; of an Arrow file what they would be as JSON.

    Raises `UserError` if it cannot be read.
    """
    if path.suffix == ".arrow":
        yield from (row.line().rstrip(b"\n") for row in read_rows(path))
        return
    with reading(path), open_file(path) as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def parse_line(line: bytes, output: Output) -> tuple[dict[str, Any], list[StoredImage]]:
    """An output line -> the item and its images, everything checked that needs no image. Raises `Failed`."""
    try:
        item = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise Failed("not JSON", str(error)) from error
    if not isinstance(item, dict) or any(not isinstance(item.get(field), list) for field in OUTPUT_FIELDS):
        raise Failed("fields missing", f"expected the lists {', '.join(OUTPUT_FIELDS)}")
    names = [item["images"]] if isinstance(item.get("images"), str) else item.get("images")
    columns = [item[field] for field in OUTPUT_FIELDS]
    if not isinstance(names, list) or any(len(column) != len(names) for column in columns):
        lengths = ", ".join(f"{field}: {len(item[field])}" for field in OUTPUT_FIELDS)
        raise Failed("lengths differ", f"{len(names or [])} images, but {lengths}")
    images = [
        _stored_image(f"image {number}", name, values, output)
        for number, (name, *values) in enumerate(zip(names, *columns, strict=True))
    ]
    return item, images


def _stored_image(where: str, name: str, values: Sequence[Any], output: Output) -> StoredImage:
    size, grids, anchor = values
    for field, pair in (("image_sizes", size), ("matched_ratios", anchor)):
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
            raise Failed("wrong size", f"{where}: {field} must be [height, width], is {pair!r:.60}")
    if match_anchor(size[0], size[1], output.choices) != tuple(anchor):
        raise Failed("wrong anchor", f"{where}: an image of {size} (h, w) is not matched to {anchor}")
    expected = grid_sizes(*model_size(*anchor))
    if not isinstance(grids, list) or len(grids) != len(expected):
        raise Failed("wrong shape", f"{where}: expected {len(expected)} grids of codes")
    branches = zip(output.manifest["tokenizer"]["branches"], grids, expected, output.codebook_sizes, strict=True)
    arrays = tuple(read_grid(f"{where}, {branch}", grid, shape, limit) for branch, grid, shape, limit in branches)
    return StoredImage(name, tuple(size), tuple(anchor), arrays)


def read_grid(where: str, grid: Any, shape: tuple[int, int], limit: int) -> np.ndarray:
    """Rows of codes as an (h, w) array. Raises `Failed` where they are not of that shape, or not below `limit`."""
    try:
        array = np.array(grid)
    except ValueError:
        raise Failed("wrong shape", f"{where}: the rows are not of one length") from None
    if array.shape != tuple(shape):
        raise Failed("wrong shape", f"{where}: expected {shape[0]} x {shape[1]} codes, found {array.shape}")
    if array.dtype.kind != "i":
        raise Failed("wrong type", f"{where}: codes must be integers, found {array.dtype}")
    if array.min() < 0 or array.max() >= limit:
        raise Failed("code out of range", f"{where}: codes lie in [0, {limit}), found {array.min()} to {array.max()}")
    return array
