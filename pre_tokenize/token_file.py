"""Token files: how sequences lie on disk, written and read in one place.

Arrow: `files/{first item}-{end}.arrow`, one IPC file a chunk with the columns `id` int64, `tokens` list<int32>,
`loss_mask` list<bool> and `images` list<string>; the manifest of the run is in the schema's metadata. They are
memory-mapped, so any number of data-loader workers share one copy in the page cache; pyarrow, polars, duckdb and
datasets read them too. Pickle: `files/{id}.pkl`, the published form `{token, label, id, raw_image}`.
"""

import errno
import hashlib
import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

import numpy as np
import orjson
import pyarrow as pa

from pre_tokenize.record import Record
from vistoken.errors import DataError
from vistoken.files import check_regular, read_file
from vistoken.jobs.files import write_bytes
from vistoken.jobs.manifest import read_manifest
from vistoken.store import Location, Url, location, within

SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "tokens": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "images": pa.list_(pa.string()),
    }
)
IGNORE = -100  # the label of what is not learned
MAKE_ANEW = "Run pre_tokenize.py again: it makes token files that are gone anew."
OPEN_SHARDS = 8192  # kept mapped at a time: a mapping needs no open file, and Linux grants a process 65,530
_READ_SHARDS = 64  # of a store, which are in memory


T = TypeVar("T")


class TokenSample(NamedTuple):
    id: int  # index of the item in the input file
    tokens: np.ndarray  # (L,) int32
    loss_mask: np.ndarray  # (L,) bool
    images: tuple[str, ...]  # paths, in the order of the image blocks
    image_sizes: tuple[tuple[int, int], ...] | None = None  # (h, w) of each, where known; they go to the record

    @property
    def labels(self) -> np.ndarray:
        """(L,) int32: the tokens where they are learned, -100 elsewhere."""
        return np.where(self.loss_mask, self.tokens, np.int32(IGNORE))


def exif_orientation_of(manifest: Mapping[str, Any] | None) -> str:
    """How images were turned before they were encoded: "ignore", as published, or "apply"."""
    return str(((manifest or {}).get("settings") or {}).get("exif_orientation", "ignore"))


