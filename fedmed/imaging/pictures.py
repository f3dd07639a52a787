"""PNG and JPEG pictures as volumes of one slice.

Axis I runs from left to right and axis J from BOTTOM to TOP, K = 1: whatever draws a
slice of a RAS+ volume upright draws a picture upright too. EXIF data, with their
camera names, places and rotations, are ignored: pixels are taken as stored.

A PNG carries checksums and they are verified. A JPEG has none: one that is cut short is
refused, a flipped bit may pass.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fedmed.errors import CaseError
from fedmed.imaging.volume import Volume

MAX_PIXELS = 2**26
"""Default limit: 8192 x 8192 pixels."""

MAX_FILE_BYTES = 2**29

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_IMAGE_MODES = {"1": 1, "L": 1, "I;16": 1, "RGB": 3}
_LABEL_MODES = {"1", "L", "P"}


def read_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Volume:
    """Read a grey or colour picture.

    Args:
        path: A PNG or JPEG file; the content decides, not the name.
        max_pixels: Larger pictures are refused before they are unpacked.

    Returns:
        float32, C = 1 (grey) or 3 (red, green, blue), stored values (0 to 255, or to
        65535 for 16-bit grey); spacing (1, 1, 1), not known.

    Raises:
        CaseError: If the file is damaged, too large, has an alpha channel or a
            palette.
    """
    picture = _open(path, max_pixels)
    if "A" in picture.mode or "transparency" in picture.info:
        raise CaseError(
            "the picture has an alpha (transparency) channel",
            hint="Save it as grey or RGB without transparency.",
        )
    if picture.mode not in _IMAGE_MODES:
        raise CaseError(
            f"the picture has colour mode {picture.mode}, expected grey or RGB",
            hint="Save it as 8-bit grey, 16-bit grey or 8-bit RGB.",
        )
    return _volume(np.asarray(picture).astype(np.float32))


def read_label_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Volume:
    """Read a picture whose pixels are class numbers.

    Args:
        path: A PNG file with one bit, 8-bit grey or a palette (the index counts, not
            the colour).
        max_pixels: Larger pictures are refused before they are unpacked.

    Returns:
        uint8 stored values, C = 1; their meaning is checked by
        `fedmed.imaging.geometry.check_label`.

    Raises:
        CaseError: If the file is damaged, too large, a JPEG or in colour.
    """
    picture = _open(path, max_pixels)
    if picture.format != "PNG":
        raise CaseError(
            "the label is a JPEG, which changes class numbers near every edge",
            hint="Export the label as PNG.",
        )
    if picture.mode not in _LABEL_MODES:
        raise CaseError(
            f"the label has colour mode {picture.mode}, expected one class number a "
            "pixel",
            hint="Save it as 8-bit grey, with a palette or with one bit.",
        )
    return _volume(np.asarray(picture).astype(np.uint8))


def _volume(rows: np.ndarray) -> Volume:
    """Turn (row, column[, channel]) into (C, I, J, 1) with J upwards."""
    channels_last = rows if rows.ndim == 3 else rows[:, :, None]
    array_CIJ = channels_last[::-1].transpose(2, 1, 0)
    return Volume(
        array_CIJK=np.ascontiguousarray(array_CIJ)[..., None],
        spacing_mm=(1.0, 1.0, 1.0),
        affine=np.eye(4),
        axis_codes="",
        spacing_known=False,
    )


def _open(path: Path, max_pixels: int) -> Image.Image:
    content = _read(path)
    if content.startswith(_PNG_MAGIC):
        _check_png(content)
    try:
        with warnings.catch_warnings():
            # Pillow's own limit must not speak before ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=["PNG", "JPEG"])
        width, height = picture.size
        if width * height > max_pixels:
            raise CaseError(
                f"the picture has {width} x {height} pixels, more than {max_pixels}"
            )
        if getattr(picture, "n_frames", 1) > 1:
            raise CaseError("the picture has several frames, expected one")
        picture.load()
    except Image.DecompressionBombError:
        raise CaseError("the picture claims far too many pixels") from None
    except (OSError, SyntaxError, ValueError, zlib.error):
        raise CaseError("the picture is damaged or neither PNG nor JPEG") from None
    return picture


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CaseError(f"the picture's file is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CaseError(
            f"the file cannot be read: {error.strerror or 'input/output error'}"
        ) from None


def _check_png(content: bytes) -> None:
    """Verify every chunk's checksum: Pillow skips those of the pixel data."""
    kind = b""
    for kind, data, checksum in _png_chunks(content):
        if zlib.crc32(kind + data) != checksum:
            raise CaseError("the picture is damaged (wrong checksum)")
    if kind != b"IEND":
        raise CaseError("the picture's file ends too early")


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    start = len(_PNG_MAGIC)
    while start + 12 <= len(content):
        size = int.from_bytes(content[start : start + 4], "big")
        kind = content[start + 4 : start + 8]
        end = start + 8 + size
        if end + 4 > len(content):
            return
        yield (
            kind,
            content[start + 8 : end],
            int.from_bytes(content[end : end + 4], "big"),
        )
        if kind == b"IEND":
            return
        start = end + 4
