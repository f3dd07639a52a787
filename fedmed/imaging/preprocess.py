"""From a case as read to the network's grid, and from a prediction back to the scan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from fedmed.case import UNKNOWN_LABEL, Case
from fedmed.errors import CaseError, ConfigError, FedMedError
from fedmed.imaging.intensity import Intensity, fit_normaliser
from fedmed.imaging.resample import resample_labels, resample_linear
from fedmed.imaging.volume import MAX_VOXELS

_Number = TypeVar("_Number", int, float)

SAME_SPACING_RTOL = 1e-3
"""An axis whose voxel size differs by less is not resampled."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every case before a network sees it; equal settings, equal input.

    Attributes:
        spacing_mm: Voxel size of the network's grid, I, J[, K]. None for an axis keeps
            it; with two entries K is kept (in-plane resampling, right for scans with
            thick slices). None: no resampling.
        size: Voxels of the network's grid, I, J[, K]; with two entries K is kept.
            None: as large as it is.
        intensity: See `fedmed.imaging.intensity.fit_normaliser`; measured over the
            whole scan (or its region) on its native grid, channel by channel.
        percentiles: For `intensity="percentile"`.
        window: For `intensity="window"`.
        crop: Where a window of `size` is put. "center": the middle of the scan;
            "region": the middle of its region's bounding box; "fit": the whole I, J
            extent is first shrunk or grown to fit into `size`, aspect kept (pictures
            without a physical scale).
    """

    spacing_mm: tuple[int | float | None, ...] | None = None
    size: tuple[int, ...] | None = None
    intensity: Intensity = "zscore"
    percentiles: tuple[int | float, int | float] = (0.5, 99.5)
    window: tuple[int | float, int | float] | None = None
    crop: Literal["center", "region", "fit"] = "center"

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and (
            len(self.spacing_mm) not in {2, 3}
            or any(s is not None and not 0 < s < np.inf for s in self.spacing_mm)
        ):
            raise ConfigError(
                f"spacing_mm must be two or three numbers > 0, got {self.spacing_mm}"
            )
        if self.size is not None and (
            len(self.size) not in {2, 3} or any(n < 1 for n in self.size)
        ):
            raise ConfigError(f"size must be two or three numbers > 0, got {self.size}")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ConfigError(f"percentiles must rise from 0 to 100, got {low}, {high}")
        if self.intensity == "window" and self.window is None:
            raise ConfigError("intensity: window needs window: (low, high)")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ConfigError(f"window must be (low, high), got {self.window}")
        if self.crop == "fit" and (self.size is None or self.spacing_mm is not None):
            raise ConfigError("crop: fit needs size, and no spacing_mm")


@dataclass(frozen=True)
class Geometry:
    """How the network's grid lies in the scan; what `restore` needs to go back.

    Attributes:
        native_shape: The scan, I, J, K.
        grid_shape: The whole scan at the network's voxel size.
        steps: Network's voxel size / scan's voxel size.
        starts: First voxel of the network's window in `grid_shape`; < 0: padded.
        shape: The network's window.
    """

    native_shape: tuple[int, int, int]
    grid_shape: tuple[int, int, int]
    steps: tuple[float, float, float]
    starts: tuple[int, int, int]
    shape: tuple[int, int, int]

    @property
    def is_identity(self) -> bool:
        """True if the network sees the scan's own grid, whole."""
        return self.native_shape == self.shape == self.grid_shape and not any(
            start or step != 1.0
            for start, step in zip(self.starts, self.steps, strict=True)
        )


@runtime_checkable
class HasGeometry(Protocol):
    """A `Prepared` or a `fedmed.imaging.cache.PreparedCase`."""

    @property
    def geometry(self) -> Geometry | None:
        """None for a table's row."""


class HasLabels(HasGeometry, Protocol):
    """What `cut_fraction` reads of a prepared case."""

    @property
    def label_IJK(self) -> np.ndarray | None:
        """On the network's grid."""

    @property
    def label_native_IJK(self) -> np.ndarray | None:
        """On the scan's grid."""

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Of the network's grid."""

    @property
    def spacing_native_mm(self) -> tuple[float, ...]:
        """Of the scan."""


@dataclass(frozen=True)
class Prepared:
    """A case on the network's grid, with what evaluation on the scan's grid needs.

    Attributes:
        case_id: As in `Case`.
        image_CIJK: float32, normalised; padding holds each channel's minimum. A
            table's row: (F,).
        label_IJK: uint8; padding and what lies outside the region are
            `UNKNOWN_LABEL`. Classification: 0-d int64.
        label_native_IJK: uint8 on the scan's grid; None for classification.
        region_IJK: As in `Case`, on the network's grid, 0 in the padding.
        region_native_IJK: As in `Case`.
        spacing_mm: Voxel size of the network's grid.
        spacing_native_mm: Voxel size of the scan.
        spacing_known: False if both are only pixel units.
        geometry: How both grids lie; None for a table's row.
    """

    case_id: str
    image_CIJK: np.ndarray
    label_IJK: np.ndarray | None
    label_native_IJK: np.ndarray | None
    region_IJK: np.ndarray | None
    region_native_IJK: np.ndarray | None
    spacing_mm: tuple[float, ...]
    spacing_native_mm: tuple[float, ...]
    spacing_known: bool
    geometry: Geometry | None


