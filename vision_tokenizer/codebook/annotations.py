"""The metadata config and its JSON-lines data sets, read and checked.

    {"name": {"root": "...", "image_dir": "...", "annotation_dir": "...", "tokenizer_inference": true},
     "other": {"root": "...", "shards": ".../{0000..0999}.tar", "tokenizer_inference": true}}

Relative paths are taken against the current folder, as the documents have it, else against the config file's.
"""

import difflib
import json
import os
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from vistoken.cli import note
from vistoken.errors import Failed, UserError
from vistoken.files import is_text, read_file, reading
from vistoken.store import Location, Url, location

_FIELDS = {"root": str, "image_dir": str, "annotation_dir": str, "tokenizer_inference": bool}
_SHARD_FIELDS = {"root": str, "shards": str, "tokenizer_inference": bool}
_SHARD_OPTIONS = {"task": str, "text_field": str, "image_field": str}  # as import_annotations.py takes them
_TASKS = ("generation", "understanding")
_KINDS = {str: "a string", bool: "true or false"}
_NAMED = 5  # of the entries that are left out
OUTPUT_FIELDS = ("image_sizes", "image_embed_inds", "matched_ratios")  # what codebook inference adds to an item


@dataclass(frozen=True)
class Dataset:
    """One entry of the metadata config."""

    name: str
    root: Location
    image_dir: Location  # both of no use where there are shards
    annotation_dir: Location
    tokenizer_inference: bool
    shards: str | None = None  # a name, a range in braces or a glob
    shard_options: tuple[tuple[str, str], ...] = ()

    def annotation_files(self) -> list[Location]:
        """The data set's `.jsonl` and `.json` files in name order.

        Raises `UserError` for a folder that is missing or holds none, and for two files of one output name.
        """
        for field in ("annotation_dir", "image_dir"):
            folder = getattr(self, field)
            if not folder.is_dir():
                raise UserError(
                    f"data set {self.name}: {field} {folder} is not a folder. Correct it in the data config."
                )
        with reading(f"data set {self.name}", self.annotation_dir):
            files = sorted(path for path in self.annotation_dir.iterdir() if _is_annotations(path.name))
        if not files:
            raise UserError(f"data set {self.name}: no .jsonl or .json file in annotation_dir {self.annotation_dir}")
        self.check_outputs([(path.stem, path) for path in files])
        return files

    def check_outputs(self, files: Sequence[tuple[str, Location]]) -> None:
        """Raises `UserError` for two files of one output name, or a name that is not UTF-8."""
        outputs: dict[str, Location] = {}
        for stem, path in files:
            if not is_text(stem):
                raise UserError(f"data set {self.name}: not UTF-8: {path.name!r} in {path.parent}. Rename the file.")
        for stem, path in files:
            for output in (stem, f"{stem}.rejected"):
                other = outputs.setdefault(output, path)
                if other != path:
                    names = [str(each) if other.parent != path.parent else each.name for each in (other, path)]
                    raise UserError(
                        f"data set {self.name}: {' and '.join(names)} in {path.parent} would both "
                        f"be written to {output}.jsonl. Rename one of them."
                    )

    def left_out(self) -> list[str]:
        """What else is in `annotation_dir` and might hold annotations, too: folders, `.jsonl.gz` and their like."""
        if self.shards is not None or isinstance(self.annotation_dir, Url):  # a listing does not tell what is a folder
            return []
        with suppress(OSError), os.scandir(self.annotation_dir) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not _is_annotations(entry.name) and (entry.is_dir() or ".json" in entry.name.lower())
            )
        return []


def _is_annotations(name: str) -> bool:
    return PurePath(name).suffix.lower() in (".jsonl", ".json")


def read_data_config(path: Location, names: Sequence[str] | None = None) -> list[Dataset]:
    """The data sets of a metadata config, or those of `names`.

    Raises `UserError` naming the data set and field that is wrong, or the name that is not in it.
    """
    try:
        config = json.loads(read_file(path).decode("utf-8-sig"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{path}: cannot read the data config ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); save the data config as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: brackets are nested too deeply") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object of data sets, found {_shown(config)}")
    if not config:
        raise UserError(f"{path}: no data set in it")
    datasets = [_dataset(path, name, entry) for name, entry in config.items()]
    for name in names or ():
        if name not in config:
            raise UserError(f"--datasets {name}: not in {path}, which has {', '.join(config)}")
    return [dataset for dataset in datasets if not names or dataset.name in names]


def select_datasets(path: Location, names: Sequence[str] | None) -> list[Dataset]:
    """Those to encode; the ones that need no codes are named and left out."""
    return needing_codes(read_data_config(path, names), path)


def needing_codes(datasets: Sequence[Dataset], path: Location) -> list[Dataset]:
    """Those of the config at `path` that are to be encoded; the others are named. Raises `UserError` for none."""
    chosen = [dataset for dataset in datasets if dataset.tokenizer_inference]
    if skipped := [dataset.name for dataset in datasets if not dataset.tokenizer_inference]:
        note(f"skipped, tokenizer_inference is false: {', '.join(skipped)}")
    if not chosen:
        raise UserError(f"{path}: no data set with tokenizer_inference true is left to encode")
    return chosen


