"""Flower's `Array` over numbers that already lie somewhere: no bytes until asked.

Flower keeps every array as the bytes of a .npy file: written where it is made, read
where it is used. Between processes that share memory nobody needs these bytes.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

NUMPY = "numpy.ndarray"
"""Flower's name for arrays whose bytes are a .npy file."""

TORCH_DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
"""What NumPy and torch have in common, in this machine's byte order."""

NUMPY_DTYPES = {kind: np.dtype(name) for name, kind in TORCH_DTYPES.items()}

_MAGIC = b"\x93NUMPY\x01\x00"

with warnings.catch_warnings():
    # Torch says once per process that arrays over bytes must not be written to.
    # Nobody does: they are copied from.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


class SharedArray(Array):  # type: ignore[misc]
    """An array of Flower's that views numbers and serialises them when asked.

    Like Flower's own, `numpy()` gives a fresh array that may be written to.

    Args:
        values: The numbers, of a dtype of `TORCH_DTYPES`, row-major; not copied.
    """

    def __init__(self, values: np.ndarray) -> None:
        # Plain attributes would each be noted as a change by Flower's `__setattr__`.
        self.__dict__.update(
            dtype=values.dtype.name,
            shape=values.shape,
            stype=NUMPY,
            values=values,
        )

    @property
    def data(self) -> bytes:
        """The bytes of a .npy file; made anew each time."""
        known: bytes | None = self.__dict__.get("replaced")
        if known is not None:
            return known
        file = io.BytesIO()
        np.save(file, self.__dict__["values"], allow_pickle=False)
        return file.getvalue()

    @data.setter
    def data(self, data: bytes) -> None:
        self.__dict__["replaced"] = data

    def numpy(self) -> np.ndarray:
        """Copy the numbers."""
        if self.is_replaced:
            return np.asarray(super().numpy())
        return np.array(self.__dict__["values"])

    @property
    def is_replaced(self) -> bool:
        """Whether somebody has set other bytes, or how to read them."""
        return "replaced" in self.__dict__ or self.stype != NUMPY

    @property
    def values(self) -> np.ndarray:
        """The numbers themselves, to be read at once and not written to."""
        found: np.ndarray = self.__dict__["values"]
        return found

    def own(self) -> None:
        """Copy the numbers, because the memory they lie in will be used again."""
        self.__dict__["values"] = np.array(self.values)

    def plain(self) -> Array:
        """Give Flower's own array of equal content."""
        return Array(self.dtype, tuple(self.shape), self.stype, self.data)

    def deflate(self) -> bytes:
        """Deflate as Flower's own array does."""
        deflated: bytes = self.plain().deflate()
        return deflated

    def __eq__(self, other: object) -> bool:
        """Compare as Flower's own array does, whichever of the two it is."""
        if not isinstance(other, Array):
            return NotImplemented
        mine = (self.dtype, tuple(self.shape), self.stype, self.data)
        return mine == (other.dtype, tuple(other.shape), other.stype, other.data)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the numbers, not a view of memory."""
        if self.is_replaced:
            return Array, (self.dtype, tuple(self.shape), self.stype, self.data)
        return SharedArray, (np.array(self.values),)


def numbers_of(array: Array) -> Tensor | None:
    """View the numbers of an array; None if only its bytes can travel.

    The tensor must not be written to.
    """
    if isinstance(array, SharedArray) and not array.is_replaced:
        return torch.from_numpy(array.values)
    if array.stype != NUMPY or array.dtype not in TORCH_DTYPES:
        return None
    kind = NUMPY_DTYPES[TORCH_DTYPES[array.dtype]]
    data, shape = array.data, tuple(array.shape)
    values = _quickly(data, kind, shape)
    if values is None:
        try:
            values = np.load(io.BytesIO(data), allow_pickle=False)
        except ValueError:
            return None
        if values.dtype != kind or values.shape != shape:
            return None
        values = np.ascontiguousarray(values).reshape(shape)
    return torch.from_numpy(values)


def _quickly(
    data: bytes, kind: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray | None:
    """View the numbers of a .npy file that is as `np.save` writes most of them."""
    if not data.startswith(_MAGIC) or len(data) < 10:
        return None
    start = 10 + int(struct.unpack_from("<H", data, 8)[0])
    header = data[10:start]
    wanted = f"'descr': '{kind.str}', 'fortran_order': False, 'shape': {shape}"
    count = math.prod(shape)
    if wanted.encode() not in header or len(data) != start + count * kind.itemsize:
        return None
    return np.frombuffer(data, kind, count, start).reshape(shape)
