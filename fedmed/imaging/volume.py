"""NIfTI volumes, read whole, checked, and turned to canonical RAS+ axes.

What is refused here and loads without a word elsewhere: a flipped bit in a gzip file,
a header larger than its file, an impossible scaling, a voxel size of zero, an affine
that is missing or singular, voxels that are not finite. A flipped bit in an
uncompressed file that hits a voxel cannot be seen: such files carry no checksum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel.orientations
import numpy as np

from fedmed.errors import CaseError
from fedmed.imaging.nifti_bytes import read_voxels
from fedmed.imaging.nifti_header import NiftiHeader

_orientations: Any = nibabel.orientations  # its functions carry no types

MAX_VOXELS = 2**28
"""Default limit: 512 x 512 x 1024 voxels, 1 GiB as float32."""

MAX_MAGNITUDE = 1e12
"""Default limit of |voxel|: far above any unit in use, far below float32 overflow."""


@dataclass(frozen=True)
class Volume:
    """Voxels with their place in space, or a picture without one.

    Attributes:
        array_CIJK: Voxels; axes I, J, K run to the right, front and top (RAS+). For a
            picture see `fedmed.imaging.pictures`.
        spacing_mm: Voxel size in I, J, K order.
        affine: 4 x 4, from canonical voxel indices to RAS+ mm.
        axis_codes: The axes as stored in the file, e.g. "LAS".
        spacing_known: False if `spacing_mm` and `affine` are only pixel units.
    """

    array_CIJK: np.ndarray
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    axis_codes: str
    spacing_known: bool = True

    @property
    def shape_IJK(self) -> tuple[int, int, int]:
        """Grid size without channels."""
        _, i, j, k = self.array_CIJK.shape
        return i, j, k


def read_volume(
    path: Path,
    *,
    max_voxels: int = MAX_VOXELS,
    max_magnitude: float = MAX_MAGNITUDE,
    channels: bool = False,
    dtype: Any = np.float32,
) -> Volume:
    """Read a `.nii` or `.nii.gz` file in one pass.

    Scaling follows the standard: slope * stored + inter, and a slope of 0 means "not
    scaled". A slope or offset that is not finite is refused, and so is a slope of 0
    beside an offset.

    Args:
        path: The file.
        max_voxels: Larger volumes are refused before their memory is taken.
        max_magnitude: Larger |voxel values| are refused.
        channels: Read the fourth axis as channels; without it four axes are refused.
        dtype: Floating type of the voxels. None keeps the stored type where the file
            has no scaling (label maps).

    Returns:
        The volume in canonical orientation, C = 1 without a channel axis.

    Raises:
        CaseError: If the file is damaged or says something impossible. The message
            names neither the file nor anything from its text fields.
    """
    header, stored = read_voxels(path, max_voxels=max_voxels, channels=channels)
    _check_values(stored, header, max_magnitude)
    turned, affine = _canonical(stored, header.affine)
    turned = _scale(turned, header, dtype)
    array_CIJK = np.moveaxis(turned, 3, 0) if channels else turned[None]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(
        array_CIJK=array_CIJK,
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        affine=affine,
        axis_codes="".join(_orientations.ornt2axcodes(_orientation(header.affine))),
    )


def _check_values(
    stored: np.ndarray, header: NiftiHeader, max_magnitude: float
) -> None:
    """Check the extremes: NaN makes both NaN, infinity is one of them."""
    with np.errstate(invalid="ignore"):
        extremes = np.array([stored.min(), stored.max()], np.float64)
    if not np.all(np.isfinite(extremes)):
        bad = int(np.count_nonzero(~np.isfinite(stored)))
        raise CaseError(f"{bad} of {stored.size} voxels are not finite (NaN or inf)")
    with np.errstate(over="ignore"):
        largest = float(np.max(np.abs(header.slope * extremes + header.inter)))
    if not largest <= max_magnitude:
        raise CaseError(
            f"voxel values up to {largest:.3g}, expected at most {max_magnitude:g}"
            f" (scl_slope is {header.slope:g})"
        )


def _scale(stored: np.ndarray, header: NiftiHeader, dtype: Any) -> np.ndarray:
    is_scaled = (header.slope, header.inter) != (1.0, 0.0)
    if dtype is None:
        dtype = np.float32 if is_scaled else stored.dtype.newbyteorder("=")
    # order="K" keeps the file's order (no slow transposition) but undoes flips.
    array = stored.astype(dtype, order="K")
    if is_scaled:
        array *= array.dtype.type(header.slope)
        array += array.dtype.type(header.inter)
    return array


def _canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip and exchange axes (views only) until they point right, front and up."""
    orientation = _orientation(affine)
    turned = _orientations.apply_orientation(array, orientation)
    inverse = _orientations.inv_ornt_aff(orientation, array.shape[:3])
    return turned, np.asarray(affine @ inverse, np.float64)


def _orientation(affine: np.ndarray) -> np.ndarray:
    """Find which way the axes run; the scans of a site mostly agree."""
    return _orientation_of(np.asarray(affine, np.float64).tobytes())


@functools.lru_cache(maxsize=64)
def _orientation_of(affine_bytes: bytes) -> np.ndarray:
    affine = np.frombuffer(affine_bytes, np.float64).reshape(4, 4)
    orientation: np.ndarray = _orientations.io_orientation(affine)
    orientation.flags.writeable = False
    return orientation
