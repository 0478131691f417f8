"""The one way weights come in: a file, a folder or a hub id becomes named tensors, and a module takes them strictly.

Nothing in a checkpoint is executed: pickles are read with `weights_only=True`. Objects that a training left beside its
tensors (its configuration, its callbacks) become empty stand-ins, whose classes are never imported.
Tensors are memory-mapped where the format allows it, so a tensor that is filtered out is never read from the disk.
"""

import hashlib
import json
import pickle
import re
import socket
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies
from zipfile import BadZipFile, ZipFile, is_zipfile

import safetensors
import torch
from torch import Tensor, nn

from vistoken.cli import note
from vistoken.errors import UserError
from vistoken.files import open_file, reading
from vistoken.store import Location, Url, local_copy, location

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")  # where a folder holds several, these names decide
WRAPPERS = ("model", "state_dict")
_LFS_POINTER = b"version https://git-lfs"
ACCEPTED = f"a {', '.join(PICKLES)} or .safetensors file, a folder that holds one, or a hub id such as org/name"


def read_state_dict(
    source: str | Location, *, use_ema: bool = False, keep: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Named CPU tensors of a checkpoint.

    `source` is a file, a folder (one file, or shards with their index.json), the URL of either, or a hub id. A pickle
    may hold the tensors themselves or nest them under `model` or `state_dict`; those under `ema` are used only if
    `use_ema`.
    With `keep`, only names that start with one of these prefixes are returned. Raises `UserError`, also for none.
    """
    where = location(source)
    if isinstance(where, Url):
        with local_copy(where) as copy:
            return read_state_dict(copy, use_ema=use_ema, keep=keep)
    if not str(source):
        raise UserError(f"the checkpoint's name is empty; a checkpoint is {ACCEPTED}")
    prefixes = ("",) if keep is None else tuple(keep)
    state: dict[str, Tensor] = {}
    for file in _locate(source if isinstance(source, Path) else str(source)):
        with reading(file):
            open_file(file).close()
        read = _read_safetensors if file.suffix == ".safetensors" else _read_pickle
        state.update(read(file, use_ema, prefixes))
    if not state and keep is not None:
        names = _first(list(read_state_dict(source, use_ema=use_ema))) or "nothing"
        raise UserError(f"{source}: no tensor in it begins with {' or '.join(prefixes)}; it holds {names}")
    return state


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str | Location, ignore: Iterable[str] = ()
) -> None:
    """Give `module` (best built on the meta device) the tensors of `state` without copying them.

    Every name and shape must agree, but for names that start with a prefix in `ignore`. Raises `UserError`,
    which lists the first names that do not and blames `source`.
    """
    ignored = tuple(ignore)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(ignored)}
    if strange := [name for name, tensor in state.items() if tensor.layout is not torch.strided or tensor.is_meta]:
        raise UserError(f"{source}: holds sparse tensors, or ones without content: {_first(strange)}")
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    misfit = [
        f"{name} is {_form(state[name])} where the model has {_form(tensor)}"
        for name, tensor in wanted.items()
        if name in state and _form(state[name]) != _form(tensor)
    ]
    problems = [("missing", missing), ("not in the model", unexpected), ("of another form", misfit)]
    if any(names for _, names in problems):
        listing = "".join(f"\n  {len(names)} {kind}: {_first(names)}" for kind, names in problems if names)
        hint = (
            "it is another model's checkpoint" if len(missing) == len(wanted) else "is this the config it belongs to?"
        )
        raise UserError(f"{source} does not fit {type(module).__name__} ({hint}){listing}")
    module.load_state_dict(state, strict=True, assign=True)


def fingerprint(state: Mapping[str, Tensor], sizes: str = "") -> str:
    """Hex digest of every tensor's name, shape, dtype and whole content, in name order, and of the text `sizes`.

    It does not depend on paths, file formats or the machine. SHA-256 reads over 1 GB/s per thread,
    which a sample of each tensor would not beat by enough to be worth missing an edit.
    """
    names = sorted(state)
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the interpreter lock
        digests = pool.map(_digest, (state[name] for name in names))
        lines = [f"{name} {digest}" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("\n".join([*lines, sizes]).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content.data).hexdigest()}"


def _form(tensor: Tensor) -> str:
    """Shape and kind; any floating dtype will do, a quantised integer tensor will not."""
    return f"{tuple(tensor.shape)} {'float' if tensor.is_floating_point() else tensor.dtype}"


def _first(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if len(names) > count else "")


def _locate(source: str | Path) -> list[Path]:
    """The files of a checkpoint. The hub is asked only where no path can be meant."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in (*PICKLES, ".safetensors"):
            raise UserError(f"{path}: a checkpoint is {ACCEPTED}; this suffix is none of these")
        return [path]
    if path.is_dir():
        return _files_of_folder(path)
    if looks_like_hub_id(str(source)):
        return _files_of_folder(_download(str(source)))
    nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
    found = _first(sorted(child.name for child in nearest.iterdir()), 8) or "nothing"
    raise UserError(f"{source}: no such checkpoint; {nearest} holds {found}.\nA checkpoint is {ACCEPTED}.")


def looks_like_hub_id(source: str) -> bool:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) or Path(source).suffix in (*PICKLES, ".safetensors"):
        return False
    return not Path(source).parent.exists()  # checkpoints/name next to a folder checkpoints/ is a mistyped path


