"""Every way known to us in which a damaged or lying NIfTI file loads without a word."""

import gzip
import itertools
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedmed.errors import CaseError
from fedmed.imaging.volume import Volume, read_volume

AFFINE = np.array(
    [[0.8, 0.0, 0.0, -10.0], [0.0, 0.9, 0.0, 5.0], [0.0, 0.0, 3.0, 7.0], [0, 0, 0, 1]]
)
# Offsets of fields in a NIfTI-1 header (nifti1.h).
DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET = 40, 70, 72, 76, 108
SCL_SLOPE, SCL_INTER, XYZT_UNITS, DESCRIP, DB_NAME = 112, 116, 123, 148, 18
QFORM_CODE, SFORM_CODE, QUATERN_B, SROW_X = 252, 254, 256, 280


def voxels(shape: tuple[int, ...] = (9, 8, 7)) -> np.ndarray:
    """By default more bytes than the first piece of a file that the reader takes."""
    return np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)


def nifti(array: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> bytearray:
    image = nibabel.Nifti1Image(voxels() if array is None else array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    return bytearray(image.to_bytes())


def put(content: bytearray, offset: int, kind: str, *values: float) -> bytearray:
    struct.pack_into("<" + kind, content, offset, *values)
    return content


def save(folder: Path, content: bytes, name: str = "v.nii") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "i4", "u4", "f4", "f8"])
def test_reads_what_nibabel_reads(tmp_path: Path, name: str, kind: str) -> None:
    stored = voxels().astype(kind)
    path = save(tmp_path, nifti(stored), name)
    volume = read_volume(path)
    expected = nibabel.as_closest_canonical(nibabel.load(path))
    assert volume.array_CIJK.dtype == np.float32
    assert volume.array_CIJK.flags.writeable
    np.testing.assert_array_equal(volume.array_CIJK[0], expected.get_fdata())
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
    np.testing.assert_allclose(volume.spacing_mm, (0.8, 0.9, 3.0), rtol=1e-6)
    assert volume.axis_codes == "RAS"
    assert volume.spacing_known


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (13, 12, 11)])
def test_reads_small_and_large_files(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    path = save(tmp_path, nifti(voxels(shape)), name)
    np.testing.assert_array_equal(read_volume(path).array_CIJK[0], voxels(shape))


@pytest.mark.parametrize("offset", [352, 384, 540, 1000])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_header_extensions_are_skipped(tmp_path: Path, name: str, offset: int) -> None:
    content = put(nifti(), VOX_OFFSET, "f", offset)
    content[352:352] = b"\x07" * (offset - 352)
    volume = read_volume(save(tmp_path, content, name))
    np.testing.assert_array_equal(volume.array_CIJK[0], voxels())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_reads_both_versions_and_byte_orders(tmp_path: Path, order: str, kind) -> None:
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    image = kind(voxels(), AFFINE, header)
    volume = read_volume(save(tmp_path, image.to_bytes(), "v.nii.gz"))
    np.testing.assert_array_equal(volume.array_CIJK[0], voxels())
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)


def test_mixed_orientations_give_one_canonical_array(tmp_path: Path) -> None:
    """All 48 ways to store one scan, asymmetric in content, shape and spacing."""
    reference = read_volume(save(tmp_path, nifti()))
    original = nibabel.Nifti1Image(voxels(), AFFINE)
    codes = set()
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turned = original.as_reoriented(list(zip(order, flips, strict=True)))
            content = nifti(np.asarray(turned.dataobj), turned.affine)
            volume = read_volume(save(tmp_path, content))
            codes.add(volume.axis_codes)
            assert min(volume.array_CIJK.strides) >= 0  # torch takes no flipped views
            np.testing.assert_array_equal(volume.array_CIJK, reference.array_CIJK)
            np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-5)
            np.testing.assert_allclose(
                volume.spacing_mm, reference.spacing_mm, rtol=1e-6
            )
    assert len(codes) == 48


def test_dtype_none_keeps_label_type(tmp_path: Path) -> None:
    path = save(tmp_path, nifti(voxels().astype(np.uint8)))
    assert read_volume(path, dtype=None).array_CIJK.dtype == np.uint8


# --- the compressed stream ------------------------------------------------------------


