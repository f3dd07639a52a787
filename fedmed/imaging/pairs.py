"""One case from an image file, a label file and, if there is one, a region file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from fedmed.case import Case
from fedmed.errors import CaseError
from fedmed.imaging.geometry import DEFAULT_TOLERANCE_MM, check_label, check_pair
from fedmed.imaging.pictures import MAX_PIXELS, read_label_picture, read_picture
from fedmed.imaging.volume import MAX_VOXELS, Volume, read_volume

VOLUME_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_image_label(
    case_id: str,
    image_path: Path,
    label_path: Path | None,
    *,
    labels: Mapping[int, str],
    merge: Mapping[int, int] | None = None,
    region_path: Path | None = None,
    channels: bool = False,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    max_voxels: int = MAX_VOXELS,
    root: Path | None = None,
    post: Callable[[Case], Case] | None = None,
) -> Case:
    """Read and check one case.

    Args:
        case_id: Name of the case inside the site; stands in every error message.
        image_path: `.nii`, `.nii.gz`, `.png`, `.jpg` or `.jpeg`.
        label_path: Class numbers on the image's grid, or None.
        labels: Declared class number -> name.
        merge: Stored value -> class number; see
            `fedmed.imaging.geometry.check_label`.
        region_path: A mask of where the image holds anything: 0 is outside, any other
            value inside.
        channels: Read a fourth axis of the image as channels.
        tolerance_mm: How far image and label may lie apart.
        max_voxels: Larger images are refused.
        root: If given, files that lead out of this folder (symbolic links, "..") are
            refused.
        post: What the dataset does last to the finished case, e.g. mark slices that
            nobody annotated as unknown. May raise `CaseError`.

    Returns:
        The case, image float32 (C, I, J, K), label uint8 (I, J, K).

    Raises:
        CaseError: If the case cannot be used; the message names `case_id` and which
            of the files is meant, never a path.
        ConfigError: If `labels` and `merge` do not fit each other.
    """
    if root is not None:
        _check_inside(case_id, root, (image_path, label_path, region_path))
    image = _read(case_id, "image", image_path, channels, max_voxels)
    label_IJK = region_IJK = None
    if label_path is not None:
        label = _read(case_id, "label", label_path, True, max_voxels)
        with _Naming(case_id, "label"):
            label_IJK = check_label(label, labels=labels, merge=merge)
            check_pair(image, label, tolerance_mm=tolerance_mm)
    if region_path is not None:
        region = _read(case_id, "region", region_path, True, max_voxels)
        with _Naming(case_id, "region"):
            check_pair(image, region, tolerance_mm=tolerance_mm)
            region_IJK = _region(region)
    case = Case(
        case_id=case_id,
        image=image.array_CIJK,
        label=label_IJK,
        spacing_mm=image.spacing_mm,
        spacing_known=image.spacing_known,
        region=region_IJK,
    )
    if post is None:
        return case
    with _Naming(case_id, "annotation"):
        return post(case)


class _Naming:
    """Says in a `CaseError` which case and which of its files is meant."""

    def __init__(self, case_id: str, role: str) -> None:
        self._prefix = f"case {case_id}, {role}: "

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        if isinstance(error, CaseError):
            if error.message.startswith(self._prefix):
                return
            raise CaseError(self._prefix + error.message, hint=error.hint) from None


def _check_inside(case_id: str, root: Path, paths: Iterable[Path | None]) -> None:
    inside = root.resolve()
    for path in paths:
        if path is not None and not path.resolve().is_relative_to(inside):
            raise CaseError(
                f"case {case_id}: a file leads out of the data folder",
                hint="Replace the symbolic link by the file, or move the data folder.",
            )


def _read(
    case_id: str, role: str, path: Path, channels: bool, max_voxels: int
) -> Volume:
    name = path.name.lower()
    with _Naming(case_id, role):
        if name.endswith(VOLUME_SUFFIXES):
            dtype = np.float32 if role == "image" else None
            return read_volume(
                path, max_voxels=max_voxels, channels=channels, dtype=dtype
            )
        if name.endswith(PICTURE_SUFFIXES):
            read = read_picture if role == "image" else read_label_picture
            return read(path, max_pixels=min(max_voxels, MAX_PIXELS))
        raise CaseError(
            "the kind of file is not known, expected "
            + ", ".join((*VOLUME_SUFFIXES, *PICTURE_SUFFIXES))
        )


def _region(region: Volume) -> np.ndarray:
    if region.array_CIJK.shape[0] != 1:
        raise CaseError("the region has several channels, expected one")
    inside_IJK = np.ascontiguousarray(region.array_CIJK[0] != 0).astype(np.uint8)
    if not inside_IJK.any():
        raise CaseError("the region is empty")
    return inside_IJK