def check_on_hub(hub_id: str) -> None:
    """Raises `UserError` at once where the hub cannot be reached and no copy of the repository is here.

    Its own client tries five times, half a minute for a mistyped path.
    """
    import huggingface_hub
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        if not getproxies():  # else nobody but the client knows the way
            socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
        return
    except OSError as error:
        reason = f"{hub.hostname} cannot be reached ({_summary(error)})"
    try:
        huggingface_hub.snapshot_download(hub_id, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id}: no such file or folder here; as a hub id: {reason}. If a path is meant, there is no folder "
            f"{Path(hub_id).parent} in {Path.cwd()}."
        ) from error


def _download(hub_id: str) -> Path:
    import huggingface_hub

    check_on_hub(hub_id)
    for suffixes in ((".safetensors",), PICKLES):  # not both: a repository often ships the same weights twice
        patterns = [pattern for suffix in suffixes for pattern in (f"*{suffix}", f"*{suffix}.index.json")]
        try:
            folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
        except (OSError, ValueError) as error:  # what the hub client raises, offline included, derives from these
            raise UserError(
                f"{hub_id}: no such path here, and not found as a hub id either: {_summary(error)}"
            ) from error
        if any(child.suffix in suffixes for child in folder.iterdir()):
            return folder
    raise UserError(f"{hub_id}: this hub repository holds no weights at its top level; a checkpoint is {ACCEPTED}")


def _files_of_folder(folder: Path) -> list[Path]:
    for name in INDEXES:
        if (folder / name).is_file():
            return _shards(folder / name)
    files = sorted(child for child in folder.iterdir() if child.suffix in (*PICKLES, ".safetensors"))
    chosen = [folder / name for name in SINGLES if folder / name in files][:1] or files
    if len(chosen) == 1:
        return chosen
    if chosen:
        raise UserError(f"{folder}: which of {_first([file.name for file in files], 8)}? Name the file itself")
    found = _first(sorted(child.name for child in folder.iterdir()), 8) or "nothing"
    raise UserError(f"{folder}: no checkpoint in this folder, which holds {found}.\nA checkpoint is {ACCEPTED}.")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: no shard index with a weight_map: {_summary(error)}") from error
    outside = [name for name in names if Path(name).name != name]
    absent = [name for name in names if not (index.parent / name).is_file()]
    if outside or absent:
        raise UserError(f"{index}: shards missing from its folder: {_first(outside or absent)}; fetch them again")
    return [index.parent / name for name in names]