def prepare(case: Case, preprocessing: Preprocessing) -> Prepared:
    """Bring a case on the network's grid: resample, crop or pad, normalise.

    Images are resampled linearly, labels as one-hot maps (no new labels), both
    anti-aliased. A table's row passes unchanged.

    Args:
        case: As read.
        preprocessing: The settings.

    Returns:
        The prepared case.

    Raises:
        CaseError: If the resampled scan would be absurdly large.
        ConfigError: If mm are asked of a picture without a physical scale.
    """
    if case.image.ndim == 1:
        return _pass(case)
    native = _voxel_size(case.spacing_mm)
    wanted = _wanted_spacing(case, preprocessing)
    steps = _three(
        1.0 if abs(new / old - 1) < SAME_SPACING_RTOL else new / old
        for new, old in zip(wanted, native, strict=True)
    )
    geometry = _geometry(case, preprocessing, steps)
    is_map = case.label is not None and case.label.ndim == 3
    return Prepared(
        case_id=case.case_id,
        image_CIJK=_image(case, preprocessing, geometry),
        label_IJK=_known_label(case, geometry) if is_map else case.label,
        label_native_IJK=case.label if is_map else None,
        region_IJK=_on_grid(case.region, geometry, 0),
        region_native_IJK=case.region,
        spacing_mm=tuple(s * step for s, step in zip(native, steps, strict=True)),
        spacing_native_mm=native,
        spacing_known=case.spacing_known,
        geometry=geometry,
    )


def _known_label(case: Case, geometry: Geometry) -> np.ndarray | None:
    """Label on the network's grid; outside the region nothing is to be learned."""
    label_IJK = _on_grid(case.label, geometry, UNKNOWN_LABEL)
    region_IJK = _on_grid(case.region, geometry, 0)
    if label_IJK is None or region_IJK is None or region_IJK.all():
        return label_IJK
    return np.where(region_IJK == 0, np.uint8(UNKNOWN_LABEL), label_IJK)


def restore(probabilities_LIJK: np.ndarray, prepared: HasGeometry) -> np.ndarray:
    """Bring a prediction back to the scan's own grid.

    The inverse of `prepare`: padding is cut off, what was cropped away counts as
    background (class 0), probabilities are resampled linearly, the largest wins (ties:
    the smaller class).

    Args:
        probabilities_LIJK: Class probabilities on the network's grid.
        prepared: The case they belong to.

    Returns:
        uint8 class numbers on the scan's grid.

    Raises:
        FedMedError: If the prediction is not finite or has the wrong size.
    """
    geometry = prepared.geometry
    if geometry is None or probabilities_LIJK.shape[1:] != geometry.shape:
        raise FedMedError(
            f"a prediction of size {probabilities_LIJK.shape[1:]} does not fit its "
            f"case's grid {geometry.shape if geometry else ()}"
        )
    if not np.all(np.isfinite(probabilities_LIJK)):
        raise FedMedError("the prediction holds numbers that are not finite")
    winner = np.zeros(geometry.native_shape, np.uint8)
    best = _to_native(probabilities_LIJK[0], geometry, 1.0)
    for label in range(1, len(probabilities_LIJK)):
        share = _to_native(probabilities_LIJK[label], geometry, 0.0)
        winner[share > best] = label
        best = np.maximum(best, share)
    return winner


def cut_fraction(case: HasLabels) -> float:
    """Fraction of the labelled organs that lies outside the network's window.

    A centre crop of a scan whose organ is not in its centre trains on half an organ
    and can never find the other half.

    Args:
        case: A prepared case.

    Returns:
        In [0, 1]; 0 without a label, and where nothing is cropped. Resampling alone
        moves it by a few hundredths.
    """
    known = getattr(case, "cut", None)
    if known is not None:  # measured when the case was prepared
        return float(known)
    geometry = case.geometry
    label, native = case.label_IJK, case.label_native_IJK
    if geometry is None or label is None or native is None:
        return 0.0
    cropped = any(
        g > s for g, s in zip(geometry.grid_shape, geometry.shape, strict=True)
    )
    before = _organ_volume(native, case.spacing_native_mm)
    if not cropped or before == 0:
        return 0.0
    return max(0.0, 1 - _organ_volume(label, case.spacing_mm) / before)


