"""The output of codebook inference as pictures and distributions."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image

from vision_tokenizer.codebook.inputs import stored_image
from vision_tokenizer.codebook.read import Output, Place, parse_line, read_lines
from vision_tokenizer.images.dualvitok import denormalize, prepare, to_image
from vision_tokenizer.models.protocol import ImageTokenizer
from vision_tokenizer.review.contact_sheet import contact_sheet
from vision_tokenizer.review.html import TEMPLATES, write_page
from vision_tokenizer.review.issues import Reservoir
from vision_tokenizer.review.quality import CodeUse, psnr, ssim
from vistoken.errors import Failed, ItemError
from vistoken.jobs.files import atomic_write
from vistoken.store import Location


@dataclass
class Contents:
    """What the output of some data sets holds, counted."""

    items: int = 0
    images: int = 0
    broken: int = 0  # lines that verify_codebook.py would report
    anchors: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # codes per item
    uses: dict[str, CodeUse] = field(default_factory=dict)  # by branch


class Pair(NamedTuple):
    """An image beside what its codes decode to."""

    title: str
    place: str  # where its codes are
    original: Image.Image | None
    decoded: Image.Image
    psnr: float  # dB; NaN without the original
    ssim: float

    @property
    def quality(self) -> str:
        """Size (height x width) and likeness in words."""
        likeness = f"PSNR {self.psnr:.2f}\N{NO-BREAK SPACE}dB, SSIM {self.ssim:.3f}" if self.original else "no original"
        return f"{self.decoded.height} x {self.decoded.width}, {likeness}"


def read_contents(output: Output, contents: Contents, sample: Reservoir[Place], on_item: Callable[[], object]) -> None:
    """Count all lines of a data set into `contents` and offer their images to `sample`."""
    branches = zip(output.manifest["tokenizer"]["branches"], output.codebook_sizes, strict=True)
    uses = [contents.uses.setdefault(branch, CodeUse(size)) for branch, size in branches]
    for file in output.files():
        for number, line in enumerate(read_lines(file), start=1):
            on_item()
            try:
                _, images = parse_line(line, output)
            except Failed:
                contents.broken += 1
                continue
            contents.items += 1
            contents.images += len(images)
            contents.lengths[sum(grid.size for image in images for grid in image.grids)] += 1
            for index, image in enumerate(images):
                contents.anchors[image.anchor] += 1
                sample.offer(Place(output, file, number, index, image))
                for use, grid in zip(uses, image.grids, strict=True):
                    use.add(grid)


def decode_codes(tokenizer: ImageTokenizer, grids: Sequence) -> torch.Tensor:
    """One image's code grids (h, w) -> uint8 pixels (3, H, W)."""
    return denormalize(tokenizer.decode(tuple(torch.as_tensor(grid, dtype=torch.int64)[None] for grid in grids))[0])


def make_pair(title: str, place: str, original: torch.Tensor | None, decoded: torch.Tensor) -> Pair:
    """Both uint8 (3, H, W)."""
    if original is None:
        return Pair(title, place, None, to_image(decoded), math.nan, math.nan)
    return Pair(title, place, to_image(original), to_image(decoded), psnr(original, decoded), ssim(original, decoded))


def decode_place(tokenizer: ImageTokenizer, place: Place) -> Pair:
    """Decode a stored image and find its original, at the stored anchor though it may fit another one by now."""
    output = place.output
    try:
        path = stored_image(output.dataset, place.image.name)
        original, _ = prepare(path, (place.image.anchor,), 0.0, output.settings.exif_orientation)
    except ItemError:
        original = None
    where = f"{output.dataset.name}, {place.file.name} line {place.line}"
    return make_pair(place.image.name, where, original, decode_codes(tokenizer, place.image.grids))


def write_report(
    folder: Location, outputs: Sequence[Output], contents: Contents, pairs: Sequence[Pair], note: str
) -> None:
    """`report.html` and `contact_sheet.png` in `folder`."""
    first = outputs[0]
    names = ", ".join(output.dataset.name for output in outputs)
    tokenizer, run = first.manifest["tokenizer"], f"{names} · {first.settings.tag}"
    write_page(
        folder / "report.html",
        TEMPLATES / "codes.html",
        title="Codes of images",
        subtitle=f"{run} · {tokenizer['name']} {tokenizer['fingerprint'][:12]} · {first.settings.torch_dtype}",
        note=note,
        warning=f"{contents.broken:,} lines are broken: run verify_codebook.py." if contents.broken else "",
        facts=[
            (f"{contents.items:,}", "items"),
            (f"{contents.images:,}", "images"),
            (f"{sum(use.total for use in contents.uses.values()):,}", "codes"),
            *mean_quality(pairs),
        ],
        contents=contents,
        pairs=pairs,
    )
    write_contact_sheet(folder / "contact_sheet.png", run, pairs)


def write_contact_sheet(path: Location, title: str, pairs: Sequence[Pair]) -> None:
    sheet = contact_sheet(title, [(pair.original, pair.decoded, f"{pair.title}: {pair.quality}") for pair in pairs])
    with atomic_write(path) as file:
        sheet.save(file, "PNG")


def mean_quality(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Mean PSNR and SSIM as (value, label), of the pairs that have an original."""
    known = [pair for pair in pairs if pair.original]
    if not known:
        return []
    mean_psnr, mean_ssim = (sum(values) / len(known) for values in zip(*((p.psnr, p.ssim) for p in known), strict=True))
    return [(f"{mean_psnr:.2f} dB", f"mean PSNR of {len(known)}"), (f"{mean_ssim:.3f}", f"mean SSIM of {len(known)}")]
