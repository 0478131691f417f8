"""Compares a sample of stored codes with the same images encoded again, one at a time.

Two machines that round differently may choose differently between two codes that are about equally near. Where a code
differs, `gap` says how near: how much farther away the stored code is than the nearest one, as a share of the median
distance to the codebook. 0 is a tie; a code drawn at random has about 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vision_tokenizer.codebook.inputs import stored_image
from vision_tokenizer.codebook.read import Place
from vision_tokenizer.images.dualvitok import normalize, prepare
from vision_tokenizer.review.issues import Issues
from vistoken.errors import Failed, ItemError
from vistoken.jobs.progress import bar

# largest gap that rounding explains, by the dtype of the run; the comparison is with fp32
MAX_GAP = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
_SPARSE = 1024  # codebook rows that the median distance is estimated from


@dataclass
class Agreement:
    """How many codes of one branch are equal, over the whole sample."""

    codes: int = 0
    gaps: list[float] = field(default_factory=list)  # of the codes that differ

    def __str__(self) -> str:
        if not self.codes:
            return "no code compared"
        different = f"; {len(self.gaps):,} differ, largest gap {max(self.gaps):.2g}" if self.gaps else ""
        return f"{1 - len(self.gaps) / self.codes:.4%} of {self.codes:,} codes equal{different}"


def reencode(tokenizer: Any, places: Sequence[Place], issues: Issues) -> dict[str, Agreement]:
    """Encode the images at `places` again with a `DualViTok` in fp32. Codes beyond the largest gap become issues."""
    agreements = {branch: Agreement() for branch in tokenizer.branches}
    for place in bar("encoding", iterable=places):
        try:
            features = _features(tokenizer, place)
        except ItemError as error:
            issues.add("image changed", f"{place}: it had codes, but now: {error}")
            continue
        limit = MAX_GAP[place.output.settings.torch_dtype]
        for branch, quantizer, feature, stored in zip(
            tokenizer.branches,
            (tokenizer.semantic_quantizer, tokenizer.pixel_quantizer),
            features,
            place.image.grids,
            strict=True,
        ):
            agreements[branch].codes += stored.size
            for (row, column), gap in differences(
                feature, stored, quantizer.encode(feature), quantizer.codebook
            ).items():
                agreements[branch].gaps.append(gap)
                if gap > limit:
                    detail = f"{place}, {branch} row {row} column {column}: {stored[row, column]}, gap {gap:.2g}"
                    issues.add("code is not the nearest", detail)
    return agreements


def _features(tokenizer: Any, place: Place) -> tuple[torch.Tensor, ...]:
    """What each quantizer sees of the image, (h, w, d). Raises `ItemError` for one that is no longer what it was."""
    output, image = place.output, place.image
    path = stored_image(output.dataset, image.name)
    pixels, info = prepare(path, output.choices, output.settings.crop_percent_thresh, output.settings.exif_orientation)
    if info.size != image.size:
        raise Failed("another size", f"{path} is {info.size} (h, w), was {image.size}")
    with torch.no_grad():
        batch = normalize(pixels[None].to(tokenizer.device))
        return tokenizer.semantic_features(batch)[0], tokenizer.pixel_features(batch)[0]


def differences(
    features: torch.Tensor, stored: np.ndarray, fresh: torch.Tensor, codebook: torch.Tensor
) -> dict[tuple[int, int], float]:
    """(row, column) of each stored code that is not the one now chosen -> its gap.

    `features` (h, w, d) are what the codes were chosen for, `stored` and `fresh` (h, w), `codebook` (K, d).
    """
    now = fresh.cpu().numpy()
    rows, columns = np.nonzero(now != stored)
    points = features[rows, columns].float()
    sparse = codebook[:: max(1, len(codebook) // _SPARSE)]
    scale = torch.cdist(points, sparse).median(dim=1).values
    nearest, kept = (
        (points - codebook[torch.from_numpy(codes[rows, columns]).to(points.device)]).norm(dim=1)
        for codes in (now, stored)
    )
    gaps = ((kept - nearest) / scale).tolist()
    return dict(zip(zip(rows.tolist(), columns.tolist(), strict=True), gaps, strict=True))
