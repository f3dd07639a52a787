"""Image and label together: geometry, label values, dispatch, messages."""

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedmed.case import UNKNOWN_LABEL, Case
from fedmed.errors import CaseError, ConfigError
from fedmed.imaging.geometry import check_label, check_pair
from fedmed.imaging.pairs import read_image_label
from fedmed.imaging.volume import Volume

LABELS = {0: "background", 1: "prostate"}
AFFINE = np.diag([0.5, 0.5, 3.0, 1.0])


def volume(
    array: np.ndarray, affine: np.ndarray = AFFINE, known: bool = True
) -> Volume:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(
        array if array.ndim == 4 else array[None],
        (float(spacing[0]), float(spacing[1]), float(spacing[2])),
        affine,
        "RAS",
        known,
    )


def mask(value: int = 1) -> np.ndarray:
    array = np.zeros((6, 5, 4), np.uint8)
    array[2:4, 1:3, 1:3] = value
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    nibabel.save(image, path)
    return path


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    voxels = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    return save(tmp_path / "image.nii.gz", voxels)


# --- geometry -------------------------------------------------------------------------


def test_equal_grids_pass() -> None:
    check_pair(volume(mask()), volume(mask()))


def test_other_shape_is_refused() -> None:
    with pytest.raises(CaseError, match="6 x 5 x 4 and 6 x 5 x 3"):
        check_pair(volume(mask()), volume(mask()[..., :3]))


@pytest.mark.parametrize(
    ("shift_mm", "tolerance_mm", "passes"),
    [(0.05, 0.1, True), (0.2, 0.1, False), (0.2, 0.3, True)],
)
def test_shift_beyond_tolerance_is_refused(
    shift_mm: float, tolerance_mm: float, passes: bool
) -> None:
    moved = AFFINE.copy()
    moved[1, 3] += shift_mm
    pair = volume(mask()), volume(mask(), moved)
    if passes:
        check_pair(*pair, tolerance_mm=tolerance_mm)
    else:
        with pytest.raises(CaseError, match=r"0\.2 mm apart"):
            check_pair(*pair, tolerance_mm=tolerance_mm)


def test_other_spacing_is_refused() -> None:
    with pytest.raises(CaseError, match="voxel size"):
        check_pair(volume(mask()), volume(mask(), np.diag([0.5, 0.6, 3.0, 1.0])))


def test_rotation_is_refused() -> None:
    """Equal spacing and origin, but turned by half a degree on a long axis."""
    angle = np.deg2rad(5)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    with pytest.raises(CaseError, match="apart"):
        check_pair(volume(mask()), volume(mask(), turn @ AFFINE))


def test_pictures_have_only_a_size() -> None:
    check_pair(volume(mask()), volume(mask(), np.eye(4), known=False))


# --- label values ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_declared_values_pass_in_any_type(kind) -> None:
    result = check_label(volume(mask().astype(kind)), labels=LABELS)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, mask())


@pytest.mark.parametrize("value", [2, 255, -1, 1000, 70_000])
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_undeclared_value_is_named(value: int, kind) -> None:
    array = mask().astype(kind)
    array[0, 0, 0] = value
    with pytest.raises(
        CaseError, match=rf"holds {value}, which.*0 background, 1 prost"
    ):
        check_label(volume(array), labels=LABELS)


def test_value_between_declared_ones_is_named() -> None:
    with pytest.raises(CaseError, match="holds 3, which"):
        check_label(volume(mask(3)), labels={0: "background", 5: "liver"})


@pytest.mark.parametrize("value", [0.5, 1e-6, float("nan"), float("inf"), 1e20])
def test_float_labels_are_refused(value: float) -> None:
    array = mask().astype(np.float64)
    array[0, 0, 0] = value
    with pytest.raises(CaseError, match="the label holds"):
        check_label(volume(array), labels=LABELS)


def test_one_hot_is_refused_with_a_hint() -> None:
    array = np.stack([1 - mask(), mask()])
    with pytest.raises(CaseError, match="one-hot"):
        check_label(volume(array), labels=LABELS)


def test_merge_makes_one_class_of_several() -> None:
    array = mask(1)
    array[0, 0, 0] = 2
    array[0, 0, 1] = 9
    result = check_label(volume(array), labels=LABELS, merge={2: 1, 9: UNKNOWN_LABEL})
    assert result[0, 0, 0] == 1
    assert result[0, 0, 1] == UNKNOWN_LABEL
    assert np.count_nonzero(result == 1) == 9


def test_impossible_declarations_are_refused() -> None:
    label = volume(mask())
    for labels, merge in [
        ({}, {}),
        ({255: "x"}, {}),
        ({-1: "x"}, {}),
        (LABELS, {2: 3}),
    ]:
        with pytest.raises(ConfigError):
            check_label(label, labels=labels, merge=merge)


