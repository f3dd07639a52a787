"""NIfTI headers: read the few fields that matter and believe none of them unchecked.

The free-text fields (`descrip`, `db_name`, `aux_file`, `intent_name`), in which
scanners and archives leave patients' names, are never looked at.

Source:
    NIfTI-1.1 and NIfTI-2 data format definitions (nifti1.h, nifti2.h).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import nibabel.nifti1
import nibabel.nifti2
import nibabel.orientations
import numpy as np

from fedmed.errors import CaseError

HEADER_BYTES = 540
"""Enough for the header of NIfTI-1 (348 bytes) and of NIfTI-2 (540 bytes)."""

MIN_SPACING_MM = 1e-4
MAX_SPACING_MM = 100.0
SPACING_RTOL = 0.01
"""Largest relative difference of `pixdim` and the columns of the affine."""

MIN_UNIT_DETERMINANT = 0.5
"""Smallest |det| of the affine's directions: 1 is orthogonal, 0 is singular.

A gantry tilt of 30 degrees gives 0.87.
"""

_STORED_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_orientations: Any = nibabel.orientations  # its functions carry no types

_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}


@dataclass(frozen=True)
class NiftiHeader:
    """The checked fields of a NIfTI header.

    Attributes:
        shape: (I, J, K) or, with several channels, (I, J, K, C).
        stored: Type of the stored voxels, with their byte order.
        offset_bytes: Where the voxels start.
        slope: Voxel value = slope * stored value + inter; (1, 0) if not scaled.
        affine: 4 x 4, from voxel indices to RAS+ mm.
    """

    shape: tuple[int, ...]
    stored: np.dtype[Any]
    offset_bytes: int
    slope: float
    inter: float
    affine: np.ndarray

    @property
    def num_voxels(self) -> int:
        """Voxels of all channels."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def total_bytes(self) -> int:
        """Size of the uncompressed file that this header describes."""
        return self.offset_bytes + self.num_voxels * self.stored.itemsize


def parse_header(raw: bytes, *, channels: bool) -> NiftiHeader:
    """Check the start of an uncompressed NIfTI file.

    Args:
        raw: The first `HEADER_BYTES` bytes, or the whole file if it is shorter.
        channels: Allow a fourth axis.

    Returns:
        The header; its voxel count is positive but has no upper bound yet.

    Raises:
        CaseError: If a field is impossible, or if the position of the voxels in
            space is unknown or contradictory.
    """
    header = _open(raw)
    shape = _shape(header, channels=channels)
    stored = _stored_type(header)
    slope, inter = _scaling(header)
    offset = float(header["vox_offset"])
    if not (header.sizeof_hdr <= offset <= 2**24 and offset == int(offset)):
        raise CaseError(f"header: vox_offset is {offset:g}, expected 352 or more")
    unit_mm = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7)
    if unit_mm is None:
        raise CaseError("header: the unit of length (xyzt_units) is unknown")
    return NiftiHeader(
        shape=shape,
        stored=stored,
        offset_bytes=int(offset),
        slope=slope,
        inter=inter,
        affine=_affine(header, unit_mm),
    )


def _open(raw: bytes) -> Any:
    """Give nibabel's view of the fields, in the byte order that they have."""
    if not raw:
        raise CaseError("the file is empty", hint="Copy it again from the archive.")
    size = struct.unpack("<i", raw[:4])[0] if len(raw) >= 4 else 0
    swapped = struct.unpack(">i", raw[:4])[0] if len(raw) >= 4 else 0
    kinds: dict[int, Any] = {
        348: nibabel.nifti1.Nifti1Header,
        540: nibabel.nifti2.Nifti2Header,
    }
    known = size if size in kinds else swapped
    if known not in kinds or len(raw) < known:
        raise CaseError("the file is not NIfTI: no header of 348 or 540 bytes")
    header = kinds[known].from_fileobj(
        io.BytesIO(raw[:known]), endianness="<" if size == known else ">", check=False
    )
    magic = bytes(header["magic"])[:3]
    if magic in {b"ni1", b"ni2"}:
        raise CaseError(
            "the file is half of a .hdr/.img pair",
            hint="Convert it to a single .nii.gz file.",
        )
    if magic not in {b"n+1", b"n+2"}:
        raise CaseError("the file is not NIfTI: its magic string is wrong")
    return header


