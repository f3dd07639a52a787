"""Do image and label lie on each other, and does the label hold what it may hold?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import CaseError, ConfigError
from fedmed.imaging.volume import Volume

DEFAULT_TOLERANCE_MM = 0.1
"""Largest distance of a corner of the image from the same corner of the label."""

_SHOWN_VALUES = 8
_MAX_VALUE_RANGE = 2**16


def check_pair(
    image: Volume, label: Volume, *, tolerance_mm: float = DEFAULT_TOLERANCE_MM
) -> None:
    """Check that two canonical volumes share one grid.

    Args:
        image: The image.
        label: Its label or its region.
        tolerance_mm: Largest displacement of any corner of the grid; not used if one
            of the two has no physical scale.

    Raises:
        CaseError: If shape, voxel size or position differ.
    """
    if image.shape_IJK != label.shape_IJK:
        raise CaseError(
            f"image and label differ in size: {_times(image.shape_IJK)} and "
            f"{_times(label.shape_IJK)} voxels",
            hint="Resample the label onto the image's grid.",
        )
    if not (image.spacing_known and label.spacing_known):
        return
    sizes = np.array(image.shape_IJK)
    spacing_difference = np.abs(np.subtract(image.spacing_mm, label.spacing_mm))
    if float(np.max(spacing_difference * sizes)) > tolerance_mm:
        raise CaseError(
            f"image and label differ in voxel size: {_times(image.spacing_mm)} and "
            f"{_times(label.spacing_mm)} mm",
        )
    apart_mm = _corner_distance_mm(image, label)
    if apart_mm > tolerance_mm:
        raise CaseError(
            f"image and label lie {apart_mm:.3g} mm apart (affines differ), expected "
            f"at most {tolerance_mm:g}",
            hint="Check that the label was drawn on this very scan.",
        )


def check_label(
    label: Volume, *, labels: Mapping[int, str], merge: Mapping[int, int] | None = None
) -> np.ndarray:
    """Check a label map's values and give it as class numbers.

    Args:
        label: Stored values of any type.
        labels: Declared class number -> name; these values may be stored.
        merge: Further stored value -> class number it stands for, e.g. `{2: 1}` for
            "value 2 counts as class 1" or `{255: 1}` for a mask stored as 0 and 255.
            The target `UNKNOWN_LABEL` marks voxels that nobody annotated.

    Returns:
        uint8 (I, J, K), C order.

    Raises:
        CaseError: If there is more than one channel (one-hot), a value is no integer,
            or a value is neither declared nor merged.
        ConfigError: If `labels` or `merge` are impossible.
    """
    targets = _targets(labels, merge or {})
    if label.array_CIJK.shape[0] != 1:
        raise CaseError(
            f"the label has {label.array_CIJK.shape[0]} channels, expected one volume "
            "of class numbers",
            hint="One channel per class (one-hot)? Store the class number instead.",
        )
    stored_IJK = _as_integers(label.array_CIJK[0])
    if stored_IJK.dtype == np.uint8 and _means_itself(stored_IJK, targets):
        return np.array(stored_IJK, order="C")
    lowest, highest = min(targets), max(targets)
    outside = (stored_IJK < lowest) | (stored_IJK > highest)
    if np.any(outside):
        raise _undeclared(np.unique(stored_IJK[outside]).tolist(), targets, labels)
    steps = stored_IJK.astype(np.int32) - lowest
    counts = np.bincount(steps.ravel(order="K"), minlength=highest - lowest + 1)
    seen = [int(v) + lowest for v in np.flatnonzero(counts)]
    if unknown := [v for v in seen if v not in targets]:
        raise _undeclared(unknown, targets, labels)
    table = np.zeros(highest - lowest + 1, np.uint8)
    for value, target in targets.items():
        table[value - lowest] = target
    return np.ascontiguousarray(table[steps])


def _means_itself(stored_IJK: np.ndarray, targets: Mapping[int, int]) -> bool:
    """Tell whether all values are among the declared 0, 1, 2... that mean themselves.

    A quick look that most label maps pass; the others are checked value by value.
    """
    first_other = next(v for v in range(256 + 1) if targets.get(v) != v)
    return bool(stored_IJK.size and stored_IJK.max() < first_other)


def _targets(labels: Mapping[int, str], merge: Mapping[int, int]) -> dict[int, int]:
    if not labels or any(not 0 <= value < UNKNOWN_LABEL for value in labels):
        raise ConfigError(f"labels must be numbers from 0 to 254, got {sorted(labels)}")
    wrong = [t for t in merge.values() if t not in labels and t != UNKNOWN_LABEL]
    if wrong:
        raise ConfigError(
            f"merge leads to {sorted(set(wrong))}, which is not among the declared "
            f"labels {sorted(labels)}"
        )
    targets = {value: value for value in labels} | dict(merge)
    if max(targets) - min(targets) > _MAX_VALUE_RANGE:
        raise ConfigError("merge spans too wide a range of stored values")
    return targets


def _as_integers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iub":
        return array
    rounded: np.ndarray = np.rint(array)
    if not np.array_equal(rounded, array):
        values = np.unique(array[rounded != array])
        raise CaseError(
            f"the label holds values that are no integers: {_listed(values.tolist())}",
            hint="A probability map, or a label resampled with interpolation?",
        )
    if array.size and float(np.max(np.abs(array))) > 2**31 - 1:
        raise CaseError(f"the label holds values up to {float(np.max(array)):.3g}")
    return rounded.astype(np.int64)


def _undeclared(
    values: Iterable[int | float], targets: Mapping[int, int], labels: Mapping[int, str]
) -> CaseError:
    declared = ", ".join(f"{v} {labels[v]}" for v in sorted(labels))
    merged = sorted(set(targets) - set(labels))
    also = f"; also accepted: {_listed(merged)}" if merged else ""
    return CaseError(
        f"the label holds {_listed(values)}, which is not declared (declared: "
        f"{declared}{also})",
        hint="Declare the value, or merge it into a class (`merge`), e.g. {255: 1} "
        "for a mask stored as 0 and 255.",
    )


def _corner_distance_mm(one: Volume, other: Volume) -> float:
    ends = [(-0.5, size - 0.5) for size in one.shape_IJK]
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1)
    points = np.vstack([corners, np.ones(corners.shape[1])])
    apart = ((one.affine - other.affine) @ points)[:3]
    return float(np.max(np.linalg.norm(apart, axis=0)))


def _listed(values: Iterable[int | float]) -> str:
    items = [f"{float(v):g}" for v in values]
    more = (
        f" and {len(items) - _SHOWN_VALUES} more" if len(items) > _SHOWN_VALUES else ""
    )
    return ", ".join(items[:_SHOWN_VALUES]) + more


def _times(sizes: Iterable[int | float]) -> str:
    return " x ".join(f"{n:.4g}" for n in sizes)
