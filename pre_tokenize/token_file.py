"""Token files: how sequences lie on disk, written and read in one place.

Arrow: `files/{first item}-{end}.arrow`, one IPC file a chunk with the columns `id` int64, `tokens` list<int32>,
`loss_mask` list<bool> and `images` list<string>; the manifest of the run is in the schema's metadata. They are
memory-mapped, so any number of data-loader workers share one copy in the page cache; pyarrow, polars, duckdb and
datasets read them too. Pickle: `files/{id}.pkl`, the published form `{token, label, id, raw_image}`.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from pre_tokenize.record import Record
from vistoken.errors import DataError
from vistoken.jobs.manifest import read_manifest

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


class TokenSample(NamedTuple):
    id: int  # index of the item in the input file
    tokens: np.ndarray  # (L,) int32
    loss_mask: np.ndarray  # (L,) bool
    images: tuple[str, ...]  # paths, in the order of the image blocks

    @property
    def labels(self) -> np.ndarray:
        """(L,) int32: the tokens where they are learned, -100 elsewhere."""
        return np.where(self.loss_mask, self.tokens, np.int32(IGNORE))


class TokenFiles(Sequence[TokenSample]):
    """The samples of a record, by position; `lengths` tells how long each is without reading it.

    Args:
        record: a record file, `.json` or `.jsonl`, or one that is loaded already.
        image_dir: where relative image paths begin, if not where they did when the tokens were made.

    Cheap to pickle (data-loader workers): mapped files stay behind and are mapped again on first use. A file that
    is missing, damaged or not of this record raises `DataError` with its path.
    """

    def __init__(self, record: Record | str | Path, image_dir: str | Path | None = None):
        self.record = record if isinstance(record, Record) else Record.load(Path(record))
        self._image_dir = image_dir
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
        return self._shard(0).manifest if path.suffix == ".arrow" else read_manifest(path.parent.parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record = self.record
        path, row, folder = record.file(index), int(record.rows[index]), self._image_dir
        if path.suffix == ".arrow":
            shard = self._shard(index)
            sample = shard.sample(row)
            folder = shard.image_dir if folder is None else folder
        else:
            sample = read_pickle(path)
        if sample.id != record.ids[index] or len(sample.tokens) != record.lengths[index]:
            raise DataError(
                f"{path}, row {row}: holds item {sample.id} of {len(sample.tokens)} tokens, but the record "
                f"{record.path} says item {record.ids[index]} of {record.lengths[index]}. Run concat_record.py again."
            )
        return sample._replace(images=tuple(str(Path(folder or "", image)) for image in sample.images))

    def _shard(self, index: int) -> "_Shard":
        """The mapped file of item `index`, from those that are open; the one used longest ago is closed for it."""
        number = int(self.record.file_numbers[index])
        if number not in self._shards:
            self._shards[number] = _Shard(self.record.file(index))
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}


class _Shard:
    """One memory-mapped Arrow file, as numpy views of its buffers."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(use_threads=False))
                schema, batches = reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except FileNotFoundError as error:
            raise DataError(f"{path}: the record names this token file, but it does not exist. {MAKE_ANEW}") from error
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        if len(batches) != 1 or not schema.equals(SCHEMA) or any(column.null_count for column in batches[0].columns):
            raise DataError(f"{path}: not a token file: expected one batch of {SCHEMA.names}, found {schema.names}")
        batch = batches[0]
        self.rows = batch.num_rows
        self.manifest = _manifest((schema.metadata or {}).get(b"manifest", b"{}"))
        self.image_dir: str = self.manifest.get("image_dir", "")
        self._ids = batch["id"].to_numpy()
        self._token_ends, self._tokens = batch["tokens"].offsets.to_numpy(), batch["tokens"].values.to_numpy()
        self._mask_ends, bits = batch["loss_mask"].offsets.to_numpy(), batch["loss_mask"].values.buffers()[1]
        self._mask_bits = np.frombuffer(bits, np.uint8) if bits else np.empty(0, np.uint8)
        self._images = batch["images"]

    def sample(self, row: int) -> TokenSample:
        if not 0 <= row < self.rows:
            raise DataError(f"{self.path}: the record names row {row}, the file has {self.rows}")
        start, end = self._token_ends[row], self._token_ends[row + 1]
        images = tuple(self._images[row].as_py())
        return TokenSample(int(self._ids[row]), self._tokens[start:end].copy(), self._mask(row), images)

    def _mask(self, row: int) -> np.ndarray:
        start, end = int(self._mask_ends[row]), int(self._mask_ends[row + 1])
        bits = np.unpackbits(self._mask_bits[start // 8 : (end + 7) // 8], bitorder="little")
        return bits[start % 8 : start % 8 + end - start].view(bool)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a token file, or a damaged one ({error}). Delete it. {MAKE_ANEW}")


@lru_cache(maxsize=16)
def _manifest(content: bytes) -> dict[str, Any]:
    """Shards of one run share one."""
    return orjson.loads(content)


def read_shard(path: Path) -> list[TokenSample]:
    """All samples of one Arrow token file, image paths as stored."""
    shard = _Shard(path)
    return [shard.sample(row) for row in range(shard.rows)]


def shard_manifest(path: Path) -> tuple[dict[str, Any], int]:
    """The manifest in an Arrow token file's metadata, and its number of rows."""
    shard = _Shard(path)
    return shard.manifest, shard.rows


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

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"asks for {module}.{name}, and a token file needs no code")


# what the unpickler is known to raise on damaged files
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


def read_pickle(path: Path) -> TokenSample:
    """A published token file. Raises `DataError` for one that is missing, damaged, or would run code."""
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        tokens, labels = np.array(content["token"], np.int32), np.array(content["label"], np.int32)
        images = content.get("raw_image") or ()
        item = int(content["id"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: the record names this token file, but it does not exist. {MAKE_ANEW}") from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    loss_mask = labels != IGNORE
    if tokens.ndim != 1 or tokens.shape != labels.shape or (tokens[loss_mask] != labels[loss_mask]).any():
        raise DataError(f"{path}: labels must be the tokens themselves or {IGNORE}, one for each token")
    return TokenSample(item, tokens, loss_mask, (images,) if isinstance(images, str) else tuple(images))