def test_any_flipped_bit_in_gzip_is_refused_or_harmless(tmp_path: Path) -> None:
    """nibabel: wrong voxels, silent. Here: an error, or exactly the right voxels.

    Harmless are bits that carry no data: of the gzip header (time stamp, operating
    system), of unused codes, and the padding behind the last block.
    """
    content = save(tmp_path, nifti(), "v.nii.gz").read_bytes()
    truth = read_volume(save(tmp_path, nifti())).array_CIJK
    path = tmp_path / "flipped.nii.gz"
    refused = harmless = 0
    for position in range(0, 8 * len(content), 11):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            volume = read_volume(path)
        except CaseError:
            refused += 1
        else:
            np.testing.assert_array_equal(volume.array_CIJK, truth)
            harmless += 1
    assert refused > 10 * harmless


def test_wrong_checksum_alone_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(bytes(nifti())))
    content[-6] ^= 1  # in the CRC-32: every voxel is right, and yet
    (tmp_path / "v.nii.gz").write_bytes(content)
    with pytest.raises(CaseError, match="checksum"):
        read_volume(tmp_path / "v.nii.gz")


@pytest.mark.parametrize("kept", [0, 1, 5, 15, 100, -9, -8, -1])
def test_truncated_gzip_is_refused(tmp_path: Path, kept: int) -> None:
    content = gzip.compress(bytes(nifti()))
    (tmp_path / "v.nii.gz").write_bytes(content[:kept])
    with pytest.raises(CaseError):
        read_volume(tmp_path / "v.nii.gz")


@pytest.mark.parametrize("kept", [0, 3, 200, 347, 348, 352, -1])
def test_truncated_plain_file_is_refused(tmp_path: Path, kept: int) -> None:
    with pytest.raises(CaseError):
        read_volume(save(tmp_path, nifti()[:kept]))


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_empty_and_garbage_are_refused(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    for content in (b"", b"\0" * 1000, rng.bytes(1000), b"patient report" * 50):
        with pytest.raises(CaseError):
            read_volume(save(tmp_path, content, name))


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_more_data_than_the_header_claims_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CaseError, match="more data than its header claims"):
        read_volume(save(tmp_path, nifti() + b"\0", name))


def test_several_gzip_members_and_padding_are_read(tmp_path: Path) -> None:
    content = bytes(nifti())
    pieces = [content[:100], content[100:700], b"", content[700:]]
    packed = b"".join(gzip.compress(piece) for piece in pieces) + b"\0" * 7
    (tmp_path / "v.nii.gz").write_bytes(packed)
    volume = read_volume(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(volume.array_CIJK[0], voxels())
    (tmp_path / "v.nii.gz").write_bytes(packed + b"garbage")
    with pytest.raises(CaseError):
        read_volume(tmp_path / "v.nii.gz")


def peak_bytes(path: Path, **options: int) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(CaseError):
            read_volume(path, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("size", [3000, 30000])
def test_huge_claim_is_refused_before_memory_is_taken(
    tmp_path: Path, name: str, size: int
) -> None:
    content = put(nifti(), DIM, "4h", 3, size, size, size)
    path = save(tmp_path, content + bytes(128_000), name)
    assert peak_bytes(path) < 8e6
    assert peak_bytes(path, max_voxels=2**50) < 8e6
    reason = "cannot hold" if name.endswith(".gz") else "less data than its header"
    with pytest.raises(CaseError, match=reason):  # the file's size decides
        read_volume(path, max_voxels=2**50)


def test_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """50 MB of zeros behind an honest small header: 49 kB on disk."""
    path = save(tmp_path, nifti() + bytes(50_000_000), "v.nii.gz")
    assert path.stat().st_size < 60_000
    assert peak_bytes(path) < 8e6


def test_bomb_with_a_matching_header_meets_the_limit(tmp_path: Path) -> None:
    content = put(nifti(), DIM, "4h", 3, 300, 300, 300)[:352] + bytes(2 * 300**3)
    path = save(tmp_path, content, "v.nii.gz")
    assert peak_bytes(path, max_voxels=10**6) < 8e6


def test_empty_mask_compresses_like_a_bomb_and_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, nifti(np.zeros((200, 200, 50), np.uint8)), "v.nii.gz")
    assert not read_volume(path).array_CIJK.any()


# --- the header -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "kind", "values", "message"),
    [
        (DIM, "4h", (3, -9, 8, 7), "impossible dimensions"),
        (DIM, "4h", (3, 9, 0, 7), "impossible dimensions"),
        (DIM, "h", (-3,), "impossible dimensions"),
        (DIM, "h", (9,), "impossible dimensions"),
        (DATATYPE, "2h", (128, 24), "type code 128"),
        (DATATYPE, "2h", (32, 64), "type code 32"),
        (BITPIX, "h", (8,), "bitpix"),
        (VOX_OFFSET, "f", (-352.0,), "vox_offset"),
        (VOX_OFFSET, "f", (float("nan"),), "vox_offset"),
        (VOX_OFFSET, "f", (0.0,), "vox_offset"),
        (XYZT_UNITS, "b", (7,), "unit of length"),
        (SCL_SLOPE, "2f", (float("nan"), 0.0), "scl_slope"),
        (SCL_SLOPE, "2f", (float("inf"), 0.0), "scl_slope"),
        (SCL_SLOPE, "2f", (1.0, float("nan")), "scl_inter"),
        (SCL_SLOPE, "2f", (0.0, float("nan")), "scl_inter"),
        (SCL_SLOPE, "2f", (0.0, -1024.0), "scl_slope is 0"),
        (SCL_SLOPE, "2f", (1e38, 0.0), "voxel values up to"),
        (SCL_SLOPE, "2f", (1.0, 1e30), "voxel values up to"),
        (PIXDIM + 4, "f", (0.0,), "voxel size"),
        (PIXDIM + 4, "f", (-0.8,), "voxel size"),
        (PIXDIM + 8, "f", (float("nan"),), "voxel size"),
        (PIXDIM + 12, "f", (float("inf"),), "voxel size"),
        (PIXDIM + 12, "f", (3e5,), "voxel size"),
        (PIXDIM, "f", (0.5,), "qfac"),
        (QUATERN_B, "f", (float("nan"),), "rotation"),
        (QUATERN_B, "3f", (1.0, 1.0, 1.0), "rotation"),
        (SROW_X, "12f", (0.0,) * 12, "singular"),
        (SROW_X, "12f", (0.8, 0, 0, 0, 0.8, 0, 0, 0, 0, 0, 3, 0), "singular"),
        (SROW_X, "f", (float("nan"),), "non-finite"),
        (SROW_X + 12, "f", (float("inf"),), "non-finite"),
        (QFORM_CODE, "2h", (0, 0), "neither sform nor qform"),
        (344, "4s", (b"ni1\0",), "half of a"),
        (344, "4s", (b"dcm\0",), "not NIfTI"),
    ],
)
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_impossible_header_is_refused(  # noqa: PLR0917
    tmp_path: Path, name: str, offset: int, kind: str, values, message: str
) -> None:
    path = save(tmp_path, put(nifti(), offset, kind, *values), name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CaseError, match=message):
            read_volume(path)