def _shape(header: Any, *, channels: bool) -> tuple[int, ...]:
    dim = [int(n) for n in header["dim"]]
    if not 2 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
        raise CaseError(f"header: impossible dimensions {dim[1 : max(dim[0], 0) + 1]}")
    sizes = dim[1 : dim[0] + 1] + [1] * (7 - dim[0])
    if any(n > 1 for n in sizes[4:]):
        raise CaseError(f"the volume has more than four axes: {_text(sizes)}")
    if sizes[3] > 1 and not channels:
        raise CaseError(
            f"the volume has four axes, {_text(sizes[:4])}; expected three",
            hint="Time series are not supported; ask for channels if the fourth "
            "axis holds image channels.",
        )
    return tuple(sizes[:4]) if channels else tuple(sizes[:3])


def _stored_type(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code not in _STORED_TYPES:
        raise CaseError(
            f"header: voxels of type code {code} are not supported",
            hint="Store integers or floats (no colour, complex or long double).",
        )
    stored: np.dtype[Any] = np.dtype(header.endianness + _STORED_TYPES[code])
    if int(header["bitpix"]) != 8 * stored.itemsize:
        raise CaseError(
            f"header: bitpix is {int(header['bitpix'])}, "
            f"expected {8 * stored.itemsize} for type code {code}"
        )
    return stored


def _scaling(header: Any) -> tuple[float, float]:
    """Give slope and inter; the standard says that a slope of 0 means "not scaled".

    A slope of 0 beside an offset is refused: by the standard the offset is ignored,
    but whoever wrote it meant it, and values 1024 HU off are worse than no values.
    """
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise CaseError(f"header: scl_slope {slope:g} and scl_inter {inter:g}")
    if slope == 0.0:
        if inter != 0.0:
            raise CaseError(f"header: scl_inter is {inter:g} though scl_slope is 0")
        return 1.0, 0.0
    return slope, inter


def _affine(header: Any, unit_mm: float) -> np.ndarray:
    """Give the first of sform and qform that agrees with `pixdim`, in mm.

    An sform onto a template may hold other voxel sizes than the scan; then the qform
    speaks. Two usable forms must name the same axes.
    """
    pixdim = np.asarray(header["pixdim"], np.float64)
    spacing = pixdim[1:4]
    if not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
        raise CaseError(f"header: voxel size (pixdim) {_text(spacing)}")
    if np.any(spacing * unit_mm < MIN_SPACING_MM) or np.any(
        spacing * unit_mm > MAX_SPACING_MM
    ):
        raise CaseError(
            f"header: voxel size {_text(spacing * unit_mm)} mm, expected "
            f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g}"
        )
    forms = _set_forms(header)
    usable = [a for a in forms if _spacing_agrees(a, spacing)]
    if not usable:
        raise CaseError(
            "header: the affine and the voxel size (pixdim) contradict each other"
        )
    if len({_orientations.aff2axcodes(a) for a in usable}) > 1:
        raise CaseError("header: sform and qform name different axes")
    in_mm: np.ndarray = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ usable[0]
    return in_mm


def _set_forms(header: Any) -> list[np.ndarray]:
    forms = []
    if int(header["sform_code"]) > 0:
        forms.append(np.asarray(header.get_sform(), np.float64))
    if int(header["qform_code"]) > 0:
        forms.append(_qform(header))
    if not forms:
        raise CaseError(
            "header: neither sform nor qform is set: left and right are unknown",
            hint="Convert the scan again from DICOM.",
        )
    for affine in forms:
        if not np.all(np.isfinite(affine)):
            raise CaseError("header: the affine holds non-finite numbers")
        if abs(_unit_determinant(affine)) < MIN_UNIT_DETERMINANT:
            raise CaseError("header: the affine is singular or strongly sheared")
    return forms


def _qform(header: Any) -> np.ndarray:
    quaternion = [float(header[f"quatern_{axis}"]) for axis in "bcd"]
    finite = np.all(np.isfinite(quaternion))
    if not finite or float(np.sum(np.square(quaternion))) > 1 + 1e-5:
        raise CaseError("header: the qform's rotation is impossible")
    if float(header["pixdim"][0]) not in {-1.0, 0.0, 1.0}:
        raise CaseError(f"header: qfac is {float(header['pixdim'][0]):g}, not 1 or -1")
    if float(header["pixdim"][0]) == 0.0:
        header["pixdim"][0] = 1.0  # nifti1.h: "should not occur", treat as 1
    return np.asarray(header.get_qform(), np.float64)


def _unit_determinant(affine: np.ndarray) -> float:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.any(lengths == 0):
        return 0.0
    return float(np.linalg.det(affine[:3, :3] / lengths))


def _spacing_agrees(affine: np.ndarray, spacing: np.ndarray) -> bool:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(lengths, spacing, rtol=SPACING_RTOL, atol=0))


def _text(sizes: Any) -> str:
    return " x ".join(f"{n:g}" for n in sizes)
