"""Anchors, matching and crops, at ordinary and at extreme sizes."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from vision_tokenizer.images.anchors import (
    FIXED_ANCHORS,
    MAX_AREA,
    MIN_AREA,
    SIDE,
    anchors,
    crop_share,
    job_tag,
    match_anchor,
    model_size,
    place,
)
from vision_tokenizer.images.dualvitok import fit, prepare
from vistoken.errors import Failed, Rejected

sides = st.integers(1, 100_000)
choices = st.sampled_from([FIXED_ANCHORS, anchors("fixed", 256), anchors("fixed", 512), anchors("fixed", 300)])


@given(sides, sides, choices)
@example(784, 784, FIXED_ANCHORS)
@example(98, 98, FIXED_ANCHORS)
def test_the_resized_image_covers_its_anchor(height, width, choices):
    anchor, resized, offset, share = place(height, width, choices)
    assert anchor in choices
    for side, cut, start in zip(resized, anchor, offset, strict=True):
        assert 0 <= start <= side - cut - start + 1  # the crop lies inside, in the middle
        assert side >= cut
    assert min(resized[0] - anchor[0], resized[1] - anchor[1]) == 0  # and no larger than it must be
    assert 0 <= share < 1


@given(sides, sides)
def test_the_matched_anchor_has_the_nearest_ratio(height, width):
    h, w = match_anchor(height, width, FIXED_ANCHORS)
    assert abs(w / h - width / height) == min(abs(b / a - width / height) for a, b in FIXED_ANCHORS)


@pytest.mark.parametrize("anchor", FIXED_ANCHORS)
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_an_image_of_an_anchors_shape_is_matched_to_it_and_loses_nothing(anchor, scale):
    placement = place(anchor[0] * scale, anchor[1] * scale, FIXED_ANCHORS)
    assert placement.anchor == anchor
    assert placement.crop_share == 0


def test_half_way_between_two_ratios_the_nearer_size_wins():
    # 1.0 and 0.75 are both 0.125 away from 0.875
    assert match_anchor(1600, 1400, FIXED_ANCHORS) == (512, 512)
    assert match_anchor(400, 350, FIXED_ANCHORS) == (512, 384)


@pytest.mark.parametrize(
    ("size", "anchor", "share"),
    [((256, 512), (256, 256), 0.5), ((512, 512), (256, 256), 0.0), ((100, 200), (384, 768), 0.0)],
)
def test_the_crop_share_of_plain_cases(size, anchor, share):
    assert crop_share(*size, anchor) == pytest.approx(share)


@given(sides, sides)
def test_the_model_takes_multiples_of_16_within_its_area(height, width):
    h, w = model_size(height, width)
    assert h % SIDE == w % SIDE == 0
    assert min(h, w) >= SIDE
    if max(height, width) < 32 * min(height, width):
        assert MIN_AREA <= h * w <= MAX_AREA


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 512), (512, 512)), ((300, 300), (304, 304)), ((360, 360), (352, 352)), ((2000, 2000), (1024, 1024))],
)
def test_free_sizes(size, expected):
    assert model_size(*size) == expected


def test_where_truncation_falls_short_there_is_no_black_column(tmp_path):
    """98 / (512 / 98) truncates to 511 columns; the published code leaves the last one black."""
    path = tmp_path / "white.png"
    Image.new("RGB", (98, 98), "white").save(path)
    assert int(512 / 98 * 98) == 511
    pixels, info = prepare(path, FIXED_ANCHORS, 0.2)
    assert pixels.shape == (3, 512, 512)
    assert pixels.min() == 255
    assert (info.size, info.anchor) == ((98, 98), (512, 512))


def test_the_crop_is_the_centre():
    image = Image.fromarray(np.arange(8, dtype=np.uint8).repeat(64 * 16 * 3).reshape(8, 64 * 16, 3)[:, :512].copy())
    cut = fit(image, place(image.height, image.width, anchors("fixed", 8)))
    assert np.array_equal(np.array(cut), np.array(image)[:, 252:260])


def test_the_threshold_rejects_and_zero_does_not(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (200, 100)).save(path)
    with pytest.raises(Rejected, match=r"200 x 100 loses 0\.500 at \(256, 256\)"):
        prepare(path, anchors("fixed", 256), 0.2)
    for threshold in (0.5, 0.0):
        assert prepare(path, anchors("fixed", 256), threshold)[0].shape == (3, 256, 256)


def test_a_resize_that_would_not_fit_memory_is_refused(tmp_path):
    path = tmp_path / "line.png"
    Image.new("RGB", (30_000, 1)).save(path)
    with pytest.raises(Failed, match="image too narrow"):
        prepare(path, anchors("fixed", 256), 0.0)


def test_job_tags():
    assert [job_tag("fixed", 256), job_tag("fixed", 512), job_tag("fixed_anchors", 512)] == [
        *("fixed_256", "fixed_512", "fixed_anchors")
    ]
