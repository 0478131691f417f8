"""Join the sub-records of all ranks into the one record file that training reads.

    python -u pre_tokenize/concat_record.py --sub_record_dir /path/to/out_dir --save_path /path/to/out_dir/record.json

Every rank must have finished, every item must be accounted for exactly once (tokenised, or listed with its reason in
the rank's `*.rejected.jsonl`), and every token file named must exist and belong to this run; otherwise nothing is
written, and the message names what is missing. `--allow_partial` goes on with what there is.

Beside the record it writes `*.rejected.jsonl`, the items that are not in it, and `*.summary.json`. Sub-records in the
published form (pickles, no manifest) are joined, too. Memory does not grow with the number of items.

Training shares batches out by their length with the continuous tokens of the images, whose sizes pre_tokenize.py notes.
With `--image_sizes` those that older or published sub-records lack are read from the images' headers.
"""

import heapq
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import orjson
from tqdm import tqdm

from pre_tokenize.record import Lengths, companions, entry_line, manifest_id, read_entries
from pre_tokenize.token_file import MAKE_ANEW, Contents, contents_of, exif_orientation_of
from vision_tokenizer.images.files import open_image, upright_size
from vistoken.cli import command_parser, run_command
from vistoken.errors import DataError, Failed, UserError
from vistoken.files import is_there, open_file
from vistoken.jobs.files import atomic_write, write_json
from vistoken.jobs.manifest import read_manifest
from vistoken.store import Location, location, within

_NAME = re.compile(r"(\d+)-of-(\d+)-record\.jsonl")
PIECE = 1 << 18  # entries sorted in memory at a time
_SHOWN = 10  # ids named in a message


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--sub_record_dir", type=location, required=True, help="the --out_dir of pre_tokenize.py")
    add("--save_path", type=location, required=True, help="the record to write, .json or .jsonl")
    add("--allow_partial", action="store_true", help="warn of missing ranks and items instead of ending")
    add("--image_sizes", action="store_true", help="read the sizes that sub-records lack from the images")
    args = parser.parse_args(argv)
    if args.save_path.suffix not in (".json", ".jsonl"):
        raise UserError(f"--save_path {args.save_path}: name it .json or .jsonl")
    if _NAME.fullmatch(f"{args.save_path.stem}.jsonl"):
        raise UserError(f"--save_path {args.save_path}: that is a rank's name, and what it wrote would be lost")
    sub_records = find_sub_records(args.sub_record_dir, args.allow_partial)
    manifest = read_manifest(args.sub_record_dir)
    if manifest is not None:
        check_manifests(sub_records, manifest)
    lengths = concat(sub_records, args.save_path, manifest, args.allow_partial, read_sizes=args.image_sizes)
    print(f"{args.save_path}: {lengths}")


def lack(message: str, allow_partial: bool) -> None:
    """Something is missing: the end, or with `--allow_partial` a warning."""
    if not allow_partial:
        raise DataError(f"{message}. Run pre_tokenize.py again to finish, or go on regardless with --allow_partial.")
    print(f"warning: {message}", flush=True)


def find_sub_records(folder: Location, allow_partial: bool) -> list[Location]:
    """The sub-records in `folder`, by rank. Raises `UserError` for none, or for those of several runs."""
    ranks: dict[int, dict[int, Location]] = {}
    for path in folder.glob("*-of-*-record.jsonl"):
        if match := _NAME.fullmatch(path.name):
            ranks.setdefault(int(match[2]), {})[int(match[1])] = path
    if not ranks:
        raise UserError(
            f"{folder}: no sub-record here ({{rank}}-of-{{splits}}-record.jsonl). Run pre_tokenize.py first."
        )
    if len(ranks) > 1:
        names = " and ".join(f"*-of-{splits}" for splits in sorted(ranks))
        raise DataError(f"{folder}: sub-records of several runs, {names}. Delete those that are out of date.")
    splits, found = ranks.popitem()
    if missing := [rank for rank in range(splits) if rank not in found]:
        ranks_named = f"rank {_listed(missing)} of {splits}"
        lack(f"{folder}: no sub-record of {ranks_named}: not started, or not finished", allow_partial)
    return [found[rank] for rank in sorted(found)]


