"""What decided an output, written beside it, so that nothing else is ever mixed in."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from vistoken.errors import UserError
from vistoken.jobs.files import write_bytes

MANIFEST = "manifest.json"


def check_manifest(
    folder: Path, manifest: Mapping[str, Any], *, binding: bool = True, other_devices: bool = False
) -> None:
    """Write `manifest` into `folder`, or compare it with the one there, which counts only if it is `binding`.

    Entries of its `inputs` (file name -> hash) may join later, and with `other_devices` what it says of the `device`
    may differ; any other difference, one that is gone too, raises `UserError` naming the field and both values.
    """
    path = folder / MANIFEST
    stored = read_manifest(folder)
    if stored is None or not binding:
        write_bytes(path, _dump(manifest))
        return
    before, now = dict(_flat(stored)), dict(_flat(manifest))
    for field in sorted(before.keys() | now.keys()):
        if field.startswith("inputs.") and field not in before:
            continue
        if before.get(field) == now.get(field):
            continue
        difference = f"{path}: this output was begun with {field} = {before.get(field)!r}, now it is {now.get(field)!r}"
        if not field.startswith("device."):
            raise UserError(
                f"{difference}. Run with the former value to go on, or with --overwrite to begin anew, or choose "
                "another folder."
            )
        if not other_devices:
            raise UserError(
                f"{difference}: results may differ in the last bit. Run on the former kind of device, allow the "
                "difference with --allow_other_devices, or begin anew with --overwrite."
            )
    joined = {**stored, "inputs": {**stored.get("inputs", {}), **manifest.get("inputs", {})}}
    if joined["inputs"] != stored.get("inputs", {}):
        write_bytes(path, _dump(joined))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None. Raises `UserError` if it is not one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not a manifest ({error}). Restore it, or begin anew with --overwrite.") from error


def _dump(manifest: Mapping[str, Any]) -> bytes:
    return orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1); lists and scalars are compared whole."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value
