"""What a data set is read from, annotation files or shards, and where the images of its items are."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from glob import has_magic

from vision_tokenizer.codebook.annotations import Dataset, image_path
from vision_tokenizer.codebook.shards import Embedded, ShardItem, ShardRules, ShardTable, find_image, shard_table
from vistoken.errors import UserError
from vistoken.jobs.chunks import ChunkTable, Item, chunk_table
from vistoken.jobs.shards import PARQUET, TAR, expand, shard_stem
from vistoken.store import Location, Stat, Url, folder_stats, location

_LISTED = 16  # shards of a folder for which it is listed


def input_files(dataset: Dataset) -> tuple[Location, ...]:
    """The annotation files, or the shards, in name order. Raises `UserError` where there are none.

    Shards that a range names are not looked for here: 100,000 names take no time.
    """
    if dataset.shards is None:
        return tuple(dataset.annotation_files())
    files: list[Location] = []
    for name in expand(dataset.shards):
        files += _matching(name) if has_magic(name) else [location(name)]
    if not files:
        raise UserError(f"data set {dataset.name}: no shard is named {dataset.shards}. Correct it in the data config.")
    files = sorted(dict.fromkeys(files))
    dataset.check_outputs([(shard_stem(path.name), path) for path in files])
    return tuple(files)


def _matching(pattern: str) -> list[Location]:
    """The shards that a glob names."""
    folders = pattern.split("/")
    first = next(number for number, folder in enumerate(folders) if has_magic(folder))
    base = location("/".join(folders[:first]) or ("/" if first else "."))
    return [file for file in base.glob("/".join(folders[first:])) if file.name.lower().endswith((*TAR, *PARQUET))]


def input_stem(dataset: Dataset, path: Location) -> str:
    """The name of the output of an annotation file or shard."""
    return path.stem if dataset.shards is None else shard_stem(path.name)


def input_table(
    dataset: Dataset, path: Location, chunk_items: int, cache: Location, whole: bool = True, known: Stat | None = None
) -> ChunkTable | ShardTable:
    """The chunks of one of `input_files`, cached at `cache` where finding them takes time.

    Without `whole`, images of a shard are read only where they are opened; `known` is of `shard_stats`. Raises
    `UserError` for a file that is missing or cannot be read.
    """
    if dataset.shards is None:
        return chunk_table(path, chunk_items, cache)
    table = shard_table(path, _rules(dataset), whole=whole, known=known)
    if not len(table):
        raise UserError(f"{path}: no rows in it")
    return table


def shard_stats(files: Sequence[Location]) -> dict[Location, Stat]:
    """Of shards in a store what a listing of their folders tells: a request for each of 100,000 takes minutes."""
    of_folder = Counter(path.parent for path in files if isinstance(path, Url))
    listed = {folder: folder_stats(folder) for folder, count in of_folder.items() if count > _LISTED}
    in_store = [path for path in files if isinstance(path, Url)]
    return {path: found for path in in_store if (found := listed.get(path.parent, {}).get(path.name))}


def item_image(dataset: Dataset, item: Item, name: str) -> tuple[Location | str, Location | Embedded]:
    """One of the images of an item that was just read: what tells it from others, and where it is.

    An image of a shard is taken out of the item, so that nobody holds it longer than the caller. Raises `Failed`.
    """
    if isinstance(item, ShardItem):
        return name, item.attached.pop(name)
    path = image_path(dataset.image_dir, name)
    return path, path


def stored_image(dataset: Dataset, name: str) -> Location | Embedded:
    """The image that an output line names. Raises `Failed`."""
    if dataset.shards is None:
        return image_path(dataset.image_dir, name)
    return find_image(_by_stem(dataset), _rules(dataset), name)


@lru_cache(maxsize=8)
def _by_stem(dataset: Dataset) -> dict[str, Location]:
    return {shard_stem(path.name): path for path in input_files(dataset)}


def _rules(dataset: Dataset) -> ShardRules:
    return ShardRules(**dict(dataset.shard_options))