# --- the whole case -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label.nii", "label.nii.gz", "LABEL.NII.GZ"])
def test_reads_a_case(tmp_path: Path, image_path: Path, name: str) -> None:
    label_path = save(tmp_path / name, mask(2))
    case = read_image_label("c1", image_path, label_path, labels=LABELS, merge={2: 1})
    assert case.image.shape == (1, 6, 5, 4)
    np.testing.assert_array_equal(case.label, mask())
    assert case.spacing_mm == (0.5, 0.5, 3.0)
    assert read_image_label("c1", image_path, None, labels=LABELS).label is None


def test_image_and_label_of_other_orientation_meet(
    tmp_path: Path, image_path: Path
) -> None:
    label = nibabel.Nifti1Image(mask(), AFFINE)
    turned = label.as_reoriented([[1, -1], [2, 1], [0, -1]])
    path = save(tmp_path / "label.nii", np.asarray(turned.dataobj), turned.affine)
    case = read_image_label("c1", image_path, path, labels=LABELS)
    np.testing.assert_array_equal(case.label, mask())


def test_one_hot_file_gets_the_hint(tmp_path: Path, image_path: Path) -> None:
    path = save(tmp_path / "label.nii", np.stack([1 - mask(), mask()], axis=-1))
    with pytest.raises(CaseError, match=r"(?s)case c1, label: .*one-hot"):
        read_image_label("c1", image_path, path, labels=LABELS)


def test_pictures_and_masks_of_255(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (5, 6, 3), np.uint8)
    Image.fromarray(rows).save(tmp_path / "image.png")
    Image.fromarray((rows[..., 0] > 100).astype(np.uint8) * 255).save(
        tmp_path / "label.png"
    )
    paths = tmp_path / "image.png", tmp_path / "label.png"
    with pytest.raises(CaseError, match=r"(?s)holds 255.*255: 1"):
        read_image_label("c1", *paths, labels=LABELS)
    case = read_image_label(
        "c1", *paths, labels=LABELS, merge={255: 1}, region_path=paths[1]
    )
    assert not case.spacing_known
    np.testing.assert_array_equal(case.label[..., 0], (rows[::-1, :, 0] > 100).T)
    np.testing.assert_array_equal(case.region, case.label)


def test_post_hook_marks_unknown_slices(tmp_path: Path, image_path: Path) -> None:
    def unlabelled_is_unknown(case: Case) -> Case:
        label = case.label.copy()
        label[:, :, ~label.any(axis=(0, 1))] = UNKNOWN_LABEL
        return dataclasses.replace(case, label=label)

    path = save(tmp_path / "label.nii", mask())
    case = read_image_label(
        "c1", image_path, path, labels=LABELS, post=unlabelled_is_unknown
    )
    assert np.all(case.label[:, :, [0, 3]] == UNKNOWN_LABEL)
    np.testing.assert_array_equal(case.label[:, :, 1:3], mask()[:, :, 1:3])


def test_messages_name_case_and_role_but_no_path(tmp_path: Path, image_path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] = 4
    wrong = {
        "missing.nii.gz": "cannot be read",
        "label.dcm": "kind of file",
        "label.nii": "apart",
        "label.jpg": "cannot be read",
    }
    save(tmp_path / "label.nii", mask(), shifted)
    for name, message in wrong.items():
        with pytest.raises(CaseError, match=f"case c1, label: .*{message}") as caught:
            read_image_label("c1", image_path, tmp_path / name, labels=LABELS)
        assert str(tmp_path) not in str(caught.value)
        assert caught.value.message.count("case c1") == 1
        assert caught.value.__suppress_context__


def test_link_out_of_the_data_folder_is_refused(
    tmp_path: Path, image_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    inside = save(root / "real.nii.gz", mask())
    (root / "link.nii.gz").symlink_to(inside)
    (root / "out.nii.gz").symlink_to(image_path)
    read_image_label("c1", root / "link.nii.gz", None, labels=LABELS, root=root)
    for path in (root / "out.nii.gz", root / ".." / "image.nii.gz"):
        with pytest.raises(CaseError, match="leads out of") as caught:
            read_image_label("c1", path, None, labels=LABELS, root=root)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(CaseError, match="leads out of"):
        read_image_label("c1", inside, image_path, labels=LABELS, root=root)


def test_empty_region_is_refused(tmp_path: Path, image_path: Path) -> None:
    path = save(tmp_path / "region.nii", mask(0))
    with pytest.raises(CaseError, match="region is empty"):
        read_image_label("c1", image_path, None, labels=LABELS, region_path=path)
