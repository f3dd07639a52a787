"""Tiny images in real file formats, for the `write_miniature` of dataset modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from fedmed.seeds import numpy_rng

_nibabel: Any = nibabel  # its functions carry no types


def write_nifti_case(
    image_path: Path,
    label_path: Path | None,
    *,
    seed: int,
    axes: str = "RAS",
    label_IJK: np.ndarray | None = None,
    spacing_mm: tuple[float, float, float] = (0.5, 0.5, 3.0),
) -> None:
    """Write a small volume and its label map.

    Args:
        image_path: Where the image goes; folders are made.
        label_path: Where the label map goes; None: nowhere.
        seed: Seed of the noise.
        axes: Axis codes on disk, e.g. "LPS"; the anatomy stays the same.
        label_IJK: uint8 label in RAS order; None: a box of label 1 in 8 x 8 x 4,
            a few voxels missing, so that no two cases are equal.
        spacing_mm: Voxel size in RAS order.
    """
    label = _worn(box_label((8, 8, 4)), seed, image_path.name)
    label = label if label_IJK is None else label_IJK
    noise = numpy_rng(seed, "miniature", image_path.name).normal(0, 8, label.shape)
    values = np.round(100 + 50 * label + noise).clip(0).astype(np.int16)
    _save_nifti(values, image_path, axes=axes, spacing_mm=spacing_mm)
    if label_path is not None:
        _save_nifti(label, label_path, axes=axes, spacing_mm=spacing_mm)


def write_png_case(image_path: Path, label_path: Path | None, *, seed: int) -> None:
    """Write a small grey photograph and its mask, with values 0 and 1.

    Args:
        image_path: Where the image goes; folders are made.
        label_path: Where the mask goes; None: nowhere.
        seed: Seed of the noise.
    """
    label = _worn(box_label((12, 10, 1))[..., 0], seed, image_path.name)
    noise = numpy_rng(seed, "miniature", image_path.name).normal(0, 8, label.shape)
    save_picture((100 + 50 * label + noise).clip(0, 255).astype(np.uint8), image_path)
    if label_path is not None:
        save_picture(label, label_path)


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 rows x columns (x 3) as PNG or JPEG; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)


def box_label(shape: tuple[int, int, int]) -> np.ndarray:
    """Give a uint8 label map with a box of 1 in its middle.

    Example:
        >>> box_label((4, 4, 1))[..., 0].tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(size // 4, max(1, size - size // 4)) for size in shape)] = 1
    return label


def _worn(label: np.ndarray, seed: int, name: str) -> np.ndarray:
    kept = numpy_rng(seed, "worn", name).uniform(size=label.shape) > 0.1
    return (label * kept).astype(np.uint8)


def _save_nifti(
    values: np.ndarray, path: Path, *, axes: str, spacing_mm: tuple[float, ...]
) -> None:
    ras = _nibabel.Nifti1Image(values, np.diag([*spacing_mm, 1.0]))
    turn = _nibabel.orientations.ornt_transform(
        _nibabel.orientations.axcodes2ornt("RAS"),
        _nibabel.orientations.axcodes2ornt(axes),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _nibabel.save(ras.as_reoriented(turn), path)