def test_slope_of_zero_means_not_scaled(tmp_path: Path) -> None:
    path = save(tmp_path, put(nifti(), SCL_SLOPE, "2f", 0.0, 0.0))
    np.testing.assert_array_equal(read_volume(path).array_CIJK[0], voxels())


def test_scaling_is_applied(tmp_path: Path) -> None:
    path = save(tmp_path, put(nifti(), SCL_SLOPE, "2f", 2.5, -1024.0))
    expected = 2.5 * voxels().astype(np.float64) - 1024.0
    np.testing.assert_allclose(
        read_volume(path).array_CIJK[0], expected, rtol=1e-6, atol=1e-3
    )
    assert read_volume(path, dtype=None).array_CIJK.dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_non_finite_voxel_is_refused(tmp_path: Path, value: float, kind: str) -> None:
    array = voxels().astype(kind)
    array[1, 2, 0] = value
    with pytest.raises(CaseError, match="1 of 504 voxels are not finite"):
        read_volume(save(tmp_path, nifti(array)))


@pytest.mark.parametrize("value", [1e13, -1e13, 1e300])
def test_absurd_magnitude_is_refused(tmp_path: Path, value: float) -> None:
    array = voxels().astype(np.float64)
    array[0, 0, 0] = value
    with pytest.raises(CaseError, match="voxel values up to"):
        read_volume(save(tmp_path, nifti(array)))


def test_four_axes_only_as_channels(tmp_path: Path) -> None:
    array = voxels((5, 4, 3, 2))
    path = save(tmp_path, nifti(array), "v.nii.gz")
    with pytest.raises(CaseError, match="four axes"):
        read_volume(path)
    volume = read_volume(path, channels=True)
    np.testing.assert_array_equal(volume.array_CIJK, np.moveaxis(array, 3, 0))
    with pytest.raises(CaseError, match="more than four axes"):
        read_volume(save(tmp_path, nifti(voxels((5, 4, 3, 1, 2)))), channels=True)