class TokenFiles(Sequence[TokenSample]):
    """The samples of a record, by position; `lengths` tells how long each is without reading it.

    Args:
        record: a record file, `.json` or `.jsonl`, or one that is loaded already.
        image_dir: where relative image paths begin, if not where they did when the tokens were made.
        checked: for processes that read the same record, so that each file is held against its hash by one of them.
        cache: a local folder for copies of files that lie in a store; each is fetched when it is first needed, and
            mapped from then on. Without it the files last used are held in memory, which suits reading in order.

    Cheap to pickle (data-loader workers): mapped files stay behind and are mapped again on first use. A file that
    is missing, damaged or not of this record raises `DataError` with its path.
    """

    def __init__(
        self,
        record: Record | str | Location,
        image_dir: str | Location | None = None,
        checked: "CheckedFiles | None" = None,
        cache: Path | None = None,
    ):
        self.record = record if isinstance(record, Record) else Record.load(location(record))
        self._image_dir = image_dir
        self._checked = checked
        self._cache = cache
        self._shards: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.record)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int32."""
        return self.record.lengths

    def manifest(self) -> dict[str, Any] | None:
        """What the tokens were made with (tokenizer fingerprint, target size, ...); None for published pickles."""
        if not len(self):
            return None
        path = self.record.file(0)
        if path.suffix != ".arrow":
            return read_manifest(path.parent.parent)
        try:
            return self._shard(0).manifest
        except DataError:
            for index in np.unique(self.record.file_numbers, return_index=True)[1][1:]:
                with suppress(DataError):  # whoever reads its samples will be told
                    return self._shard(int(index)).manifest
            raise

    @overload
    def __getitem__(self, index: int) -> TokenSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenSample]: ...
    def __getitem__(self, index: int | slice) -> TokenSample | list[TokenSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record = self.record
        path, row, folder = self._file(index), int(record.rows[index]), self._image_dir
        if path.suffix == ".arrow":
            shard = self._shard(index)
            sample = shard.sample(row)
            folder = shard.image_dir if folder is None else folder
        else:
            sample = self._read(index, read_pickle)
        if sample.id != record.ids[index] or len(sample.tokens) != record.lengths[index]:
            raise DataError(
                f"{path}, row {row}: holds item {sample.id} of {len(sample.tokens)} tokens, but the record "
                f"{record.path} says item {record.ids[index]} of {record.lengths[index]}. Run concat_record.py again."
            )
        return sample._replace(images=tuple(str(within(location(folder or ""), image)) for image in sample.images))

    def _shard(self, index: int) -> "_Shard":
        """The mapped file of item `index`, from those that are open; the one used longest ago is closed for it."""
        number = int(self.record.file_numbers[index])
        if number not in self._shards:
            self._shards[number] = shard = self._read(index, _Shard)
            if len(self._shards) > (_READ_SHARDS if isinstance(shard.path, Url) else OPEN_SHARDS):
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]

    def _file(self, index: int) -> Location:
        """Where the file of item `index` is to be read."""
        path = self.record.file(index)
        return (
            kept_copy(path, self._cache, self.record.sha256(index)) if self._cache and isinstance(path, Url) else path
        )

    def _read(self, index: int, read: Callable[[Location, str | None], T]) -> T:
        """The file of item `index`, held against its hash, if it has one, unless that was done before."""
        number, sha256 = int(self.record.file_numbers[index]), self.record.sha256(index)
        if self._checked and self._checked.has(number):
            sha256 = None
        found = read(self._file(index), sha256)
        if self._checked and sha256:
            self._checked.add(number)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}


def kept_copy(url: Url, cache: Path, sha256: str | None) -> Path:
    """The copy of a token file in `cache`, which is fetched if it is not there. Its name is that of the content: the
    hash of the record, or what the store knows of the object. Raises `DataError` as for a file on the disk.
    """
    try:
        key = sha256
        if key is None:
            stat = url.stat()
            key = hash_of(f"{url} {stat.st_size} {stat.st_mtime_ns}".encode())
        copy = cache / key[:2] / f"{key}{url.suffix}"
        if not copy.exists():
            content = url.read_bytes()
            check_hash(url, content, sha256)
            write_bytes(copy, content)  # whole or absent, however many processes fetch it at once
    except FileNotFoundError as error:
        raise _damaged(url, error) from error
    except OSError as error:
        raise DataError(f"{url}: cannot read this token file ({error.strerror})") from error
    return copy


class CheckedFiles:
    """Which token files of a record this run has held against their hashes: a file with a byte for each of them.

    All processes on a machine share it. Where two look at once, both check.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def begin(self, files: int) -> None:
        """Forget what an earlier run has checked."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(bytes(files))

    def has(self, number: int) -> bool:
        return os.pread(self._opened(), 1, number) == b"\1"

    def add(self, number: int) -> None:
        os.pwrite(self._opened(), b"\1", number)

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR)
        return self._descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckedFiles, (self.path,)


class _Shard:
    """One Arrow file as numpy views of its buffers: memory-mapped, or of a store in memory.

    Args:
        sha256: what the file's hash begins with, if it is to be checked.
    """

    def __init__(self, path: Location, sha256: str | None = None):
        self.path = path
        try:
            check_regular(path)
            with pa.BufferReader(path.read_bytes()) if isinstance(path, Url) else pa.memory_map(str(path)) as source:
                content = source.read_buffer()
                check_hash(path, content, sha256)
                reader = pa.ipc.open_file(content, options=pa.ipc.IpcReadOptions(use_threads=False))
                schema, batches = reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
            if len(batches) != 1 or not schema.equals(SCHEMA):
                raise ValueError(f"expected one batch of {SCHEMA.names}, found {len(batches)} of {schema.names}")
            batches[0].validate(full=True)  # before any offset is followed: pyarrow ends the process at a wrong one
            if any(column.null_count for column in batches[0].columns):
                raise ValueError("null values in it")
            self.manifest = _manifest((schema.metadata or {}).get(b"manifest", b"{}"))
            self.image_dir: str = self.manifest.get("image_dir", "")
        except (pa.ArrowException, OSError, ValueError, AttributeError, SystemError) as error:
            raise _damaged(path, error) from error
        batch = batches[0]
        self.rows = batch.num_rows
        self.ids = batch["id"].to_numpy()
        self._token_ends, self._tokens = batch["tokens"].offsets.to_numpy(), batch["tokens"].values.to_numpy()
        self._mask_ends, bits = batch["loss_mask"].offsets.to_numpy(), batch["loss_mask"].values.buffers()[1]
        self._mask_bits = np.frombuffer(bits, np.uint8) if bits else np.empty(0, np.uint8)
        self._images = batch["images"]
        if not np.array_equal(self._token_ends, self._mask_ends):
            raise _damaged(path, "the loss mask is not as long as the tokens")

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int32."""
        return np.diff(self._token_ends)

    def images(self, row: int) -> tuple[str, ...]:
        return tuple(self._images[row].as_py())

    def sample(self, row: int) -> TokenSample:
        if not 0 <= row < self.rows:
            raise DataError(f"{self.path}: the record names row {row}, the file has {self.rows}")
        start, end = self._token_ends[row], self._token_ends[row + 1]
        return TokenSample(int(self.ids[row]), self._tokens[start:end].copy(), self._mask(row), self.images(row))

    def _mask(self, row: int) -> np.ndarray:
        start, end = int(self._mask_ends[row]), int(self._mask_ends[row + 1])
        bits = np.unpackbits(self._mask_bits[start // 8 : (end + 7) // 8], bitorder="little")
        return bits[start % 8 : start % 8 + end - start].view(bool)


# the place cannot be read, now or by this user; nothing is said of the file
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def hash_of(content: Any) -> str:
    """What the record says of a token file's bytes: the first 16 digits of their SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def check_hash(path: Location, content: Any, sha256: str | None) -> None:
    """Raises `DataError` where the bytes are not those that were written. None: nothing is known of them."""
    if sha256 is not None and (found := hash_of(content)) != sha256:
        raise DataError(
            f"{path}: not the bytes that were written: their SHA-256 begins with {found}, the record says {sha256}. "
            f"Delete the file. {MAKE_ANEW}"
        )


def _damaged(path: Location, error: Exception | str) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: the record names this token file, but it does not exist. {MAKE_ANEW}")
    if isinstance(error, OSError) and error.errno in _UNREADABLE:
        return DataError(f"{path}: cannot read this token file ({os.strerror(error.errno)})")
    return DataError(f"{path}: not a token file, or a damaged one ({error}). Delete it. {MAKE_ANEW}")


@lru_cache(maxsize=16)
def _manifest(content: bytes) -> dict[str, Any]:
    """Shards of one run share one."""
    return orjson.loads(content)


def read_shard(path: Location) -> list[TokenSample]:
    """All samples of one Arrow token file, image paths as stored."""
    shard = _Shard(path)
    return [shard.sample(row) for row in range(shard.rows)]


class Contents(NamedTuple):
    """What a token file holds, without its tokens."""

    sha256: str  # as in records
    ids: np.ndarray  # (rows,) int64
    lengths: np.ndarray  # (rows,) int32
    images: Callable[[int], tuple[str, ...]]  # of a row, as stored
    manifest: dict[str, Any] | None  # None for a pickle


def contents_of(path: Location, sha256: str | None = None) -> Contents:
    """Read a token file of either form as a whole. Raises `DataError` where it is damaged or not of this hash."""
    try:
        sha256 = sha256 or hash_of(read_file(path))
    except OSError as error:
        raise _damaged(path, error) from error
    if path.suffix == ".arrow":
        shard = _Shard(path, sha256)
        return Contents(sha256, shard.ids, shard.lengths, shard.images, shard.manifest)
    sample = read_pickle(path, sha256)
    lengths = np.array([len(sample.tokens)], np.int32)
    return Contents(sha256, np.array([sample.id]), lengths, lambda row: sample.images, None)


def shard_bytes(samples: Sequence[TokenSample], manifest: Mapping[str, Any]) -> bytes:
    """An Arrow token file. The same samples give the same bytes."""
    lengths = [len(sample.tokens) for sample in samples]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    tokens = np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in samples)], dtype=np.int32)
    mask = np.concatenate([np.empty(0, bool), *(sample.loss_mask for sample in samples)])
    columns = [
        pa.array([sample.id for sample in samples], pa.int64()),
        pa.ListArray.from_arrays(offsets, pa.array(tokens)),
        pa.ListArray.from_arrays(offsets, pa.array(mask)),
        pa.array([list(sample.images) for sample in samples], pa.list_(pa.string())),
    ]
    schema = SCHEMA.with_metadata({"manifest": orjson.dumps(manifest)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue().to_pybytes()


def pickle_bytes(sample: TokenSample) -> bytes:
    """A published token file. One fixed protocol, so that every Python writes the same bytes."""
    content = {
        "token": sample.tokens.tolist(),
        "label": sample.labels.tolist(),
        "id": sample.id,
        "raw_image": list(sample.images),
    }
    return pickle.dumps(content, protocol=4)


class _PlainUnpickler(pickle.Unpickler):
    """Containers, numbers and strings only: nothing that a file could have executed."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for {module}.{name}, and a token file needs no code")


# what the unpickler is known to raise on damaged files
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


def read_pickle(path: Location, sha256: str | None = None) -> TokenSample:
    """A published token file. Raises `DataError` where it is missing, damaged, not of this hash, or would run code."""
    try:
        stored = read_file(path)
        check_hash(path, stored, sha256)
        content = _PlainUnpickler(io.BytesIO(stored)).load()
        tokens, labels = np.array(content["token"], np.int32), np.array(content["label"], np.int32)
        images = content.get("raw_image") or ()
        item = int(content["id"])
    except (OSError, MemoryError, *_DAMAGE) as error:  # MemoryError: a damaged size asks for more than there is
        raise _damaged(path, error) from error
    loss_mask = labels != IGNORE
    if tokens.ndim != 1 or tokens.shape != labels.shape or (tokens[loss_mask] != labels[loss_mask]).any():
        raise DataError(f"{path}: labels must be the tokens themselves or {IGNORE}, one for each token")
    return TokenSample(item, tokens, loss_mask, (images,) if isinstance(images, str) else tuple(images))