def note_left_out(datasets: Sequence[Dataset]) -> None:
    for dataset in datasets:
        if names := dataset.left_out():
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            note(
                f"data set {dataset.name}: left out of {dataset.annotation_dir}, where only .jsonl and .json files are "
                f"read: {', '.join(names[:_NAMED])}{more}"
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} occurs twice in one object")
    return dict(pairs)


def _dataset(path: Location, name: str, entry: Any) -> Dataset:
    if not _can_be_path(name):
        raise UserError(f"{path}: {_shown(name)} cannot be the name of a data set")
    where = f"{path}: data set {name}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object with {', '.join(_FIELDS)}, found {_shown(entry)}")
    fields = _SHARD_FIELDS if "shards" in entry else _FIELDS
    known = {**fields, **(_SHARD_OPTIONS if "shards" in entry else {})}
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}: {hint}")
    for key, kind in known.items():
        if key not in entry and key in fields:
            raise UserError(f"{where}: the key {key!r} is missing")
        if key in entry and not isinstance(entry[key], kind):
            raise UserError(f"{where}: {key} must be {_KINDS[kind]}, found {_shown(entry[key])}")
        if key in entry and kind is str and not _can_be_path(entry[key]):
            raise UserError(
                f"{where}: {key} cannot be a path, with a NUL or half a surrogate pair: {_shown(entry[key])}"
            )
    if entry.get("task", _TASKS[0]) not in _TASKS:
        raise UserError(f"{where}: task must be {' or '.join(_TASKS)}, found {_shown(entry['task'])}")
    options = tuple((key, entry[key]) for key in _SHARD_OPTIONS if key in entry)
    # a root that is yet to be made stands where the annotations were found
    read = "shards" if "shards" in entry else "annotation_dir"
    found = location(entry[read].partition("{")[0] if read == "shards" else entry[read])
    here = (found.parent if read == "shards" else found).exists()
    base = Path() if here else path.parent
    root, shards = _resolve(entry["root"], path.parent), entry.get("shards")
    if shards is not None and "://" not in shards:
        shards = str(base / shards)
    return Dataset(
        name=name,
        root=root if isinstance(root, Url) or root.exists() else base / entry["root"],
        image_dir=_resolve(entry.get("image_dir", ""), path.parent),
        annotation_dir=_resolve(entry.get("annotation_dir", ""), path.parent),
        tokenizer_inference=entry["tokenizer_inference"],
        shards=shards,
        shard_options=options,
    )


def _can_be_path(text: str) -> bool:
    """No NUL, and no half of a surrogate pair, which JSON can spell but no file system."""
    return "\0" not in text and is_text(text)


def _shown(value: Any) -> str:
    """A value as the config has it, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return f"{text if text.isprintable() else json.dumps(value):.60}"


def _resolve(value: str, config_folder: Location) -> Location:
    here = location(value)
    if isinstance(here, Url) or here.exists() or not (config_folder / value).exists():
        return here
    return config_folder / value


def image_names(item: Any) -> list[str]:
    """The `images` of an annotation, one name or several. Raises `Failed` where there is none to encode."""
    if not isinstance(item, dict):
        raise Failed("not an object", f"expected a JSON object, found {type(item).__name__}")
    if "images" not in item:
        raise Failed("no images", "the field images is missing")
    names = [item["images"]] if isinstance(item["images"], str) else item["images"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Failed("images of wrong type", f"expected a list of file names, found {reprlib.repr(item['images'])}")
    if not names:
        raise Failed("no images", "the field images is an empty list")
    for field in OUTPUT_FIELDS:
        if field in item:
            raise Failed("codes already there", f"the field {field} is what codebook inference writes; rename yours")
    return names


def check_conversations(item: dict[str, Any]) -> None:
    """The document's rules for `conversations`. Raises `Failed` for an item that breaks one.

    Turns of human and gpt, the last one gpt's, with an `<image>` for each of the item's images.
    """
    turns = item.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise Failed("no conversations", f"expected a list of turns, found {reprlib.repr(turns)}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Failed(
                "turn of wrong type",
                f'conversations[{number}]: expected {{"from", "value"}}, found {reprlib.repr(turn)}',
            )
        if turn.get("from") not in ("human", "gpt"):
            raise Failed(
                "unknown speaker", f"conversations[{number}]: from must be human or gpt, is {turn.get('from')!r}"
            )
    if turns[-1]["from"] != "gpt":
        raise Failed("nothing to learn", "the conversation does not end on a turn of gpt")
    names = item.get("images", [])
    symbols, images = sum(turn["value"].count("<image>") for turn in turns), 1 if isinstance(names, str) else len(names)
    if symbols != images:
        raise Failed("<image> does not match", f"{symbols} x <image> in the conversations for {images} images")


def image_path(image_dir: Location, name: str) -> Location:
    """Where `name` lies. Raises `Failed` for one that leaves `image_dir` or cannot be a path."""
    whole = location(name) if name else None
    if isinstance(whole, Url) and whole.is_relative_to(image_dir):
        return whole
    inside = PurePosixPath(os.path.normpath(name)) if name else PurePosixPath("..")
    if (
        inside.is_absolute()
        and isinstance(image_dir, Path)
        and inside.is_relative_to(os.path.normpath(image_dir.absolute()))
    ):
        return Path(inside)
    if inside.is_absolute() or isinstance(whole, Url) or inside.parts[:1] == ("..",) or "\0" in name:
        raise Failed("image outside image_dir", f"images: {name!r} does not lie in {image_dir}")
    return image_dir / inside
