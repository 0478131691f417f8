"""A plan in numbers: what a run will write and how long it will take, as text, as JSON and as a picture."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from typing import Any

import numpy as np
import orjson

from vision_tokenizer.codebook.annotations import OUTPUT_FIELDS
from vision_tokenizer.images.anchors import model_size
from vision_tokenizer.images.files import CROP_ABOVE_THRESHOLD
from vision_tokenizer.models.dualvitok.model import grid_sizes
from vision_tokenizer.review.plan import BINS_PER_OCTAVE, THRESHOLDS, Survey
from vistoken.errors import UserError
from vistoken.jobs.counts import counts_table, table
from vistoken.jobs.files import atomic_write
from vistoken.store import Location

RELEASED_CODEBOOKS = (32768, 98304)
VERDICT_THRESHOLDS = (0.1, 0.2, 0.3)
GOAL, GOAL_PIXELS = 650, 256 * 256  # images/s of a GPU that the decoding should keep up with: an H100 in bf16


@dataclass(frozen=True)
class Estimate:
    """What codebook inference will make of a data set: codes, bytes of output, hours at a given speed."""

    images: int
    tokens: int
    bytes: int
    hours: float | None

    @classmethod
    def of(cls, survey: Survey, codebook_sizes: Sequence[int], images_per_second: float | None) -> "Estimate":
        images = sum(survey.anchors.values())
        item_bytes = len(b", " + orjson.dumps({field: [] for field in OUTPUT_FIELDS}))
        items = survey.counts.done if images else 0
        added = sum(n * image_bytes(anchor, codebook_sizes) for anchor, n in survey.anchors.items())
        return cls(
            images=images,
            tokens=sum(n * h * w for anchor, n in survey.anchors.items() for h, w in grid_sizes(*model_size(*anchor))),
            bytes=survey.source_bytes + added + items * item_bytes,
            hours=images / images_per_second / 3600 if images_per_second else None,
        )


def image_bytes(anchor: tuple[int, int], codebook_sizes: Sequence[int]) -> int:
    """What an image at `anchor` adds to its line: three list elements, with codes drawn evenly from the codebooks."""
    draw = random.Random(0)
    grids = grid_sizes(*model_size(*anchor))
    codes = [
        [[draw.randrange(k) for _ in range(w)] for _ in range(h)]
        for (h, w), k in zip(grids, codebook_sizes, strict=True)
    ]
    return sum(len(orjson.dumps(value)) + 1 for value in (anchor, codes, anchor))


def as_dict(survey: Survey, estimate: Estimate, errors: Sequence[str]) -> dict[str, Any]:
    counts, (repeated, copies) = survey.counts, survey.duplicates()
    return {
        "items": counts.items,
        "done": counts.done,
        "rejected": counts.rejected,
        "failed": counts.failed,
        "reasons": {f"{kind}: {reason}": n for (kind, reason), n in sorted(counts.reasons.items())},
        "errors": list(errors),
        "format_errors": dict(sorted(survey.format_errors.items())),
        "images_referred_to": survey.images,
        "images_named_again": repeated,
        "copies_of_other_files": copies,
        "images_with_exif_orientation": survey.turned,
        "images_to_encode": estimate.images,
        "images_per_anchor": {f"{h}x{w}": n for (h, w), n in survey.anchors.most_common()},
        "items_rejected_at_threshold": {f"{t:g}": survey.thresholds[t] for t in THRESHOLDS},
        "tokens": estimate.tokens,
        "bytes": estimate.bytes,
        "hours": estimate.hours,
    }


def describe(surveys: Mapping[str, Survey], estimates: Mapping[str, Estimate], speed: float | None) -> str:
    """The plan as text: items, output, anchors, thresholds."""
    rows: list[Sequence[object]] = [("data set", "images", "codes", "disk", "time")]
    for name, estimate in ((name, each) for name, each in estimates.items() if each.images):
        rows.append((name, estimate.images, estimate.tokens, _size(estimate.bytes), _duration(estimate.hours)))
    lines = [counts_table({name: survey.counts for name, survey in surveys.items()}), ""]
    if len(rows) > 1:
        lines += [table(rows) + ("" if speed else "\n(time: say --images_per_second)"), ""]
    for name, survey in surveys.items():
        lines += [name, *("  " + line for line in _details(survey)), ""]
    return "\n".join(lines)


def _details(survey: Survey) -> list[str]:
    items, images = survey.counts.items, sum(survey.anchors.values())
    repeated, copies = survey.duplicates()
    lines = [f"{survey.images:,} images; {repeated:,} of them named before, {copies:,} copies of other files"]
    if survey.turned:
        lines.append(f"{survey.turned:,} images have an EXIF orientation: see --exif_orientation")
    if images:
        shares = (f"{h}x{w} {n / images:.1%}" for (h, w), n in survey.anchors.most_common())
        lines.append("images per anchor (height x width): " + ", ".join(shares))
    if survey.thresholds:
        shares = (f"{t:g}: {survey.thresholds[t] / items:.1%}" for t in THRESHOLDS)
        lines.append("items rejected at --crop_percent_thresh " + ", ".join(shares))
    lines += [f"format: {reason}: {n:,} items" for reason, n in sorted(survey.format_errors.items())]
    return lines


def crop_verdict(surveys: Iterable[Survey], threshold: float) -> str:
    """What the crop threshold does to the data, where it rejects anything, and what others would do."""
    surveys = [survey for survey in surveys if survey.thresholds]
    items = sum(survey.counts.items for survey in surveys)
    rejected = sum(survey.counts.reasons["rejected", CROP_ABOVE_THRESHOLD] for survey in surveys)
    if not rejected:
        return ""
    shares = [f"{t:g} {sum(survey.thresholds[t] for survey in surveys) / items:.0%}" for t in VERDICT_THRESHOLDS]
    return (
        f"{rejected:,} of {items:,} items ({rejected / items:.0%}) lose more than {threshold:.0%} of an image to the "
        f"crop and are rejected. By --crop_percent_thresh: {', '.join(shares)}; 0 keeps all."
    )


def decoding(surveys: Iterable[Survey]) -> dict[str, float] | None:
    """How long decoding takes on this machine, and how many of its cores keep a GPU busy; None if nothing was decoded.

    A GPU takes time for an image by its pixels, see `GOAL`.
    """
    total = Survey()
    for survey in surveys:
        total.add(survey)
    if not total.decoded:
        return None
    encoded = sum(n * h * w for (h, w), n in total.anchors.items())
    goal = GOAL * GOAL_PIXELS * total.anchors.total() / encoded if encoded else float(GOAL)
    seconds = total.decoding / total.decoded
    return {
        "images": total.decoded,
        "megapixels": total.decoded_pixels / total.decoded / 1e6,
        "milliseconds": 1e3 * seconds,
        "goal_images_per_second": goal,
        "cores_per_gpu": seconds * goal,
    }


def decoding_line(found: Mapping[str, float]) -> str:
    return (
        f"Decoding an image takes {found['milliseconds']:.1f} ms of a core here (mean of {found['images']}, of "
        f"{found['megapixels']:.2g} megapixels). The goal for an H100 in bf16, {found['goal_images_per_second']:.0f} "
        f"images/s at these sizes, needs {ceil(found['cores_per_gpu'])} such cores a GPU."
    )


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(hours: float | None) -> str:
    if hours is None:
        return "?"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min" if hours * 60 >= 2 else f"{hours * 3600:.0f} s"


def draw_ratios(path: Location, surveys: Sequence[Survey], choices: Sequence[tuple[int, int]]) -> None:
    """The distribution of width / height over the anchors, as a picture. Raises `UserError` without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the picture needs matplotlib. Please install it: pip install 'vistoken[plot]'") from error

    ratios: Counter = sum((survey.ratios for survey in surveys), Counter())
    choices = sorted(choices, key=_octaves)
    tall, wide = (sum(sign * _octaves(anchor) > 0 for anchor in choices) for sign in (-1, 1))
    colors = [*colormaps["Blues"](np.linspace(0.95, 0.4, tall)), *["#4d4d4d"] * (len(choices) - tall - wide)]
    colors += [*colormaps["Oranges"](np.linspace(0.4, 0.9, wide))]
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    below: Counter[int] = Counter()
    for anchor, color in [*zip(choices, colors, strict=True), (None, "#c4c4c4")]:
        bins = {number: n for (number, of), n in ratios.items() if of == anchor}
        if bins:
            label = f"{anchor[0]} x {anchor[1]}" if anchor else "rejected: crop"
            left, bottom = [number / BINS_PER_OCTAVE for number in bins], [below[number] for number in bins]
            label = f"{label}   {sum(bins.values()):,}"
            axes.bar(left, list(bins.values()), 0.88 / BINS_PER_OCTAVE, bottom, color=color, label=label)
            below.update(bins)
    for anchor in choices:
        axes.axvline(_octaves(anchor), color="#00000033", linewidth=0.8, zorder=0)
    octaves = [0, *(number / BINS_PER_OCTAVE for number in below)]
    ticks = range(floor(min(octaves)) - 1, ceil(max(octaves)) + 2)
    axes.set_xticks(ticks, [f"{2**t}:1" if t >= 0 else f"1:{2**-t}" for t in ticks])
    axes.set_xlim(ticks[0], ticks[-1])
    axes.set_xlabel("width : height (lines: the anchors)")
    axes.set_ylabel("images")
    axes.locator_params(axis="y", integer=True)
    axes.set_title("Aspect ratios, and the anchor (height x width) that images are matched to", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.containers:
        axes.legend(
            frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="images per anchor", alignment="left"
        )
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _octaves(anchor: tuple[int, int]) -> float:
    return log2(anchor[1] / anchor[0])
