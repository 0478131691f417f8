"""Checks the output of codebook inference, as far as that is possible without encoding an image.

Annotations and output are read side by side, in bounded memory: every annotation must have its line, byte for byte, or
its entry in `*.rejected.jsonl`, and every line must belong to an annotation.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson

from vision_tokenizer.codebook.inputs import input_files, input_stem, input_table
from vision_tokenizer.codebook.output import RATIO
from vision_tokenizer.codebook.read import Output, Place, parse_line, read_lines
from vision_tokenizer.images.anchors import crop_share, ratio_tag
from vision_tokenizer.review.issues import Issues, Reservoir, rejected_entries
from vistoken.errors import Failed, UserError
from vistoken.jobs.chunks import Item
from vistoken.jobs.counts import SUMMARY, Counts
from vistoken.jobs.files import sha256_of
from vistoken.jobs.run import Table
from vistoken.store import Location

CHUNK_ITEMS = 512  # read at a time
LOOK_AHEAD = 256  # items among which we look for the one that an output line belongs to


def verify_output(output: Output, sample: Reservoir[Place], issues: Issues, on_item: Callable[[], object]) -> Counts:
    """Check a data set's output. Returns what it holds, counted as the run itself counts."""
    counts, expected = Counts(), set()
    with tempfile.TemporaryDirectory() as cache:
        for path in input_files(output.dataset):
            file = output.folder / f"{input_stem(output.dataset, path)}.{output.settings.output_format}"
            expected.add(file)
            try:
                table = input_table(output.dataset, path, CHUNK_ITEMS, Path(cache) / f"{path.name}.json", whole=False)
            except UserError as error:
                issues.add("annotations unreadable", str(error))
                continue
            if output.manifest["inputs"].get(path.name) != table.fingerprint:
                issues.add("annotations changed", f"{path}: not the file that the manifest says was encoded")
            if not file.exists():
                count = "all" if table.items is None else f"{table.items:,}"  # a tar file does not tell
                issues.add("output file missing", f"{file}: {count} items of {path} have no codes")
                counts.items += table.items or 0
                continue
            _Walk(output, table, file, sample, issues, counts, on_item).run()
    for file in set(output.files()) - expected:
        issues.add("foreign file", f"{file}: no annotation file or shard of that name")
    _check_statistics(output, counts, issues)
    return counts


@dataclass
class _Walk:
    """Reads the items, output lines and rejected entries of one annotation file side by side."""

    output: Output
    table: Table
    file: Location
    sample: Reservoir[Place]
    issues: Issues
    counts: Counts
    on_item: Callable[[], object]

    def run(self) -> None:
        items, waiting = deque[Item](), self._without_entry()
        for number, line in enumerate(read_lines(self.file), start=1):
            items.extend(islice(waiting, LOOK_AHEAD - len(items)))
            position = next((position for position, item in enumerate(items) if _made_of(line, item)), None)
            if position is None:
                self.issues.add("line of no item", f"{self.file}, line {number}: none of the next items is like it")
                continue
            for _ in range(position):
                self._lost(items.popleft())
            items.popleft()
            self._check_line(number, line)
        for item in chain(items, waiting):
            self._lost(item)

    def _without_entry(self) -> Iterator[Item]:
        """Count the items; give those of which no rejected entry says why they have no line."""
        path = self.file.with_suffix(".rejected.jsonl")
        entries = rejected_entries(path, self.issues)
        entry = next(entries, None)
        for index in range(len(self.table)):
            for item in self.table.read(self.table[index]):
                self.on_item()
                self.counts.items += 1
                if entry and entry["item"] == item.index:
                    self.counts.reasons[entry["kind"], entry["reason"]] += 1
                    entry = next(entries, None)
                else:
                    yield item
        while entry:
            self.issues.add("entry of no item", f"{path}: item {entry['item']} is not waiting for it")
            entry = next(entries, None)

    def _lost(self, item: Item) -> None:
        self.issues.add("item lost", f"{self.table.path}, {item.where}: neither in {self.file.name} nor rejected")

    def _check_line(self, number: int, line: bytes) -> None:
        self.counts.done += 1
        where = f"{self.file}, line {number}"
        try:
            _, images = parse_line(line, self.output)
        except Failed as error:
            self.issues.add(error.reason, f"{where}: {error.detail}")
            return
        threshold = self.output.settings.crop_percent_thresh
        matched = [image.anchor for image in images]
        self.counts.tallies[ratio_tag(matched[0]) if len(set(matched)) == 1 else f"{RATIO}mixed"] += 1
        for index, image in enumerate(images):
            self.counts.tallies["images"] += 1
            self.sample.offer(Place(self.output, self.file, number, index, image))
            if 0 < threshold < crop_share(*image.size, image.anchor):
                self.issues.add("should be rejected", f"{where}, image {index}: {image.size} loses more than allowed")


def _made_of(line: bytes, item: Item) -> bool:
    """Whether an output line is this annotation, byte for byte, with three fields added."""
    if item.error or not item.raw.endswith(b"}"):
        return False
    return line.startswith(item.raw[:-1].rstrip() + b', "image_sizes":')


def _check_statistics(output: Output, counts: Counts, issues: Issues) -> None:
    if not (output.folder / SUMMARY).exists():
        again = f"{output.folder}: no {SUMMARY}: the run has not ended, or was stopped; its command goes on"
        issues.add("run not finished", again)
        return
    counted = {name: n for name, n in counts.tallies.items() if name.startswith(RATIO)}
    path = output.settings.statistics_file(output.dataset)
    stored = _load(path, issues)
    for name in sorted(counted.keys() | stored.keys()):
        said, found = stored.get(name, 0), counted.get(name, 0)
        if said != found:
            issues.add("statistics differ", f"{path}: {name} is {said}, the lines have {found}")
    path = output.folder / SUMMARY
    summary = _load(path, issues)
    files, total = (_object(summary, name, path, issues) for name in ("files", "total"))
    for name in files:
        file = output.folder / f"{input_stem(output.dataset, Path(name))}.{output.settings.output_format}"
        if file.exists() and _object(files, name, path, issues).get("sha256") != sha256_of(file):
            issues.add("file changed", f"{file}: not the bytes that the run wrote, by the hash in {path.name}")
    for name in ("items", "done", "rejected", "failed"):
        if total.get(name) != getattr(counts, name):
            issues.add("summary differs", f"{path}: {name} is {total.get(name)}, found {getattr(counts, name)}")


def _load(path: Location, issues: Issues) -> dict[str, Any]:
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        issues.add("file missing", str(path))
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        issues.add("file damaged", f"{path}: {error}")
        return {}
    return _object({"all of it": content}, "all of it", path, issues)


def _object(holder: dict[str, Any], name: str, path: Location, issues: Issues) -> dict[str, Any]:
    value = holder.get(name, {})
    if not isinstance(value, dict):
        issues.add("file damaged", f"{path}: {name} must be an object, is {value!r:.60}")
        return {}
    return value
