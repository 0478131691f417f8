"""Training pictures: which files there are, which of them make a batch, and their pixels.

What a batch holds depends on the seed, the epoch and its place alone, so a resumed run sees what it would have seen.
"""

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_tokenizer.codebook.annotations import image_names, image_path, select_datasets
from vision_tokenizer.fitting.config import DataSettings
from vision_tokenizer.fitting.transforms import bucket_size, cover, flipped, random_crop, shorter_side_crop
from vision_tokenizer.images.dualvitok import to_pixels
from vision_tokenizer.images.files import damage_named, open_image, read_image
from vistoken.errors import Failed, UserError
from vistoken.jobs.progress import bar
from vistoken.store import Location

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Place:
    """A picture in a batch: which one, at which size, and where its random numbers come from."""

    index: int
    size: Size
    seed: str


class Batch(NamedTuple):
    pixels: Tensor  # (B, 3, H, W) uint8
    names: list[str]
    failed: list[str]  # why pictures of this batch could not be read; others stand in for them


def list_images(folder: Path) -> list[Path]:
    """All images below a folder, sorted; hidden ones are left out."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def find_images(settings: DataSettings) -> list[tuple[Location, Size | None]]:
    """Files of the data set with their sizes, where a list tells them. Raises `UserError`, also for none."""
    files: list[tuple[Location, Size | None]]
    if settings.data_config:
        files = [(path, None) for path in _images_of_datasets(Path(settings.data_config))]
    elif not settings.data_path:
        raise UserError("no training pictures: give --data_args.data_path=FOLDER or --data_args.data_config=FILE")
    elif settings.size_list:
        files = _read_size_list(Path(settings.size_list), Path(settings.data_path))
    else:
        files = [(path, None) for path in list_images(Path(settings.data_path))]
    if not files:
        raise UserError(f"{settings.data_config or settings.data_path}: no images ({', '.join(SUFFIXES)}) in it")
    return files


def _read_size_list(file: Path, folder: Path) -> list[tuple[Location, Size | None]]:
    try:
        rows = json.loads(file.read_text())
        sizes = [(int(row["height"]), int(row["width"])) for row in rows]
        if (number := next((n for n, size in enumerate(sizes) if min(size) < 1), None)) is not None:
            raise ValueError(f"entry {number} ({rows[number]['image']}) has no area")
        return [(folder / row["image"], size) for row, size in zip(rows, sizes, strict=True)]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such size list") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}: not a list of {{"image": path, "width": w, "height": h}}: {error!r}. '
            "`python -m vision_tokenizer.fitting.size_list` writes one"
        ) from error


def _images_of_datasets(config: Path) -> list[Location]:
    """Every picture that the annotations of a metadata config name, once; items without a picture are left out."""
    found: dict[Location, None] = {}
    for dataset in select_datasets(config, None):
        for file in dataset.annotation_files():
            text = file.read_text(encoding="utf-8-sig")
            try:
                rows = json.loads(text) if file.suffix == ".json" else map(json.loads, text.splitlines())
                for row in rows:
                    with suppress(Failed):
                        found.update((image_path(dataset.image_dir, name), None) for name in image_names(row))
            except ValueError as error:
                raise UserError(f"{file}: not valid JSON: {error}") from error
    return list(found)


class Photographs(Dataset):
    """`Place` -> (uint8 (3, H, W), name, why it failed or ""); the next picture replaces one that cannot be read."""

    TRIES = 20

    def __init__(self, files: Sequence[Location], settings: DataSettings):
        self.files, self.settings = files, settings
        self.cache: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: Place) -> tuple[Tensor, str, str]:
        problems = []
        for offset in range(min(self.TRIES, len(self.files))):
            index = (place.index + offset) % len(self.files)
            try:
                image = self._read(index)
            except Failed as error:
                problems.append(str(error))
                continue
            cut = self._cut(image, place.size, random.Random(place.seed))
            return to_pixels(cut), str(self.files[index]), "; ".join(problems)
        raise UserError(f"{self.TRIES} pictures in a row cannot be read, the last: {problems[-1]}")

    def _read(self, index: int) -> Image.Image:
        image = self.cache.get(index)
        if image is None:
            path = self.files[index]
            image = read_image(path)
            with damage_named(path):
                image = image.convert("RGB")
            if self.settings.cache:
                self.cache[index] = image
        return image

    def _cut(self, image: Image.Image, size: Size, draw: random.Random) -> Image.Image:
        match self.settings.augment:
            case "dualvitok_fix_resolution_train":
                return flipped(shorter_side_crop(image, size[0]), draw)
            case "dualvitok_fix_resolution_val":
                return shorter_side_crop(image, size[0])
            case "random_crop":
                return flipped(random_crop(image, size[0], self.settings.crop_share, draw), draw)
            case _:
                return cover(flipped(image, draw), size, draw)


def join(samples: list[tuple[Tensor, str, str]]) -> Batch:
    pixels, names, failed = zip(*samples, strict=True)
    return Batch(torch.stack(pixels), list(names), [problem for problem in failed if problem])


@dataclass
class BatchOrder:
    """Which pictures make which batch, for every rank.

    Args:
        sizes: of the batch that a picture belongs in, one per picture; pictures of one size are batched together.
        batch: pictures per rank and micro-batch.
    """

    sizes: list[Size]
    batch: int
    seed: int
    rank: int = 0
    world: int = 1

    def epoch(self, epoch: int) -> list[list[Place]]:
        """This rank's batches: every picture at most once over all ranks, as many batches on each."""
        draw = random.Random(f"{self.seed} order {epoch}")
        buckets: dict[Size, list[int]] = defaultdict(list)
        for index, size in enumerate(self.sizes):
            buckets[size].append(index)
        together = self.batch * self.world
        batches = []
        for size in sorted(buckets):
            indices = buckets[size]
            draw.shuffle(indices)
            for start in range(0, len(indices) - together + 1, together):
                mine = indices[start + self.rank : start + together : self.world]
                batches.append([Place(i, size, f"{self.seed} {epoch} {i}") for i in mine])
        draw.shuffle(batches)
        return batches

    def length(self) -> int:
        return len(self.epoch(0))


