"""The scores of one segmented case, class by class, empty masks included.

A score must not improve because a model finds nothing. So what a mask without voxels
counts as is decided here, once, and shown in `ClassScore.status`:

| status        | label | prediction | Dice     | surface distances     | in the mean |
|---------------|-------|------------|----------|-----------------------|-------------|
| `ok`          | some  | some       | measured | measured              | yes         |
| `missed`      | some  | none       | 0        | diagonal of the image | yes         |
| `false_alarm` | none  | some       | 0        | diagonal of the image | yes         |
| `absent`      | none  | none       | NaN      | NaN                   | no          |

An `absent` class is not in the case: there was nothing to find and nothing was found.

**Unknown voxels** (label `UNKNOWN_LABEL`, or outside `region_IJK`) count for neither
side: they are background of both masks, in Dice, volumes and distances alike. An edge
that exists only because a mask is cut off there is no surface; the diagonal remains
that of the whole image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import DataError
from fedmed.metrics.masks import bounding_box
from fedmed.metrics.overlap import dice_coefficient
from fedmed.metrics.surface import (
    SurfaceDistances,
    check_spacing,
    distances_in_box,
    image_diagonal_mm,
)

Status = Literal["ok", "missed", "false_alarm", "absent"]

MM3_PER_ML = 1000.0


@dataclass(frozen=True)
class ClassScore:
    """How well one class of one case was segmented.

    Attributes:
        class_index: Label value, 1 or more; the background has no score.
        class_name: Its name in the data set's card.
        dice: A proportion in [0, 1], or NaN if `status` is "absent".
        assd_mm: Average symmetric surface distance; see `fedmed.metrics.surface` for
            the definitions of this and the next three.
        asd_mm_pred2gt: Average distance from the prediction's surface to the label's.
        asd_mm_gt2pred: Average distance from the label's surface to the prediction's.
        hd95_mm: The larger of the two directed 95th percentiles.
        volume_ml_prediction: Volume predicted among the known voxels.
        volume_ml_label: Volume annotated among the known voxels.
        status: What the numbers stand for; see the module.
    """

    class_index: int
    class_name: str
    dice: float
    assd_mm: float
    asd_mm_pred2gt: float
    asd_mm_gt2pred: float
    hd95_mm: float
    volume_ml_prediction: float
    volume_ml_label: float
    status: Status


def score_case(
    prediction_IJK: np.ndarray,
    label_IJK: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    class_names: Mapping[int, str],
    region_IJK: np.ndarray | None = None,
) -> list[ClassScore]:
    """Score every foreground class of one case.

    Args:
        prediction_IJK: Class indices, integer; K = 1 for a 2D image, whose surfaces
            are measured in its plane.
        label_IJK: Class indices, same shape; `UNKNOWN_LABEL` where nobody annotated.
        spacing_mm: Voxel size in I, J, K order, mm. If it is only a pixel unit, so
            are the distances.
        class_names: Label value -> name, the background (0) included or not.
        region_IJK: 1 where the image holds anything; None: everywhere.

    Returns:
        One score per class of `class_names` but the background, in label order.

    Raises:
        DataError: If shapes or spacing do not fit, or a known voxel holds a value
            that is no class.

    Example:
        >>> label = np.zeros((4, 4, 1), dtype=np.uint8)
        >>> label[1:3, 1:3] = 1
        >>> [score] = score_case(
        ...     label * 0, label, spacing_mm=(3.0, 4.0, 1.0), class_names={1: "disc"}
        ... )
        >>> score.status, score.dice, score.assd_mm
        ('missed', 0.0, 20.0)
    """
    _check_shapes(prediction_IJK, label_IJK, region_IJK)
    check_spacing(spacing_mm, label_IJK.ndim)
    known_IJK = _known(label_IJK, region_IJK)
    for name, values_IJK in (("prediction", prediction_IJK), ("label", label_IJK)):
        _check_values(name, values_IJK, known_IJK, class_names)
    cut = _cut_out(prediction_IJK, label_IJK, known_IJK)
    return [
        _score_class(
            cut,
            index,
            class_name=class_names[index],
            spacing_mm=spacing_mm,
            diagonal_mm=image_diagonal_mm(label_IJK.shape, spacing_mm),
        )
        for index in sorted(class_names)
        if index != 0
    ]


@dataclass(frozen=True)
class _Cut:
    """The part of a case that holds every foreground voxel, one voxel around them.

    Attributes:
        prediction_IJK: Class indices, 0 where it is unknown.
        label_IJK: Likewise.
        known_IJK: bool; None: all is known.
    """

    prediction_IJK: np.ndarray
    label_IJK: np.ndarray
    known_IJK: np.ndarray | None


def _known(label_IJK: np.ndarray, region_IJK: np.ndarray | None) -> np.ndarray | None:
    """Mark the known voxels; None if all are."""
    known_IJK: np.ndarray = label_IJK != UNKNOWN_LABEL
    if region_IJK is not None:
        known_IJK &= region_IJK != 0
    return None if known_IJK.all() else known_IJK


def _cut_out(
    prediction_IJK: np.ndarray, label_IJK: np.ndarray, known_IJK: np.ndarray | None
) -> _Cut:
    """Cut the foreground out: the one time that the whole volume is walked."""
    if known_IJK is not None:
        prediction_IJK, label_IJK = prediction_IJK * known_IJK, label_IJK * known_IJK
    occupied = (prediction_IJK != 0) | (label_IJK != 0)
    box = bounding_box(occupied, margin=1) if occupied.any() else (slice(0),) * 3
    return _Cut(
        np.ascontiguousarray(prediction_IJK[box]),
        np.ascontiguousarray(label_IJK[box]),
        None if known_IJK is None else known_IJK[box],
    )


def _score_class(
    cut: _Cut,
    index: int,
    *,
    class_name: str,
    spacing_mm: Sequence[float],
    diagonal_mm: float,
) -> ClassScore:
    """Score one class."""
    prediction_IJK, label_IJK = cut.prediction_IJK == index, cut.label_IJK == index
    num_predicted = int(np.count_nonzero(prediction_IJK))
    num_labelled = int(np.count_nonzero(label_IJK))
    status = _status(num_predicted, num_labelled)
    if status == "ok":
        box = bounding_box(prediction_IJK | label_IJK, margin=1)
        prediction_IJK, label_IJK = prediction_IJK[box], label_IJK[box]
        distances = distances_in_box(
            prediction_IJK,
            label_IJK,
            spacing_mm=spacing_mm,
            known=None if cut.known_IJK is None else cut.known_IJK[box],
        )
    else:
        number = float("nan") if status == "absent" else diagonal_mm
        distances = SurfaceDistances(*[number] * 4)
    voxel_ml = float(np.prod(spacing_mm)) / MM3_PER_ML
    return ClassScore(
        class_index=index,
        class_name=class_name,
        dice=dice_coefficient(prediction_IJK, label_IJK),
        assd_mm=distances.assd_mm,
        asd_mm_pred2gt=distances.asd_mm_pred2gt,
        asd_mm_gt2pred=distances.asd_mm_gt2pred,
        hd95_mm=distances.hd95_mm,
        volume_ml_prediction=num_predicted * voxel_ml,
        volume_ml_label=num_labelled * voxel_ml,
        status=status,
    )


def _status(num_predicted: int, num_labelled: int) -> Status:
    if num_predicted and num_labelled:
        return "ok"
    if num_labelled:
        return "missed"
    return "false_alarm" if num_predicted else "absent"


def _check_shapes(
    prediction_IJK: np.ndarray, label_IJK: np.ndarray, region_IJK: np.ndarray | None
) -> None:
    shapes = {"prediction": prediction_IJK.shape, "label": label_IJK.shape}
    if region_IJK is not None:
        shapes["region"] = region_IJK.shape
    if len(set(shapes.values())) > 1 or label_IJK.ndim != 3:
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(
            f"The arrays of the case have shapes {seen}; one shape (I, J, K) was "
            "expected.",
            hint="Put the prediction back on the voxel grid of the label; K = 1 in 2D.",
        )


def _check_values(
    name: str,
    values_IJK: np.ndarray,
    known_IJK: np.ndarray | None,
    class_names: Mapping[int, str],
) -> None:
    """Refuse a known voxel that holds no class."""
    allowed = sorted({0, *class_names})
    if values_IJK.dtype.kind in "biu":
        if _lie_in_a_full_range(values_IJK, allowed):
            return
        if known_IJK is not None:
            values_IJK = values_IJK[known_IJK]
        if np.isin(values_IJK, allowed).all():
            return
    elif known_IJK is not None:
        values_IJK = values_IJK[known_IJK]
    strange = sorted(set(np.unique(values_IJK).tolist()) - set(allowed))[:5]
    seen = f"holds {strange}" if strange else f"is {values_IJK.dtype}"
    raise DataError(
        f"The {name} {seen}; class indices {allowed} were expected.",
        hint="Give class indices, not probabilities, and name every class in the card.",
    )


def _lie_in_a_full_range(values: np.ndarray, allowed: list[int]) -> bool:
    """Say quickly that all values are among 0, 1, ..., the case nearly always."""
    has_gaps = allowed != [*range(len(allowed))]
    if has_gaps or values.size == 0:
        return False
    return int(values.min()) >= 0 and int(values.max()) <= allowed[-1]
