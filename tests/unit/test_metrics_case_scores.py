from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import DataError
from fedmed.metrics.case_scores import score_case

NAMES = {0: "background", 1: "liver", 2: "spleen"}
SPACING_MM = (3.0, 4.0, 10.0)
SHAPE = (10, 10, 12)
DIAGONAL_MM = math.sqrt(30**2 + 40**2 + 120**2)  # = 130
DISTANCES = ("assd_mm", "asd_mm_pred2gt", "asd_mm_gt2pred", "hd95_mm")


def block(value=1, start=2, stop=6):
    volume = np.zeros(SHAPE, dtype=np.uint8)
    volume[start:stop, start:stop, start:stop] = value
    return volume


def score(prediction, label, names=None, **options):
    return score_case(
        prediction,
        label,
        spacing_mm=SPACING_MM,
        class_names=names or {1: "liver"},
        **options,
    )


def test_every_foreground_class_has_a_score_in_label_order():
    prediction, label = block() + block(2, 7, 9), block() + block(2, 7, 10)
    liver, spleen = score(prediction, label, dict(reversed(NAMES.items())))
    assert (liver.class_index, liver.class_name, liver.status) == (1, "liver", "ok")
    assert (spleen.class_index, spleen.class_name) == (2, "spleen")
    assert liver.dice == 1
    assert liver.assd_mm == 0
    assert spleen.dice == pytest.approx(2 * 8 / (8 + 27))
    assert spleen.volume_ml_prediction == pytest.approx(8 * 0.12)
    assert spleen.volume_ml_label == pytest.approx(27 * 0.12)


@pytest.mark.parametrize("status", ["missed", "false_alarm"])
def test_one_empty_mask_counts_with_the_diagonal(status):
    pair = (block(0), block()) if status == "missed" else (block(), block(0))
    [result] = score(*pair)
    assert result.status == status
    assert result.dice == 0
    for name in DISTANCES:
        assert getattr(result, name) == pytest.approx(DIAGONAL_MM)


def test_a_class_in_neither_mask_is_absent():
    [result] = score(block(0), block(0))
    assert result.status == "absent"
    assert math.isnan(result.dice)
    assert all(math.isnan(getattr(result, name)) for name in DISTANCES)
    assert result.volume_ml_label == result.volume_ml_prediction == 0


def test_unknown_voxels_count_for_neither_side():
    label = block()
    label[:, :, 6:] = UNKNOWN_LABEL
    prediction = block()
    prediction[:, :, 7:] = 1  # anything goes where nobody annotated
    [result] = score(prediction, label)
    assert result.dice == 1
    assert result.assd_mm == 0
    assert result.volume_ml_prediction == result.volume_ml_label


def test_the_cut_at_unknown_voxels_is_no_surface():
    # Annotated in one slice: its outline is the surface, its inside is not.
    label = np.full(SHAPE, UNKNOWN_LABEL, dtype=np.uint8)
    label[:, :, 4] = block()[:, :, 4]
    wider = block(1, 1, 7)
    [in_volume] = score(wider, label)
    [in_plane] = score_case(
        wider[..., 4:5],
        label[..., 4:5],
        spacing_mm=SPACING_MM,
        class_names={1: "liver"},
    )
    assert in_volume == in_plane
    assert in_volume.asd_mm_gt2pred > 3.0


def test_region_is_another_word_for_known():
    label, prediction = block(), block()
    prediction[:, :, 8:] = 1
    region = np.ones(SHAPE, dtype=np.uint8)
    region[:, :, 7:] = 0
    masked = label.copy()
    masked[region == 0] = UNKNOWN_LABEL
    assert score(prediction, label, region_IJK=region) == score(prediction, masked)
    assert score(prediction, label)[0].dice < 1


def test_a_case_without_annotation_has_only_absent_classes():
    label = np.full(SHAPE, UNKNOWN_LABEL, dtype=np.uint8)
    [result] = score(block(), label)
    assert result.status == "absent"


def test_arguments_are_unchanged():
    label, prediction = block(), block()
    label[0] = UNKNOWN_LABEL
    region = np.ones(SHAPE, dtype=np.uint8)
    before = [array.copy() for array in (prediction, label, region)]
    score(prediction, label, region_IJK=region)
    for array, copy in zip((prediction, label, region), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("prediction", "label", "match"),
    [
        (block()[1:], block(), "shapes"),
        (block()[..., 0], block()[..., 0], "shapes"),
        (block(3), block(), r"prediction holds \[3\]"),
        (block(), block(2), r"label holds \[2\]"),
        (block(UNKNOWN_LABEL), block(), r"prediction holds \[255\]"),
        (block().astype(np.float32), block(), "prediction"),
    ],
)
def test_what_does_not_fit_is_refused(prediction, label, match):
    with pytest.raises(DataError, match=match):
        score(prediction, label)


def test_scores_need_no_torch():
    code = (
        "import sys, fedmed.metrics.case_scores, "
        "fedmed.metrics.largest_component; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