def batch_order(files: list[tuple[Location, Size | None]], settings: DataSettings, batch: int, seed: int) -> BatchOrder:
    """Raises `UserError` where not one batch can be filled."""
    if settings.augment.startswith("dualvitok_anyres"):
        limits = settings.min_pixels, settings.max_pixels
        known = [size for _, size in files]
        if None in known:
            found = read_sizes([path for path, _ in files])
            known = [(512, 512) if isinstance(size, Failed) else size for size in found]  # it fails when its turn comes
        sizes = [bucket_size(*size, *limits) for size in known if size]
    else:
        sizes = [(settings.resolution, settings.resolution)] * len(files)
    order = BatchOrder(sizes, batch, seed, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not order.length():
        most = max(sizes.count(size) for size in set(sizes))
        raise UserError(
            f"{len(files)} pictures, {most} of one size at most, fill no batch of {batch * order.world}: "
            "lower --global_batch_size or add pictures"
        )
    return order


def read_sizes(files: Sequence[Location]) -> list[Size | Failed]:
    """From the files' headers, which many threads read; or why one cannot be read."""

    def read(paths: Sequence[Location]) -> list[Size | Failed]:
        sizes: list[Size | Failed] = []
        for path in paths:
            try:
                with open_image(path) as image:
                    sizes.append((image.height, image.width))
            except Failed as error:
                sizes.append(error)
        return sizes

    found: list[Size | Failed] = []
    chunks = [files[start : start + 64] for start in range(0, len(files), 64)]
    rank = int(os.environ.get("RANK", 0))
    with ThreadPoolExecutor(16) as pool, bar("sizes of the pictures", len(files), disable=rank != 0) as progress:
        for sizes in pool.map(read, chunks):
            found += sizes
            progress.update(len(sizes))
    return found


def batches_from(
    data: Photographs, order: BatchOrder, micro_batches: int, workers: int, step: int
) -> Iterator[list[Batch]]:
    """The micro-batches of each next update, endless, from after update `step`."""
    per_epoch = order.length() // micro_batches
    if per_epoch == 0:
        raise UserError(f"{order.length()} batches an epoch are fewer than the {micro_batches} that make an update")
    epoch, done = divmod(step, per_epoch)
    while True:
        places = order.epoch(epoch)[done * micro_batches : per_epoch * micro_batches]
        batches = iter(DataLoader(data, batch_sampler=places, collate_fn=join, num_workers=workers))
        for _ in range(per_epoch - done):
            yield [next(batches) for _ in range(micro_batches)]
        epoch, done = epoch + 1, 0