def _read_safetensors(file: Path, use_ema: bool, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    if use_ema:
        raise UserError(f"{file}: EMA weights were asked for, but a .safetensors file holds one set of weights")
    try:
        with safetensors.safe_open(file, framework="pt") as reader:
            names = [name for name in reader.keys() if name.startswith(prefixes)]  # noqa: SIM118 (no mapping)
            return {name: reader.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(file, "safetensors file", _summary(error)) from error


def _check_crc(file: Path) -> None:
    """Raises `UserError` where a record of a zip file is not what was written: torch itself does not look.

    Reads the whole file once, in four threads, and leaves it in the page cache. Records without a checksum (torch can
    be told to write none) pass; safetensors files have none.
    """

    def damaged(part: int) -> str | None:
        with ZipFile(file) as archive:
            for record in archive.infolist()[part::4]:
                if record.CRC:
                    try:
                        with archive.open(record) as content:
                            while content.read(1 << 22):
                                pass
                    except (BadZipFile, ValueError, EOFError, zlib.error):
                        return record.filename
        return None

    try:
        with ThreadPoolExecutor(4) as pool:
            found = next(filter(None, pool.map(damaged, range(4))), None)
    except (BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError, EOFError, zlib.error) as error:
        raise _damaged(file, "PyTorch checkpoint", _summary(error)) from error
    if found:
        raise UserError(f"{file}: damaged: the checksum of {found} in it is not that of its content; fetch it again")


def _read_pickle(file: Path, use_ema: bool, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    zipped = is_zipfile(file)
    if zipped:
        _check_crc(file)
    try:
        payload = _load_tensors(file, zipped)
    except pickle.UnpicklingError as error:
        raise _refused(file, str(error)) from error
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(file, "PyTorch checkpoint", _summary(error)) from error
    tensors = _tensors_of(payload, file, use_ema)
    for name, tensor in tensors.items():  # what only looks like a named tensor with its numbers
        if not isinstance(name, str) or not name.isprintable():  # half of a surrogate pair is not, either
            raise UserError(f"{file}: a tensor's name is {name!r}, which no model has; it is no state dict")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else "on the meta device" if tensor.is_meta else tensor.layout
            raise UserError(f"{file}: {name} is {kind}, and weights are plain dense tensors; save it as one")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


class _StandIn:
    """Takes what a pickle gives to an object of a foreign class, and keeps nothing of it."""

    def __new__(cls, *args: object, **kwargs: object) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object): ...

    def __setstate__(self, state: object) -> None: ...


class _StandInDict(_StandIn):
    """For a class of dicts: torch fills none but Python's own."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return OrderedDict()


def _load_tensors(file: Path, zipped: bool) -> object:
    """A pickle's content, with an inert object for each of a class that is not torch's own."""
    load = partial(torch.load, file, map_location="cpu", weights_only=True, mmap=zipped)
    try:
        return load()
    except pickle.UnpicklingError as error:
        if not zipped or "GLOBAL" not in str(error):
            raise
    foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    kinds = dict.fromkeys(foreign, _StandIn)
    while True:
        stand_ins: list[Any] = []
        for full_name, kind in kinds.items():
            module, _, name = full_name.rpartition(".")
            stand_ins.append(type(name, (kind,), {"__module__": module, "__qualname__": name}))
        try:
            with torch.serialization.safe_globals(stand_ins):  # torch still refuses what is the system's
                payload = load()
        except pickle.UnpicklingError as error:
            filled = re.search(r"SETITEM.*<class '([\w.]+)'>", str(error))
            if filled is None or kinds.get(filled[1]) is not _StandIn:
                raise
            kinds[filled[1]] = _StandInDict
        else:
            note(f"{file}: left out what is no tensor in it: {_first(foreign)}")
            return payload


def _tensors_of(payload: object, file: Path, use_ema: bool) -> dict[str, Tensor]:
    """The state dict of a loaded pickle, whether nested or not."""
    entries: Mapping[Any, Any] = payload if isinstance(payload, dict) else {}
    found = _first(list(map(str, entries))) or type(payload).__name__
    nested = (entries.get(key) for key in (("ema",) if use_ema else WRAPPERS))
    holder = next((value for value in nested if isinstance(value, Mapping)), None)
    if holder is None and use_ema:
        raise UserError(f"{file}: EMA weights were asked for, but it has no `ema`; it holds {found}")
    holder = entries if holder is None else holder
    tensors = {name: value for name, value in holder.items() if isinstance(value, Tensor)}
    if not tensors:
        only_ema = " (its weights are under `ema`: ask for EMA weights)" if "ema" in entries else ""
        raise UserError(f"{file}: no named tensors in it{only_ema}; it holds {found}")
    return tensors


def _refused(file: Path, message: str) -> UserError:
    """Why `weights_only` loading refused a pickle; its own message goes on to recommend the unsafe way."""
    asked_for = re.search(r"GLOBAL ([\w.]+)|(?:function|class) ([^\s,]+)", message)
    if asked_for is None:
        return _damaged(file, "PyTorch checkpoint", "no pickle of tensors")
    return UserError(
        f"{file}: refused: besides tensors it asks for {asked_for[1] or asked_for[2]}, which could run code. Only if "
        "you trust where it comes from: load it in a program of your own, and save its state dict alone for this one"
    )


def _damaged(file: Path, kind: str, why: str) -> UserError:
    with suppress(OSError), file.open("rb") as content:  # what cannot be read at all is damaged, too
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return UserError(f"{file}: a pointer of Git LFS, not the weights themselves: `git lfs pull` fetches them")
    return UserError(f"{file}: damaged or not a {kind}: {why}. Fetch it again")


def _summary(error: BaseException) -> str:
    """The first sentence of a library's message, which says what is wrong; torch goes on to recommend unsafe ways."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.split(r"\.(?:\s|$)", lines[0])[0][:300] if lines else type(error).__name__
