"""One prepared case on disk: a folder of `.npy` files and a `meta.json`.

On the network's grid the slices of axis K lie one after the other, so that drawing a
slice reads one run of bytes. A table's row is small and stands in `meta.json` itself.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.case import UNKNOWN_LABEL, CaseRef
from fedmed.errors import StorageError
from fedmed.imaging.preprocess import Geometry, Prepared, cut_fraction

OPEN_ARRAYS = 2048
"""Arrays that one process keeps mapped; none of them needs a file handle."""

_ARRAYS = (
    "image_CIJK",
    "label_IJK",
    "label_native_IJK",
    "region_IJK",
    "region_native_IJK",
)

_BY_SLICES = ("image_CIJK", "label_IJK", "region_IJK")
"""Arrays from which slices are drawn: K comes first in the file."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """Where an array lies: a file beside `meta.json`.

    Attributes:
        file: Name of the file.
        shape: Of the array as it is used.
        dtype: Of the array.
        offset_bytes: Where the voxels start.
        by_slices: The file holds the last axis first.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int
    by_slices: bool = False

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        itemsize = np.dtype(self.dtype).itemsize
        return self.offset_bytes + math.prod(self.shape) * itemsize


@dataclass(frozen=True, slots=True)
class PreparedCase:
    """A prepared case whose arrays are mapped from disk when they are asked for.

    Cheap to hold and to pickle: it carries no voxels, the arrays are found by path.
    The arrays are read-only. Attributes are those of
    `fedmed.imaging.preprocess.Prepared` and:

    Attributes:
        subject_id: As in `CaseRef`.
        folder: The cache entry; "" for a row that was made, not read.
        content: Hash of the input files' content.
        fingerprint: Hash of the image's voxels as read; equal for equal images, however
            they are stored. "" for a table's row, of which two may well be equal.
        arrays: What lies in the folder.
        class_label: Class number, for classification.
        known_slices: Slices K of `label_IJK` with a voxel that somebody annotated.
            None: no label map.
        cut: See `fedmed.imaging.preprocess.cut_fraction`.
        row: A table's row; None: an image.
    """

    case_id: str
    subject_id: str
    folder: str
    content: str
    fingerprint: str
    arrays: Mapping[str, StoredArray]
    class_label: int | None
    spacing_mm: tuple[float, ...]
    spacing_native_mm: tuple[float, ...]
    spacing_known: bool
    geometry: Geometry | None
    known_slices: tuple[int, ...] | None = None
    cut: float = 0.0
    row: np.ndarray | None = field(default=None, compare=False)

    @property
    def image_CIJK(self) -> np.ndarray:
        """float32 (C, I, J, K); a table's row: (F,)."""
        image = self._array("image_CIJK") if self.row is None else self.row
        assert image is not None  # every entry has one
        return image

    @property
    def label_IJK(self) -> np.ndarray | None:
        """uint8 on the network's grid; classification: 0-d int64; or None."""
        if self.class_label is not None:
            return np.array(self.class_label, np.int64)
        return self._array("label_IJK")

    @property
    def label_native_IJK(self) -> np.ndarray | None:
        """uint8 on the scan's grid, C order, or None."""
        return _in_c_order(self._array("label_native_IJK"))

    @property
    def region_IJK(self) -> np.ndarray | None:
        """uint8 on the network's grid, or None."""
        return self._array("region_IJK")

    @property
    def region_native_IJK(self) -> np.ndarray | None:
        """uint8 on the scan's grid, C order, or None."""
        return _in_c_order(self._array("region_native_IJK"))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of the image, without opening it."""
        if self.row is not None:
            return self.row.shape
        return self.arrays["image_CIJK"].shape

    @property
    def label_shape(self) -> tuple[int, ...] | None:
        """Shape of the label, without opening it; a class has (), None: no label."""
        if self.class_label is not None:
            return ()
        stored = self.arrays.get("label_IJK")
        return None if stored is None else stored.shape

    def _array(self, name: str) -> np.ndarray | None:
        stored = self.arrays.get(name)
        if stored is None:
            return None
        try:
            return _map_array(self.folder, stored)
        except (OSError, ValueError, RuntimeError):
            raise StorageError(
                f"case {self.case_id}: its cache entry is gone or damaged",
                hint="Start again: the entry will be rebuilt from the scan.",
            ) from None


def _in_c_order(array_IJK: np.ndarray | None) -> np.ndarray | None:
    """Copy what shares its file with an array on the network's grid.

    What is done on the scan's grid mixes it with arrays in C order, and NumPy is slow
    at mixtures.
    """
    if array_IJK is None or array_IJK.flags.c_contiguous:
        return array_IJK
    copy = np.ascontiguousarray(array_IJK)
    copy.flags.writeable = False
    return copy


@functools.lru_cache(maxsize=OPEN_ARRAYS)
def _map_array(folder: str, stored: StoredArray) -> np.ndarray:
    # np.memmap holds a file handle as long as the array lives, torch's mapping none.
    import torch

    path = os.path.join(folder, stored.file)
    if os.stat(path).st_size != stored.num_bytes:
        raise ValueError
    file = torch.from_file(path, shared=False, size=stored.num_bytes, dtype=torch.uint8)
    values = file.numpy()[stored.offset_bytes :].view(stored.dtype)
    values.flags.writeable = False
    if not stored.by_slices:
        return values.reshape(stored.shape)
    slices = values.reshape(stored.shape[-1], *stored.shape[:-1])
    return np.moveaxis(slices, 0, -1)


def forget_open_arrays() -> None:
    """Unmap all arrays; needed when a damaged entry was replaced."""
    _map_array.cache_clear()


def held_row(
    prepared: Prepared, ref: CaseRef, *, content: str, folder: str = ""
) -> PreparedCase:
    """Hold a table's row in memory: a file of its own would cost more than the row.

    Args:
        prepared: The row.
        ref: The case it belongs to.
        content: Hash of what it was made from.
        folder: Its cache entry, if there is one.

    Returns:
        The case.
    """
    label = prepared.label_IJK
    row = np.array(prepared.image_CIJK)
    row.flags.writeable = False
    return PreparedCase(
        case_id=ref.case_id,
        subject_id=ref.subject_id,
        folder=folder,
        content=content,
        fingerprint="",
        arrays=_NO_ARRAYS,
        class_label=None if label is None else int(label),
        spacing_mm=prepared.spacing_mm,
        spacing_native_mm=prepared.spacing_native_mm,
        spacing_known=prepared.spacing_known,
        geometry=None,
        row=row,
    )


_NO_ARRAYS: Mapping[str, StoredArray] = {}


def write_entry(folder: Path, prepared: Prepared, *, fingerprint: str) -> None:
    """Write a prepared case into an empty folder, down to the disk.

    Args:
        folder: Exists and is empty.
        prepared: The case.
        fingerprint: See `PreparedCase`.

    Raises:
        OSError: If the disk does not take it; what is there then is unusable.
    """
    label = prepared.label_IJK
    is_row = prepared.image_CIJK.ndim == 1
    arrays = {} if is_row else _write_arrays(folder, prepared)
    meta = {
        "fingerprint": fingerprint,
        "arrays": {name: asdict(stored) for name, stored in arrays.items()},
        "row": prepared.image_CIJK.astype("<f4").tobytes().hex() if is_row else None,
        "class_label": int(label) if label is not None and label.ndim == 0 else None,
        "spacing_mm": prepared.spacing_mm,
        "spacing_native_mm": prepared.spacing_native_mm,
        "spacing_known": prepared.spacing_known,
        "geometry": asdict(prepared.geometry) if prepared.geometry else None,
        "known_slices": known_slices(label),
        "cut": 0.0 if is_row else cut_fraction(prepared),
    }
    with (folder / "meta.json").open("w") as file:
        json.dump(meta, file)
        _flush(file)


def known_slices(label_IJK: np.ndarray | None) -> list[int] | None:
    """List the slices K in which somebody annotated a voxel; None: no label map."""
    if label_IJK is None or label_IJK.ndim != 3:
        return None
    known_K = (label_IJK != UNKNOWN_LABEL).any(axis=(0, 1))
    return [int(k) for k in np.flatnonzero(known_K)]


def _write_arrays(folder: Path, prepared: Prepared) -> dict[str, StoredArray]:
    arrays: dict[str, StoredArray] = {}
    written: dict[int, StoredArray] = {}
    for name in _ARRAYS:
        array = getattr(prepared, name)
        if array is None or array.ndim == 0:
            continue
        # Label and native label are one array where the grids are equal.
        if id(array) not in written:
            written[id(array)] = _write_array(folder, name, array)
        arrays[name] = written[id(array)]
    return arrays


def _write_array(folder: Path, name: str, array: np.ndarray) -> StoredArray:
    by_slices = name in _BY_SLICES and array.ndim > 1
    stored = np.ascontiguousarray(np.moveaxis(array, -1, 0) if by_slices else array)
    with (folder / f"{name}.npy").open("wb") as file:
        np.lib.format.write_array(file, stored, allow_pickle=False)
        offset = file.tell() - stored.nbytes
        _flush(file)
    dtype = stored.dtype.str
    return StoredArray(f"{name}.npy", array.shape, dtype, offset, by_slices)


def _flush(file: Any) -> None:
    """Bring a file to the disk before the rename that makes it count."""
    file.flush()
    os.fsync(file.fileno())


def open_entry(entry: Path, ref: CaseRef, content: str) -> PreparedCase | None:
    """Open an entry without touching its voxels.

    Args:
        entry: The folder.
        ref: The case it belongs to.
        content: Hash of the input files' content.

    Returns:
        None if there is no entry or a file is missing or has the wrong size.
    """
    folder = str(entry)
    try:
        with open(f"{folder}/meta.json", "rb") as file:
            meta = json.loads(file.read())
        arrays = {name: _stored(fields) for name, fields in meta["arrays"].items()}
        row = meta["row"]
        if ("image_CIJK" not in arrays and row is None) or not all(
            os.stat(f"{folder}/{stored.file}").st_size == stored.num_bytes
            for stored in set(arrays.values())
        ):
            return None
        known = meta["known_slices"]
        return PreparedCase(
            case_id=ref.case_id,
            subject_id=ref.subject_id,
            folder=folder,
            content=content,
            fingerprint=str(meta["fingerprint"]),
            arrays=arrays,
            class_label=meta["class_label"],
            spacing_mm=tuple(map(float, meta["spacing_mm"])),
            spacing_native_mm=tuple(map(float, meta["spacing_native_mm"])),
            spacing_known=bool(meta["spacing_known"]),
            geometry=_geometry(meta["geometry"]),
            known_slices=None if known is None else tuple(map(int, known)),
            cut=float(meta["cut"]),
            row=None if row is None else np.frombuffer(bytes.fromhex(row), "<f4"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stored(fields: dict[str, Any]) -> StoredArray:
    return _one_stored(
        os.path.basename(fields["file"]),
        tuple(map(int, fields["shape"])),
        str(np.dtype(fields["dtype"]).str),
        int(fields["offset_bytes"]),
        bool(fields["by_slices"]),
    )


@functools.lru_cache(maxsize=256)
def _one_stored(
    file: str, shape: tuple[int, ...], dtype: str, offset_bytes: int, by_slices: bool
) -> StoredArray:
    """Share equal descriptions: a thousand sites hold thousands of them."""
    return StoredArray(file, shape, dtype, offset_bytes, by_slices)


def _geometry(fields: dict[str, Any] | None) -> Geometry | None:
    if not fields:
        return None
    return _one_geometry(tuple((name, tuple(v)) for name, v in fields.items()))


@functools.lru_cache(maxsize=256)
def _one_geometry(fields: tuple[tuple[str, tuple[Any, ...]], ...]) -> Geometry:
    return Geometry(**dict(fields))
