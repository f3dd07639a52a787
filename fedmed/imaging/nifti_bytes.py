"""Bytes of a NIfTI file, read once and to the end, never more than the header claims.

gzip keeps a checksum at the END of its stream; readers that stop after the last voxel
never look at it, and a flipped bit gives wrong voxels in silence.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedmed.errors import CaseError
from fedmed.imaging.nifti_header import HEADER_BYTES, NiftiHeader, parse_header

MAX_DEFLATE_RATIO = 1032
"""No deflate stream holds more than 1032 times its own size (zlib's notes)."""

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_COPY_AGAIN = "Copy the file again from the archive."


def read_voxels(
    path: Path, *, max_voxels: int, channels: bool
) -> tuple[NiftiHeader, np.ndarray]:
    """Read header and stored voxels of a `.nii` or `.nii.gz` file.

    Args:
        path: The file; gzip is recognised by its first bytes, not by the name.
        max_voxels: Refuse larger volumes before their memory is taken.
        channels: Allow a fourth axis.

    Returns:
        The header, and the voxels as stored in its shape (Fortran order, unscaled).

    Raises:
        CaseError: If the file cannot be opened, is damaged, or its size does not
            fit its header.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic = file.read(2)
            file.seek(0)
            if magic == _GZIP_MAGIC:
                header, body = _read_gzip(file, size, max_voxels, channels)
            else:
                header, body = _read_plain(file, size, max_voxels, channels)
    except OSError as error:
        # The message of an OSError holds the whole path.
        raise CaseError(
            f"the file cannot be read: {error.strerror or 'input/output error'}"
        ) from None
    return header, np.frombuffer(body, header.stored).reshape(header.shape, order="F")


def _read_plain(
    file: BinaryIO, size: int, max_voxels: int, channels: bool
) -> tuple[NiftiHeader, bytes]:
    header = parse_header(file.read(HEADER_BYTES), channels=channels)
    _check_count(header, max_voxels)
    if size != header.total_bytes:
        raise _wrong_size(size, header)
    file.seek(header.offset_bytes)
    body = file.read(header.total_bytes - header.offset_bytes)
    if len(body) != header.total_bytes - header.offset_bytes:
        raise CaseError("the file became shorter while it was read", hint=_COPY_AGAIN)
    return header, body


def _read_gzip(
    file: BinaryIO, size: int, max_voxels: int, channels: bool
) -> tuple[NiftiHeader, bytes]:
    stream = _GzipStream(file)
    start = stream.take(HEADER_BYTES)
    header = parse_header(start, channels=channels)
    _check_count(header, max_voxels)
    if header.total_bytes > MAX_DEFLATE_RATIO * size:
        raise CaseError(
            f"the header claims {header.total_bytes} bytes, which a compressed file "
            f"of {size} bytes cannot hold",
            hint=_COPY_AGAIN,
        )
    # One byte more than claimed: a longer stream is refused, never unpacked.
    rest = stream.take(header.total_bytes - len(start) + 1)
    if len(start) + len(rest) != header.total_bytes:
        raise _wrong_size(len(start) + len(rest), header)
    if len(start) <= header.offset_bytes:
        skip = header.offset_bytes - len(start)
        return header, rest[skip:] if skip else rest
    return header, start[header.offset_bytes :] + rest


class _GzipStream:
    """The members of a gzip file, unpacked on request, checksums verified."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packed = b""
        self._member = zlib.decompressobj(wbits=31)
        self._at_end = False

    def take(self, num_bytes: int) -> bytes:
        """Unpack up to `num_bytes`; less only at the verified end of the stream."""
        parts: list[bytes] = []
        missing = num_bytes
        while missing > 0 and not self._at_end:
            part = self._unpack(missing)
            parts.append(part)
            missing -= len(part)
            if self._member.eof:
                self._next_member()
        return b"".join(parts)

    def _unpack(self, at_most: int) -> bytes:
        packed = self._packed or self._file.read(_CHUNK_BYTES)
        try:
            part = self._member.decompress(packed, at_most)
        except zlib.error:
            raise CaseError(
                "the compressed data are damaged (wrong checksum or structure)",
                hint=_COPY_AGAIN,
            ) from None
        if not (packed or part or self._member.eof):
            raise CaseError("the compressed file ends too early", hint=_COPY_AGAIN)
        self._packed = self._member.unconsumed_tail
        return part

    def _next_member(self) -> None:
        """Go on with the next member; zeros between and after members are padding."""
        packed = self._member.unused_data.lstrip(b"\0")
        while not packed:
            chunk = self._file.read(_CHUNK_BYTES)
            if not chunk:
                self._at_end = True
                return
            packed = chunk.lstrip(b"\0")
        self._packed = packed
        self._member = zlib.decompressobj(wbits=31)


def _check_count(header: NiftiHeader, max_voxels: int) -> None:
    if header.num_voxels > max_voxels:
        shape = " x ".join(map(str, header.shape))
        raise CaseError(
            f"the header claims {shape} voxels, more than {max_voxels} in all",
            hint="The file is damaged, or the limit `max_voxels` is too low.",
        )


def _wrong_size(seen: int, header: NiftiHeader) -> CaseError:
    than = "more" if seen > header.total_bytes else "less"
    return CaseError(
        f"the file holds {than} data than its header claims "
        f"(expected {header.total_bytes} bytes)",
        hint=_COPY_AGAIN,
    )