def _organ_volume(label_IJK: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    organ = (label_IJK != 0) & (label_IJK != UNKNOWN_LABEL)
    return float(np.count_nonzero(organ) * np.prod(spacing_mm))


def _to_native(channel_IJK: np.ndarray, geometry: Geometry, fill: float) -> np.ndarray:
    back = _three(-start for start in geometry.starts)
    whole = _window(channel_IJK, back, geometry.grid_shape, fill=fill)
    inverse = [1.0 / step for step in geometry.steps]
    return resample_linear(whole, geometry.native_shape, inverse)


def _pass(case: Case) -> Prepared:
    return Prepared(
        case_id=case.case_id,
        image_CIJK=case.image.astype(np.float32),
        label_IJK=case.label,
        label_native_IJK=None,
        region_IJK=None,
        region_native_IJK=None,
        spacing_mm=case.spacing_mm,
        spacing_native_mm=case.spacing_mm,
        spacing_known=case.spacing_known,
        geometry=None,
    )


def _wanted_spacing(case: Case, preprocessing: Preprocessing) -> tuple[float, ...]:
    native = _voxel_size(case.spacing_mm)
    if preprocessing.crop == "fit" and preprocessing.size is not None:
        extents = np.multiply(case.image.shape[1:3], native[:2])
        in_plane = float(np.max(extents / np.array(preprocessing.size[:2])))
        return in_plane, in_plane, native[2]
    if preprocessing.spacing_mm is None:
        return native
    if not case.spacing_known:
        raise ConfigError(
            "preprocessing: spacing_mm is asked, but the pictures have no known scale",
            hint="Use size with crop: fit instead.",
        )
    asked = (*preprocessing.spacing_mm, None)[:3]
    return tuple(
        old if new is None else float(new)
        for new, old in zip(asked, native, strict=True)
    )


def _geometry(
    case: Case, preprocessing: Preprocessing, steps: tuple[float, float, float]
) -> Geometry:
    native_shape = _three(int(n) for n in case.image.shape[1:])
    grid_shape = _three(
        max(1, round(n / step)) for n, step in zip(native_shape, steps, strict=True)
    )
    if np.prod(grid_shape, dtype=np.float64) > MAX_VOXELS:
        raise CaseError(
            f"case {case.case_id}: resampled to {grid_shape} voxels, too many",
            hint="Is spacing_mm in millimetres?",
        )
    size = preprocessing.size or grid_shape
    shape = _three((*size, grid_shape[2])[:3])
    centres = [n / 2 for n in grid_shape]
    if preprocessing.crop == "region" and case.region is not None and case.region.any():
        bounds = [np.flatnonzero(case.region.any(axis=a)) for a in _OTHER_AXES]
        centres = [
            (b[0] + b[-1] + 1) / 2 / step for b, step in zip(bounds, steps, strict=True)
        ]
    starts = _three(
        _start(n, size=wanted, centre=centre)
        for n, wanted, centre in zip(grid_shape, shape, centres, strict=True)
    )
    return Geometry(native_shape, grid_shape, steps, starts, shape)


_OTHER_AXES = ((1, 2), (0, 2), (0, 1))


def _start(num_voxels: int, *, size: int, centre: float) -> int:
    """Start a window of `size` around `centre`, inside the scan where it fits."""
    if size >= num_voxels:
        return -((size - num_voxels) // 2)
    return int(np.clip(np.floor(centre - size / 2), 0, num_voxels - size))


def _image(case: Case, preprocessing: Preprocessing, geometry: Geometry) -> np.ndarray:
    image_CIJK = np.empty((case.image.shape[0], *geometry.shape), np.float32)
    for channel, channel_IJK in enumerate(case.image):
        normalise = fit_normaliser(
            channel_IJK,
            case.region,
            intensity=preprocessing.intensity,
            percentiles=preprocessing.percentiles,
            window=preprocessing.window,
        )
        grid = resample_linear(channel_IJK, geometry.grid_shape, geometry.steps)
        grid = normalise(grid)
        image_CIJK[channel] = _window(
            grid, geometry.starts, geometry.shape, fill=float(grid.min())
        )
    return image_CIJK


def _on_grid(
    labels_IJK: np.ndarray | None, geometry: Geometry, fill: int
) -> np.ndarray | None:
    if labels_IJK is None:
        return None
    grid = resample_labels(labels_IJK, geometry.grid_shape, geometry.steps)
    return _window(grid, geometry.starts, geometry.shape, fill=fill)


def _window(
    array: np.ndarray,
    starts: tuple[int, int, int],
    shape: tuple[int, int, int],
    *,
    fill: int | float,
) -> np.ndarray:
    """Cut a window out of an array; what lies outside the array is `fill`."""
    if array.shape == shape and not any(starts):
        return array
    result = np.full(shape, fill, array.dtype)
    source, target = [], []
    for size, start, wanted in zip(array.shape, starts, shape, strict=True):
        first, last = max(start, 0), min(start + wanted, size)
        source.append(slice(first, max(first, last)))
        target.append(slice(first - start, max(first, last) - start))
    result[tuple(target)] = array[tuple(source)]
    return result


def _voxel_size(spacing_mm: tuple[float, ...]) -> tuple[float, float, float]:
    return _three(float(s) for s in spacing_mm)


def _three(values: Iterable[_Number]) -> tuple[_Number, _Number, _Number]:
    i, j, k = values
    return i, j, k
