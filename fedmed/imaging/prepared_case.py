"""One prepared case on disk: a folder of `.npy` files and a `meta.json`."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.case import CaseRef
from fedmed.errors import StorageError
from fedmed.imaging.preprocess import Geometry, Prepared

OPEN_ARRAYS = 128
"""Arrays that one process keeps mapped (each needs a file handle)."""

_ARRAYS = (
    "image_CIJK",
    "label_IJK",
    "label_native_IJK",
    "region_IJK",
    "region_native_IJK",
)


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies: a file beside `meta.json`."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int


@dataclass(frozen=True)
class PreparedCase:
    """A prepared case whose arrays are mapped from disk when they are asked for.

    Cheap to hold and to pickle: it carries no voxels, the arrays are found by path.
    The arrays are read-only. Attributes are those of
    `fedmed.imaging.preprocess.Prepared` and:

    Attributes:
        subject_id: As in `CaseRef`.
        folder: The cache entry.
        content: Hash of the input files' content.
        fingerprint: Hash of the image's voxels as read; equal for equal images, however
            they are stored. "" for a table's row, of which two may well be equal.
        arrays: What lies in the folder.
        class_label: Class number, for classification.
    """

    case_id: str
    subject_id: str
    folder: str
    content: str
    fingerprint: str
    arrays: dict[str, StoredArray]
    class_label: int | None
    spacing_mm: tuple[float, ...]
    spacing_native_mm: tuple[float, ...]
    spacing_known: bool
    geometry: Geometry | None

    @property
    def image_CIJK(self) -> np.ndarray:
        """float32 (C, I, J, K); a table's row: (F,)."""
        image = self._array("image_CIJK")
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
        """uint8 on the scan's grid, or None."""
        return self._array("label_native_IJK")

    @property
    def region_IJK(self) -> np.ndarray | None:
        """uint8 on the network's grid, or None."""
        return self._array("region_IJK")

    @property
    def region_native_IJK(self) -> np.ndarray | None:
        """uint8 on the scan's grid, or None."""
        return self._array("region_native_IJK")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of the image, without opening it."""
        return self.arrays["image_CIJK"].shape

    def _array(self, name: str) -> np.ndarray | None:
        stored = self.arrays.get(name)
        if stored is None:
            return None
        try:
            return _map_array(self.folder, stored)
        except (OSError, ValueError):
            raise StorageError(
                f"case {self.case_id}: its cache entry is gone or damaged",
                hint="Start again: the entry will be rebuilt from the scan.",
            ) from None


@functools.lru_cache(maxsize=OPEN_ARRAYS)
def _map_array(folder: str, stored: StoredArray) -> np.ndarray:
    mapped = np.memmap(
        os.path.join(folder, stored.file),
        dtype=stored.dtype,
        mode="r",
        offset=stored.offset_bytes,
        shape=stored.shape,
    )
    return mapped.view(np.ndarray)


def forget_open_arrays() -> None:
    """Unmap all arrays; needed when a damaged entry was replaced."""
    _map_array.cache_clear()


def write_entry(folder: Path, prepared: Prepared, *, fingerprint: str) -> None:
    """Write a prepared case into an empty folder, down to the disk.

    Args:
        folder: Exists and is empty.
        prepared: The case.
        fingerprint: See `PreparedCase`.

    Raises:
        OSError: If the disk does not take it; what is there then is unusable.
    """
    arrays: dict[str, StoredArray] = {}
    written: dict[int, StoredArray] = {}
    for name in _ARRAYS:
        array = getattr(prepared, name)
        if array is None or array.ndim == 0:
            continue
        # Label and native label are one array where the grids are equal.
        if id(array) not in written:
            written[id(array)] = _write_array(folder, f"{name}.npy", array)
        arrays[name] = written[id(array)]
    label = prepared.label_IJK
    meta = {
        "fingerprint": fingerprint,
        "arrays": {name: asdict(stored) for name, stored in arrays.items()},
        "class_label": int(label) if label is not None and label.ndim == 0 else None,
        "spacing_mm": prepared.spacing_mm,
        "spacing_native_mm": prepared.spacing_native_mm,
        "spacing_known": prepared.spacing_known,
        "geometry": asdict(prepared.geometry) if prepared.geometry else None,
    }
    with (folder / "meta.json").open("w") as file:
        json.dump(meta, file)
        _flush(file)


def _write_array(folder: Path, name: str, array: np.ndarray) -> StoredArray:
    array = np.ascontiguousarray(array)
    with (folder / name).open("wb") as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
        offset = file.tell() - array.nbytes
        _flush(file)
    return StoredArray(name, array.shape, array.dtype.str, offset)


def _flush(file: Any) -> None:
    """Bring a file to the disk before the rename that makes it count."""
    file.flush()
    os.fsync(file.fileno())


def open_entry(entry: Path, ref: CaseRef, *, content: str) -> PreparedCase | None:
    """Open an entry without touching its voxels.

    Args:
        entry: The folder.
        ref: The case it belongs to.
        content: Hash of the input files' content.

    Returns:
        None if there is no entry or a file is missing or has the wrong size.
    """
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        arrays = {name: _stored(fields) for name, fields in meta["arrays"].items()}
        if "image_CIJK" not in arrays or not all(
            _has_size(entry, stored) for stored in set(arrays.values())
        ):
            return None
        geometry = meta["geometry"]
        return PreparedCase(
            case_id=ref.case_id,
            subject_id=ref.subject_id,
            folder=str(entry),
            content=content,
            fingerprint=str(meta["fingerprint"]),
            arrays=arrays,
            class_label=meta["class_label"],
            spacing_mm=tuple(map(float, meta["spacing_mm"])),
            spacing_native_mm=tuple(map(float, meta["spacing_native_mm"])),
            spacing_known=bool(meta["spacing_known"]),
            geometry=Geometry(**{k: tuple(v) for k, v in geometry.items()})
            if geometry
            else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stored(fields: dict[str, Any]) -> StoredArray:
    return StoredArray(
        file=os.path.basename(fields["file"]),
        shape=tuple(map(int, fields["shape"])),
        dtype=str(np.dtype(fields["dtype"]).str),
        offset_bytes=int(fields["offset_bytes"]),
    )


def _has_size(entry: Path, stored: StoredArray) -> bool:
    num_bytes = int(np.prod(stored.shape)) * np.dtype(stored.dtype).itemsize
    return os.stat(entry / stored.file).st_size == stored.offset_bytes + num_bytes
