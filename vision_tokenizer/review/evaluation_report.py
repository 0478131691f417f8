"""An evaluation as a table and as a page: the best, the median and the worst pictures beside their reconstructions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision_tokenizer.images.dualvitok import to_image
from vision_tokenizer.models.protocol import ImageTokenizer
from vision_tokenizer.review.evaluate import per_image, picture, reconstruct
from vision_tokenizer.review.html import TEMPLATES, write_page
from vision_tokenizer.review.preview import Pair
from vistoken.errors import ItemError
from vistoken.store import location

SHOWN = 4  # pictures of each group


def table(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Rows of cells: a figure a row, an evaluation a column."""
    names = dict.fromkeys(name for _, found in evaluations for name in found["figures"])
    rows = [["", *(title for title, _ in evaluations)], ["pictures", *(str(e["pictures"]) for _, e in evaluations)]]
    for name in names:
        rows.append([name, *(_shown(found["figures"].get(name)) for _, found in evaluations)])
    for branch in dict.fromkeys(branch for _, found in evaluations for branch in found["codes"]):
        for what in ("codebook", "used", "perplexity"):
            cells = [_shown(found["codes"].get(branch, {}).get(what)) for _, found in evaluations]
            rows.append([f"{branch} codes: {what}", *cells])
    return rows


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def write_report(
    folder: Path,
    evaluations: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: ImageTokenizer,
    side: int,
    batch_size: int,
) -> None:
    """`report.html`; the pictures are reconstructed once more."""
    rows = sorted(per_image(folder), key=lambda row: -row["psnr"])
    middle = max(0, len(rows) // 2 - SHOWN // 2)
    chosen = [("Best", rows[:SHOWN]), ("Median", rows[middle : middle + SHOWN]), ("Worst", rows[-SHOWN:])]
    groups = [
        (title, [shown for row in some if (shown := _pair(row, tokenizer, side, batch_size))]) for title, some in chosen
    ]
    first = evaluations[0][1]
    write_page(
        folder / "report.html",
        TEMPLATES / "evaluation.html",
        title="Reconstructions",
        subtitle=f"{first['tokenizer']['name']} {first['tokenizer']['fingerprint'][:12]} · {side} x {side}",
        note="",
        warning="",
        facts=[(str(first["pictures"]), "pictures"), (f"{first['figures']['psnr']:.2f} dB", "mean PSNR")],
        table=table(evaluations),
        definitions=first["definitions"],
        groups=groups,
    )


def _pair(row: dict[str, Any], tokenizer: ImageTokenizer, side: int, batch_size: int) -> Pair | None:
    try:
        original = picture(location(row["image"]), side)
    except ItemError:  # it went away since it was measured
        return None
    _, others = reconstruct(tokenizer, original[None], batch_size)
    return Pair(
        Path(row["image"]).name, row["image"], to_image(original), to_image(others[0]), row["psnr"], row["ssim"]
    )
