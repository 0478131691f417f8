"""What decided an output, written beside it, so that nothing else is ever mixed in."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from vistoken.errors import UserError
from vistoken.jobs.files import write_bytes, write_json
from vistoken.store import Location, Url

MANIFEST = "manifest.json"
_CLAIMS = ".work/settings"  # in a store: the settings of every run that began here


def check_manifest(
    folder: Location, manifest: Mapping[str, Any], *, binding: bool = True, other_devices: bool = False
) -> None:
    """Write `manifest` into `folder`, or compare it with the one there, which counts only if it is `binding`.

    Entries of its `inputs` (file name -> hash) may join later, and with `other_devices` what it says of the `device`
    may differ; any other difference, one that is gone too, raises `UserError` naming the field and both values.
    """
    if isinstance(folder, Url):
        _claim(folder, manifest, other_devices)
    path = folder / MANIFEST
    stored = read_manifest(folder)
    if stored is None or not binding:
        write_json(path, manifest)
        return
    _compare(path, stored, manifest, other_devices)
    joined = {**stored, "inputs": {**stored.get("inputs", {}), **manifest.get("inputs", {})}}
    if joined["inputs"] != stored.get("inputs", {}):
        write_json(path, joined)


def _claim(folder: Url, manifest: Mapping[str, Any], other_devices: bool) -> None:
    """Refuse settings other than those of a run that began here at the same moment.

    Of two that look for a manifest at once neither finds one. So each first puts its settings under a name of their
    own, then lists the names: a store lists what was put before, so the later one, if not both, sees the other's.
    """
    settings = {name: value for name, value in manifest.items() if name not in ("input", "inputs")}
    content = orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)
    ours = folder / _CLAIMS / f"{hashlib.sha256(content).hexdigest()[:16]}.json"
    new = not ours.exists()
    if new:
        write_bytes(ours, content)
    try:
        for other in ours.parent.iterdir():
            if other != ours:
                _compare(other, orjson.loads(other.read_bytes()), settings, other_devices)
    except UserError:
        if new:
            ours.unlink(missing_ok=True)
        raise


def _compare(path: Location, stored: Mapping[str, Any], manifest: Mapping[str, Any], other_devices: bool) -> None:
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


def read_manifest(folder: Location) -> dict[str, Any] | None:
    """The manifest in `folder`, or None. Raises `UserError` if it is not one."""
    path = folder / MANIFEST
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not a manifest ({error}). Restore it, or begin anew with --overwrite.") from error


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1); lists and scalars are compared whole."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value
