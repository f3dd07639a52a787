"""Pictures: what is read, what is refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmed.errors import CaseError
from fedmed.imaging.pictures import read_label_picture, read_picture

ROWS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
"""Three rows of four columns, top row first."""


def save(path: Path, rows: np.ndarray, **options: object) -> Path:
    Image.fromarray(rows).save(path, **options)
    return path


def test_axes_run_right_and_up(tmp_path: Path) -> None:
    volume = read_picture(save(tmp_path / "p.png", ROWS))
    assert volume.array_CIJK.shape == (1, 4, 3, 1)
    assert volume.array_CIJK.dtype == np.float32
    for row in range(3):
        for column in range(4):
            assert volume.array_CIJK[0, column, 2 - row, 0] == ROWS[row, column]
    assert volume.spacing_mm == (1.0, 1.0, 1.0)
    assert not volume.spacing_known


def test_colours_are_channels(tmp_path: Path) -> None:
    rows = np.stack([ROWS, ROWS + 1, ROWS + 2], axis=-1)
    volume = read_picture(save(tmp_path / "p.png", rows))
    assert volume.array_CIJK.shape == (3, 4, 3, 1)
    np.testing.assert_array_equal(volume.array_CIJK[2], volume.array_CIJK[0] + 2)


def test_sixteen_bits_and_one_bit(tmp_path: Path) -> None:
    deep = read_picture(save(tmp_path / "p.png", ROWS.astype(np.uint16) * 257))
    assert deep.array_CIJK.max() == 220 * 257
    bits = read_label_picture(save(tmp_path / "b.png", ROWS > 100))
    assert set(np.unique(bits.array_CIJK)) == {0, 1}
    assert bits.array_CIJK.dtype == np.uint8


def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    smooth = np.full((16, 24), 90, np.uint8)
    smooth[:8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees on display
    plain = read_picture(save(tmp_path / "a.jpg", smooth))
    turned = read_picture(save(tmp_path / "b.jpg", smooth, exif=exif))
    np.testing.assert_array_equal(plain.array_CIJK, turned.array_CIJK)
    assert plain.array_CIJK[0, :, -1].mean() > 190  # the bright top is up


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "p.png"
    Image.fromarray(ROWS).convert("RGBA").convert(mode if mode != "PA" else "P").save(
        path, **({"transparency": 0} if mode == "PA" else {})
    )
    with pytest.raises(CaseError, match="alpha"):
        read_picture(path)


@pytest.mark.parametrize("mode", ["P", "CMYK"])
def test_other_colour_modes_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("p.png" if mode == "P" else "p.jpg")
    Image.fromarray(ROWS).convert(mode).save(path)
    with pytest.raises(CaseError, match="colour mode"):
        read_picture(path)


def test_palette_label_gives_indices(tmp_path: Path) -> None:
    picture = Image.fromarray((ROWS > 100).astype(np.uint8) * 2)
    picture = picture.convert("P")
    picture.putpalette([9, 9, 9, 8, 8, 8, 250, 0, 0])
    picture.save(tmp_path / "l.png")
    volume = read_label_picture(tmp_path / "l.png")
    assert set(np.unique(volume.array_CIJK)) == {0, 2}


def test_labels_in_colour_or_jpeg_are_refused(tmp_path: Path) -> None:
    rows = np.stack([ROWS] * 3, axis=-1)
    with pytest.raises(CaseError, match="colour mode RGB"):
        read_label_picture(save(tmp_path / "l.png", rows))
    with pytest.raises(CaseError, match="JPEG"):
        read_label_picture(save(tmp_path / "l.jpg", ROWS))


def test_size_is_capped_before_unpacking(tmp_path: Path) -> None:
    path = save(tmp_path / "p.png", ROWS)
    with pytest.raises(CaseError, match="4 x 3 pixels, more than 11"):
        read_picture(path, max_pixels=11)
    assert read_picture(path, max_pixels=12).shape_IJK == (4, 3, 1)


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_picture_that_claims_too_much_is_refused(tmp_path: Path, side: int) -> None:
    content = bytearray(save(tmp_path / "p.png", ROWS).read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(CaseError, match=r"pixels"):
        read_picture(tmp_path / "p.png")


def test_any_flipped_bit_in_png_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (12, 9), np.uint8)
    content = save(tmp_path / "p.png", noise).read_bytes()
    for position in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        (tmp_path / "p.png").write_bytes(damaged)
        with pytest.raises(CaseError):
            read_picture(tmp_path / "p.png")


@pytest.mark.parametrize("name", ["p.png", "p.jpg"])
def test_truncated_pictures_are_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    content = save(tmp_path / name, noise).read_bytes()
    for kept in (0, 1, 8, 20, len(content) // 2, len(content) - 20):
        (tmp_path / name).write_bytes(content[:kept])
        with pytest.raises(CaseError):
            read_picture(tmp_path / name)


def test_other_formats_and_animations_are_refused(tmp_path: Path) -> None:
    Image.fromarray(ROWS).save(tmp_path / "p.png", format="BMP")
    with pytest.raises(CaseError, match="neither PNG nor JPEG"):
        read_picture(tmp_path / "p.png")
    frames = [Image.fromarray(ROWS), Image.fromarray(ROWS + 5)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(CaseError, match="frames"):
        read_picture(tmp_path / "a.png")


def test_messages_hold_no_path(tmp_path: Path) -> None:
    folder = tmp_path / "DOE_JANE"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"garbage")
    for name in ("none.png", "x.png"):
        with pytest.raises(CaseError) as caught:
            read_picture(folder / name)
        assert "DOE_JANE" not in str(caught.value)
        assert caught.value.__suppress_context__