def check_manifests(sub_records: Sequence[Location], manifest: dict[str, Any]) -> None:
    """Every sub-record must come from the run whose manifest lies beside it."""
    for path in sub_records:
        summary = companions(path)[1]
        try:
            stored = orjson.loads(summary.read_bytes())["manifest"]
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{summary}: {path.name} has no readable summary. Run its rank again.") from error
        if stored != manifest_id(manifest):
            raise DataError(
                f"{path}: made by another run (manifest {stored}, the one here is {manifest_id(manifest)}). "
                "Delete the sub-record, or put it where it belongs."
            )


def concat(
    sub_records: Sequence[Location],
    save_path: Location,
    manifest: dict[str, Any] | None,
    allow_partial: bool,
    *,
    read_sizes: bool = False,
) -> Lengths:
    """Write `save_path` and its companions, and return the lengths of its items.

    Raises `UserError`, and leaves what was there before, unless every item occurs once and every file is sound.
    """
    rejected_path, summary_path = companions(save_path)
    folder = sub_records[0].parent
    files = TokenFileCheck(folder, save_path.parent, manifest, ImageSizes() if read_sizes else None)
    expected = manifest["input"]["items"] if manifest else None
    order, lengths = Order(expected), Lengths()
    opening, separator, closing = (b"[\n", b",\n", b"\n]\n") if save_path.suffix == ".json" else (b"", b"\n", b"\n")
    with TemporaryDirectory() as spill, atomic_write(save_path) as out, atomic_write(rejected_path) as rejected:
        out.write(opening)
        merged = _merged(sub_records, Path(spill))
        for item, content in tqdm(merged, "concat records", expected, unit="item", mininterval=1.0):
            if not order.take(item):
                continue
            if isinstance(content, bytes):
                rejected.write(content)
            else:
                out.write(separator if lengths.items else b"")
                out.write(files.placed(content))
                lengths.add(content["len"])
        out.write(closing if lengths.items else closing.lstrip())
        for problem in order.problems():
            lack(f"{folder}: {problem}", allow_partial)
    if not rejected_path.stat().st_size:
        rejected_path.unlink()
    write_json(summary_path, lengths.as_dict())
    return lengths


class Order:
    """Items as they come by, which must be 0, 1, 2, ... each exactly once."""

    def __init__(self, items: int | None):
        self._items = items
        self._next = 0
        self._missing: list[str] = []
        self._doubled: list[str] = []

    def take(self, item: int) -> bool:
        """Whether `item` is new."""
        if item < self._next:
            self._doubled.append(str(item))
            del self._doubled[_SHOWN + 1 :]
            return False
        self._skip_to(item)
        self._next = item + 1
        return True

    def problems(self) -> Iterator[str]:
        if self._items is not None:
            if self._next > self._items:
                yield f"items up to {self._next - 1}, but the input has only {self._items}"
            self._skip_to(self._items)
        if self._missing:
            yield f"items missing: {_listed(self._missing)}"
        if self._doubled:
            yield f"items that occur more than once: {_listed(self._doubled)}"

    def _skip_to(self, item: int) -> None:
        if item > self._next and len(self._missing) <= _SHOWN:
            self._missing.append(f"{self._next}" if item == self._next + 1 else f"{self._next}-{item - 1}")


class _TokenFile(NamedTuple):
    """A token file that a sub-record names as `given`, and the record as `name`."""

    given: str
    name: str
    path: Location
    contents: Contents


