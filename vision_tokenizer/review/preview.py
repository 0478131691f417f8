"""The output of codebook inference as pictures and distributions."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from vision_tokenizer.codebook.annotations import image_path
from vision_tokenizer.codebook.read import Output, Place, parse_line, read_lines
from vision_tokenizer.images.dualvitok import denormalize, prepare, to_image
from vision_tokenizer.models.protocol import ImageTokenizer
from vision_tokenizer.review import html as report
from vision_tokenizer.review.findings import Sample
from vision_tokenizer.review.quality import CodeUse, psnr, ssim
from vistoken.errors import Failed, ItemError
from vistoken.jobs.files import write_bytes

MOST_USED = 8  # codes listed per branch


@dataclass
class Contents:
    """What a data set's output holds, in tallies."""

    items: int = 0
    images: int = 0
    broken: int = 0  # lines that verify_codebook.py has something to say about
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
    def said(self) -> str:
        quality = f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.3f}" if self.original else "original not found"
        return f"{self.decoded.height} x {self.decoded.width}, {quality}"


def read_contents(output: Output, contents: Contents, sample: Sample[Place], on_item: Callable[[], None]) -> None:
    """Tally all lines of a data set into `contents` and offer their images to `sample`."""
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
        original, _ = prepare(image_path(output.dataset.image_dir, place.image.name), (place.image.anchor,), 0.0)
    except ItemError:
        original = None
    where = f"{output.dataset.name}, {place.file.name} line {place.line}"
    return make_pair(place.image.name, where, original, decode_codes(tokenizer, place.image.grids))


def write_report(folder: Path, outputs: Sequence[Output], contents: Contents, pairs: Sequence[Pair], note: str) -> None:
    """`report.html` and `contact_sheet.png` in `folder`."""
    first = outputs[0]
    names = ", ".join(output.dataset.name for output in outputs)
    known = [pair for pair in pairs if pair.original]
    facts = [(f"{contents.items:,}", "items"), (f"{contents.images:,}", "images")]
    facts += [(f"{sum(use.total for use in contents.uses.values()):,}", "codes")]
    facts += quality_facts(known)
    sections = [report.note(note)] if note else []
    sections += [report.tiles(facts)]
    if contents.broken:
        sections += [report.note(f"{contents.broken:,} lines are not as they should be: see verify_codebook.py.")]
    lead = "Drawn from all images. First the original at its anchor, then what its codes decode to."
    sections += [gallery_section(pairs, lead)]
    sections += [resolution_section(contents.anchors)]
    sections += [codebook_section(branch, use) for branch, use in contents.uses.items()]
    sections += [lengths_section(contents.lengths, "codes", "Codes of all images of an item, both branches.")]
    tokenizer = first.manifest["tokenizer"]
    subtitle = f"{names} · {first.settings.tag} · {tokenizer['name']} {tokenizer['fingerprint'][:12]}"
    html = report.page("Codes of images", f"{subtitle} · {first.settings.torch_dtype}", sections)
    write_bytes(folder / "report.html", html.encode())
    write_contact_sheet(folder / "contact_sheet.png", pairs)


def write_contact_sheet(path: Path, pairs: Sequence[Pair]) -> None:
    sheet = report.contact_sheet([(pair.original, pair.decoded, f"{pair.title}: {pair.said}") for pair in pairs])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def quality_facts(known: Sequence[Pair]) -> list[tuple[str, str]]:
    if not known:
        return []
    mean_psnr, mean_ssim = (sum(values) / len(known) for values in zip(*((p.psnr, p.ssim) for p in known), strict=True))
    return [(f"{mean_psnr:.2f} dB", f"mean PSNR of {len(known)}"), (f"{mean_ssim:.3f}", f"mean SSIM of {len(known)}")]


def gallery_section(pairs: Sequence[Pair], lead: str) -> str:
    cards = [report.pair(pair.original, pair.decoded, pair.title, f"{pair.place}: {pair.said}") for pair in pairs]
    return report.section("gallery", "Original and reconstruction", report.gallery(cards), lead=lead)


def resolution_section(sizes: Counter[tuple[int, int]]) -> str:
    rows = [(f"{h} x {w}", n) for (h, w), n in sizes.most_common()]
    icons = [report.shape_icon(h, w) for (h, w), _ in sizes.most_common()]
    lead = "Images at each resolution, height x width."
    return report.section("resolutions", "Resolutions", report.bars(rows, sum(sizes.values()), icons), lead=lead)


def codebook_section(branch: str, use: CodeUse) -> str:
    facts = [(f"{use.distinct:,}", f"distinct codes of {len(use.counts):,}"), (f"{use.perplexity:,.0f}", "perplexity")]
    facts += [(f"{use.dead_share:.1%}", "of the codebook not used here"), (f"{use.total:,}", "codes")]
    most = [(f"code {code}", n) for code, n in use.most_used(MOST_USED)]
    lead = "Perplexity is the number of codes that, used evenly, would carry as much information."
    content = (report.tiles(facts), report.rank_curve(use.counts), "<h3>Most used</h3>", report.bars(most, use.total))
    return report.section(f"codebook-{branch}", f"Codebook use: {branch}", *content, lead=lead)


def lengths_section(lengths: Counter[int], unit: str, lead: str) -> str:
    return report.section("lengths", "Lengths", report.histogram(lengths, unit), lead=lead)