def test_trailing_axes_of_one_are_dropped(tmp_path: Path) -> None:
    path = save(tmp_path, nifti(voxels((5, 4, 3, 1))))
    assert read_volume(path).array_CIJK.shape == (1, 5, 4, 3)
    assert read_volume(path, channels=True).array_CIJK.shape == (1, 5, 4, 3)


def test_qform_speaks_where_sform_is_a_template(tmp_path: Path) -> None:
    """An sform of other voxel size than `pixdim` is not the scanner's grid."""
    content = put(nifti(), SFORM_CODE, "h", 4)
    put(content, SROW_X, "12f", 2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0)
    np.testing.assert_allclose(
        read_volume(save(tmp_path, content)).affine, AFFINE, atol=1e-5
    )
    put(content, QFORM_CODE, "h", 0)
    with pytest.raises(CaseError, match="contradict"):
        read_volume(save(tmp_path, content))


def test_forms_that_name_other_axes_are_refused(tmp_path: Path) -> None:
    content = put(nifti(), SROW_X, "12f", -0.8, 0, 0, 0, 0, 0.9, 0, 0, 0, 0, 3, 0)
    with pytest.raises(CaseError, match="different axes"):
        read_volume(save(tmp_path, content))


def test_qfac_of_zero_is_one(tmp_path: Path) -> None:
    content = put(put(nifti(), PIXDIM, "f", 0.0), SFORM_CODE, "h", 0)
    np.testing.assert_allclose(
        read_volume(save(tmp_path, content)).affine, AFFINE, atol=1e-5
    )


@pytest.mark.parametrize(("code", "unit_mm"), [(1, 1000.0), (2, 1.0), (3, 1e-3)])
def test_unit_of_length_is_believed(tmp_path: Path, code: int, unit_mm: float) -> None:
    affine = np.diag([0.8, 0.9, 3.0, unit_mm]) / unit_mm
    content = put(nifti(affine=affine), XYZT_UNITS, "b", code)
    volume = read_volume(save(tmp_path, content))
    np.testing.assert_allclose(volume.spacing_mm, (0.8, 0.9, 3.0), rtol=1e-5)


# --- what may not be said -------------------------------------------------------------


def test_text_fields_and_paths_stay_in_the_file(tmp_path: Path) -> None:
    secret = "DOE^JANE"
    folder = tmp_path / secret
    folder.mkdir()
    for kwargs in ({}, {"offset": SCL_SLOPE}, {"offset": PIXDIM + 4}):
        content = nifti()
        put(content, DESCRIP, "8s", secret.encode())
        put(content, DB_NAME, "8s", secret.encode())
        if not kwargs:
            assert secret not in repr(read_volume(save(folder, content)))
            continue
        put(content, kwargs["offset"], "f", float("nan"))
        with pytest.raises(CaseError) as caught:
            read_volume(save(folder, content))
        assert secret not in str(caught.value) + repr(caught.value)
    with pytest.raises(CaseError) as missing:
        read_volume(folder / "none.nii.gz")
    assert secret not in str(missing.value)
    assert missing.value.__suppress_context__  # a traceback would print the path
    assert "No such file" in str(missing.value)
    with pytest.raises(CaseError) as directory:
        read_volume(folder)
    assert secret not in str(directory.value)


def test_volume_is_frozen(tmp_path: Path) -> None:
    volume = read_volume(save(tmp_path, nifti()))
    assert isinstance(volume, Volume)
    assert volume.shape_IJK == (9, 8, 7)
    with pytest.raises(AttributeError):
        volume.affine = np.eye(4)  # type: ignore[misc]


def test_fuzzed_headers_give_case_errors_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    path = tmp_path / "v.nii"
    refused = 0
    for _ in range(200):
        content = nifti()
        for position in rng.integers(0, 352, rng.integers(1, 6)):
            content[position] = rng.integers(0, 256)
        path.write_bytes(content)
        try:
            volume = read_volume(path)
        except CaseError:
            refused += 1
        else:
            assert np.all(np.isfinite(volume.array_CIJK))
            assert np.all(np.isfinite(volume.affine))
    assert 20 < refused < 180  # both outcomes were met


def test_deflate_ratio_bound_holds() -> None:
    """The bound by which a lying header is caught: zlib never packs tighter."""
    from fedmed.imaging.nifti_bytes import MAX_DEFLATE_RATIO

    packer = zlib.compressobj(9, wbits=31)
    size = 20_000_000
    packed = packer.compress(bytes(size)) + packer.flush()
    assert 900 < size / len(packed) <= MAX_DEFLATE_RATIO