class TokenFileCheck:
    """Entries as they must stand in the record, their token files checked on the way."""

    def __init__(
        self,
        folder: Location,
        record_folder: Location,
        manifest: dict[str, Any] | None,
        image_sizes: "ImageSizes | None" = None,
    ):
        self._folder, self._manifest, self._image_sizes = folder, manifest, image_sizes
        self._way = "."  # from the record to the token files
        if folder != record_folder:
            on_disk = isinstance(folder, Path) and isinstance(record_folder, Path)
            self._way = os.path.relpath(str(folder), str(record_folder)) if on_disk else str(folder)
        self._last: _TokenFile | None = None  # the file looked at last: entries of one come together

    def placed(self, entry: dict[str, Any]) -> bytes:
        """`entry` with its file relative to the record, and in a file's first entry its hash.

        Raises `DataError` where the file is missing, damaged, foreign, or does not hold what the entry says.
        """
        sha256, file = None, self._last
        if file is None or file.given != entry["file"]:
            file = self._last = self._open(entry["file"], entry.get("sha256"))
            sha256 = file.contents.sha256
        if "row" not in entry and file.path.suffix == ".arrow":
            raise DataError(f"{file.path}: the sub-record names no row for item {entry['id']}. Run its rank again.")
        found, row = file.contents, entry.get("row", 0)
        if row >= len(found.ids):
            raise DataError(f"{file.path}: the sub-record names row {row}, the file has {len(found.ids)}")
        if found.ids[row] != entry["id"] or found.lengths[row] != entry["len"]:
            raise DataError(
                f"{file.path}, row {row}: holds item {found.ids[row]} of {found.lengths[row]} tokens, but the "
                f"sub-record says item {entry['id']} of {entry['len']}. Delete the sub-record and run its rank again."
            )
        sizes = entry.get("image_sizes")
        if sizes is None and self._image_sizes:
            sizes = self._image_sizes.of_row(found, row)
        return entry_line(file.name, entry.get("row"), entry["len"], entry["id"], sha256, sizes)

    def _open(self, file: str, sha256: str | None) -> _TokenFile:
        path = self._folder / file
        name = file if self._way == "." else str(location(self._way) / file)
        if not is_there(path):  # False for what cannot be a name, too; the published tool names files from where it ran
            path = Path(file).absolute()
            name = str(path)
        if not is_there(path):
            raise DataError(
                f"{self._folder / file}: a sub-record names this token file, but it does not exist. {MAKE_ANEW}"
            )
        contents = contents_of(path, sha256)
        if contents.manifest is not None and contents.manifest != (self._manifest or {}):
            raise DataError(f"{path}: a token file of another run: its manifest is not that of {self._folder}")
        return _TokenFile(file, name, path, contents)


class ImageSizes:
    """Reads the (h, w) of images from their headers: of all images of a token file side by side."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="header")
        self._file: Contents | None = None
        self._read: dict[str, Future[tuple[int, int] | None]] = {}

    def of_row(self, file: Contents, row: int) -> list[tuple[int, int]] | None:
        """None where one cannot be read: training will put another sample in the place of this one."""
        if file is not self._file:
            folder = location((file.manifest or {}).get("image_dir", ""))
            orientation = exif_orientation_of(file.manifest)
            names = {name for number in range(len(file.ids)) for name in file.images(number)}
            self._file = file
            self._read = {name: self._pool.submit(_image_size, within(folder, name), orientation) for name in names}
        images = file.images(row)
        sizes = [size for name in images if (size := self._read[name].result())]
        return sizes if len(sizes) == len(images) else None


def _image_size(path: Location, orientation: str) -> tuple[int, int] | None:
    try:
        with open_image(path) as image:
            return upright_size(image, orientation)
    except Failed:
        return None


def _merged(sub_records: Sequence[Location], spill: Location) -> Iterator[tuple[int, dict[str, Any] | bytes]]:
    """(item, its entry, or its line in the rank's `*.rejected.jsonl`) of all ranks, ordered by item."""
    streams: list[Iterable] = []
    for path in sub_records:
        streams += _ascending(path, spill)
        streams.append(_rejected(companions(path)[0]))
    return heapq.merge(*streams, key=itemgetter(0))


def _rejected(path: Location) -> Iterator[tuple[int, bytes]]:
    if path.exists():
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    item = int(orjson.loads(line)["item"])
                except (ValueError, LookupError, TypeError) as error:
                    message = f"{path}, line {number}: not a rejected item ({error}). Run its rank again."
                    raise DataError(message) from error
                yield item, line


def _rows(path: Location) -> Iterator[tuple[int, dict[str, Any]]]:
    for entry in read_entries(path):
        yield entry["id"], entry


def _ascending(path: Location, spill: Location) -> list[Iterator[tuple[int, dict[str, Any]]]]:
    """The rows of a sub-record as streams that ascend: itself, as a rule, else sorted pieces in `spill`."""
    if all(before <= after for before, after in pairwise(item for item, _ in _rows(path))):
        return [_rows(path)]
    rows = _rows(path)
    pieces: list[Location] = []
    while piece := sorted(islice(rows, PIECE), key=itemgetter(0)):
        pieces.append(spill / f"{path.stem}-{len(pieces)}.jsonl")
        pieces[-1].write_bytes(b"".join(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for _, entry in piece))
    return [_rows(piece) for piece in pieces]


def _listed(things: Sequence[Any]) -> str:
    return ", ".join(map(str, things[:_SHOWN])) + (", ..." if len(things) > _SHOWN else "")


if __name__ == "__main__":
    run_command(main)
