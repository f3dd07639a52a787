"""Preprocessing and its inverse."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from fedmed.case import UNKNOWN_LABEL, Case
from fedmed.errors import CaseError, ConfigError, FedMedError
from fedmed.imaging.preprocess import (
    Prepared,
    Preprocessing,
    cut_fraction,
    prepare,
    restore,
)
from fedmed.imaging.resample import resample_labels, resample_linear


def ball(shape: tuple[int, int, int], spacing: tuple[float, float, float]):
    """Two nested ellipsoids: 0 outside, 1 shell, 2 core."""
    axes = [
        (np.arange(n) - (n - 1) / 2) * s / (n * s / 2)
        for n, s in zip(shape, spacing, strict=True)
    ]
    i, j, k = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(i**2 + j**2 + (k / 1.5) ** 2)
    return (radius < 0.75).astype(np.uint8) + (radius < 0.45).astype(np.uint8)


def case(
    shape: tuple[int, int, int] = (40, 36, 8),
    spacing: tuple[float, float, float] = (0.7, 0.8, 3.0),
    **changes: object,
) -> Case:
    rng = np.random.default_rng(0)
    label = ball(shape, spacing)
    image = 100 * label[None] + rng.normal(500, 30, (2, *shape))
    values = {
        "case_id": "c1",
        "image": image.astype(np.float32),
        "label": label,
        "spacing_mm": spacing,
    }
    return Case(**(values | changes))  # type: ignore[arg-type]


def one_hot(labels: np.ndarray, num: int = 3) -> np.ndarray:
    known = np.where(labels == UNKNOWN_LABEL, 0, labels)
    return np.stack([known == c for c in range(num)]).astype(np.float32)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * np.sum(one & other) / (np.sum(one) + np.sum(other))


def test_nothing_asked_changes_nothing() -> None:
    raw = case()
    prepared = prepare(raw, Preprocessing(intensity="none"))
    np.testing.assert_array_equal(prepared.image_CIJK, raw.image)
    np.testing.assert_array_equal(prepared.label_IJK, raw.label)
    assert prepared.geometry is not None
    assert prepared.geometry.is_identity
    assert prepared.spacing_mm == prepared.spacing_native_mm == (0.7, 0.8, 3.0)
    np.testing.assert_array_equal(restore(one_hot(raw.label), prepared), raw.label)


@pytest.mark.parametrize(
    "size", [(40, 36), (30, 50), (31, 29), (64, 64, 12), (7, 9, 3)]
)
def test_crop_and_pad_go_back_exactly(size: tuple[int, ...]) -> None:
    raw = case()
    prepared = prepare(raw, Preprocessing(size=size, intensity="none"))
    shape = (*size, 8)[:3]
    assert prepared.image_CIJK.shape == (2, *shape)
    assert prepared.label_IJK.shape == shape
    back = restore(one_hot(prepared.label_IJK), prepared)
    inside = tuple(
        slice(max(0, (n - m) // 2), max(0, (n - m) // 2) + min(n, m))
        for n, m in zip(raw.label.shape, shape, strict=True)
    )
    expected = np.zeros_like(raw.label)
    expected[inside] = raw.label[inside]
    np.testing.assert_array_equal(back, expected)


def test_padding_is_unknown_and_dark() -> None:
    region = np.ones((40, 36, 8), np.uint8)
    prepared = prepare(case(region=region), Preprocessing(size=(50, 36)))
    padding = np.ones((50, 36, 8), bool)
    padding[5:45] = False
    assert np.all(prepared.label_IJK[padding] == UNKNOWN_LABEL)
    assert not np.any(prepared.label_IJK[~padding] == UNKNOWN_LABEL)
    assert np.all((prepared.region_IJK == 0) == padding)
    for channel in prepared.image_CIJK:
        assert np.all(channel[padding] == channel[~padding].min())


@pytest.mark.parametrize("spacing", [(0.5, 0.5), (0.5, 0.5, None), (0.7, 0.8, 2.0)])
def test_restoring_the_label_gives_the_shape_back(spacing) -> None:
    raw = case((60, 56, 12))
    prepared = prepare(raw, Preprocessing(spacing_mm=spacing, size=(96, 96)))
    back = restore(one_hot(prepared.label_IJK), prepared)
    assert back.dtype == np.uint8
    assert back.shape == raw.label.shape
    for c in (1, 2):
        assert dice(back == c, raw.label == c) > 0.98


@pytest.mark.parametrize("spacing", [(1.0, 1.1), (0.6, 0.9, 4.0), (1, 1, 4)])
def test_coarser_grid_errs_only_at_the_surface(spacing) -> None:
    """What a coarser grid loses lies within two voxels of a boundary of classes."""
    raw = case((60, 56, 12))
    prepared = prepare(raw, Preprocessing(spacing_mm=spacing, size=(96, 96)))
    wrong = restore(one_hot(prepared.label_IJK), prepared) != raw.label
    highest = ndimage.maximum_filter(raw.label, size=5)
    surface = highest != ndimage.minimum_filter(raw.label, size=5)
    assert wrong.any()
    assert not np.any(wrong & ~surface)
    assert not surface.all()


def test_in_plane_only_keeps_slices() -> None:
    prepared = prepare(case(), Preprocessing(spacing_mm=(0.35, 0.4)))
    assert prepared.image_CIJK.shape == (2, 80, 72, 8)
    np.testing.assert_allclose(prepared.spacing_mm, (0.35, 0.4, 3.0))
    assert prepared.spacing_native_mm == (0.7, 0.8, 3.0)


def test_nearly_equal_spacing_is_not_resampled() -> None:
    raw = case(spacing=(0.7000001, 0.8, 3.0))
    prepared = prepare(raw, Preprocessing(spacing_mm=(0.7, 0.8), intensity="none"))
    np.testing.assert_array_equal(prepared.image_CIJK, raw.image)


def test_linear_ramp_is_kept_by_resampling() -> None:
    """A ramp is linear: away from the edges every resampling is exact."""
    ramp = np.arange(30, dtype=np.float64)[:, None, None] * np.ones((1, 4, 4))
    for step, size in [(0.5, 60), (0.7, 43), (1.3, 23), (2.0, 15), (2.5, 12)]:
        result = resample_linear(ramp, (size, 4, 4), (step, 1.0, 1.0))
        expected = (np.arange(size) - (size - 1) / 2) * step + 14.5
        inner = (expected > step + 1) & (expected < 28 - step)
        np.testing.assert_allclose(
            result[inner, 0, 0], expected[inner], atol=0.13 if step > 1 else 1e-12
        )


def test_finer_grid_agrees_with_scipy() -> None:
    array = np.random.default_rng(1).normal(size=(9, 8, 5))
    steps, shape = (0.6, 0.8, 1.0), (15, 10, 5)
    grids = [
        (np.arange(m) - (m - 1) / 2) * step + (n - 1) / 2
        for m, n, step in zip(shape, array.shape, steps, strict=True)
    ]
    coordinates = np.meshgrid(*grids, indexing="ij")
    expected = ndimage.map_coordinates(array, coordinates, order=1, mode="nearest")
    np.testing.assert_allclose(
        resample_linear(array, shape, steps), expected, atol=1e-12
    )


def test_coarser_grid_averages() -> None:
    """A grid three times coarser must not skip two voxels of three.

    Triangle of half-width 3 on stripes of 1 voxel: (3 + 1 + 1) / 9 around a
    bright voxel and (2 + 2) / 9 around a dark one; output o lies on input 3 o + 1.
    """
    stripes = np.zeros((45, 2, 2), np.float32)
    stripes[::2] = 1.0
    result = resample_linear(stripes, (15, 2, 2), (3.0, 1.0, 1.0))
    np.testing.assert_allclose(result[1:-1:2], 5 / 9, rtol=1e-5)
    np.testing.assert_allclose(result[2:-2:2], 4 / 9, rtol=1e-5)


def test_constant_stays_constant() -> None:
    ones = np.ones((7, 6, 1), np.float32)
    for size, step in itertools.product((1, 3, 20), (0.3, 1.0, 3.7)):
        result = resample_linear(ones, (size, 6, 2), (step, 1.0, 0.5))
        np.testing.assert_allclose(result, 1.0, atol=1e-6)


def test_labels_bring_no_new_values_and_unknown_stays() -> None:
    labels = np.zeros((20, 20, 4), np.uint8)
    labels[:, 10:] = 200
    labels[..., 3] = UNKNOWN_LABEL
    result = resample_labels(labels, (33, 27, 4), (20 / 33, 20 / 27, 1.0))
    assert set(np.unique(result)) == {0, 200, UNKNOWN_LABEL}
    assert np.all(result[..., 3] == UNKNOWN_LABEL)
    assert not np.any(result[..., :3] == UNKNOWN_LABEL)


def test_region_crop_follows_the_region() -> None:
    region = np.zeros((40, 36, 8), np.uint8)
    region[24:36, 2:12, :] = 1
    prepared = prepare(case(region=region), Preprocessing(size=(12, 10), crop="region"))
    assert prepared.region_IJK.all()
    corner = np.zeros_like(region)
    corner[39, 0] = 1
    prepared = prepare(case(region=corner), Preprocessing(size=(12, 10), crop="region"))
    assert prepared.geometry.starts == (28, 0, 0)


def test_fit_shrinks_pictures_into_the_window() -> None:
    picture = case((80, 50, 1), (1.0, 1.0, 1.0), spacing_known=False)
    prepared = prepare(picture, Preprocessing(size=(40, 40), crop="fit"))
    assert prepared.geometry.grid_shape == (40, 25, 1)
    assert prepared.spacing_mm == (2.0, 2.0, 1.0)
    assert not prepared.spacing_known
    with pytest.raises(ConfigError, match="no known scale"):
        prepare(picture, Preprocessing(spacing_mm=(2.0, 2.0)))


def test_intensity_rules() -> None:
    raw = case()

    def image(**settings: object) -> np.ndarray:
        return prepare(raw, Preprocessing(**settings)).image_CIJK  # type: ignore[arg-type]

    x = raw.image.astype(np.float64)
    for c in range(2):
        expected = (x[c] - x[c].mean()) / x[c].std()
        np.testing.assert_allclose(image(intensity="zscore")[c], expected, atol=1e-4)
        bright = x[c][x[c] > x[c].mean()]
        expected = (x[c] - bright.mean()) / bright.std()
        np.testing.assert_allclose(
            image(intensity="zscore_foreground")[c], expected, atol=1e-4
        )
        low, high = np.percentile(x[c], (5, 90))
        expected = np.clip((x[c] - low) / (high - low), 0, 1)
        result = image(intensity="percentile", percentiles=(5.0, 90.0))[c]
        np.testing.assert_allclose(result, expected, atol=1e-4)
        expected = (x[c] - x[c].min()) / (x[c].max() - x[c].min())
        np.testing.assert_allclose(image(intensity="unit")[c], expected, atol=1e-5)
        expected = np.clip((x[c] - 450) / 150, 0, 1)
        result = image(intensity="window", window=(450.0, 600.0))[c]
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_intensity_is_measured_before_the_crop_and_inside_the_region() -> None:
    raw = case()
    small = prepare(raw, Preprocessing(size=(10, 10)))
    whole = prepare(raw, Preprocessing())
    np.testing.assert_array_equal(
        small.image_CIJK, whole.image_CIJK[:, 15:25, 13:23, :]
    )
    region = np.zeros(raw.label.shape, np.uint8)
    region[:20] = 1
    prepared = prepare(case(region=region), Preprocessing())
    inside = prepared.image_CIJK[:, :20].reshape(2, -1)
    np.testing.assert_allclose(inside.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(inside.std(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize(
    "intensity", ["zscore", "zscore_foreground", "unit", "percentile"]
)
def test_constant_image_becomes_zero(intensity) -> None:
    raw = case(image=np.full((2, 40, 36, 8), 7.0, np.float32))
    assert not prepare(raw, Preprocessing(intensity=intensity)).image_CIJK.any()


def test_rows_and_class_labels_pass() -> None:
    row = Case(
        case_id="r",
        image=np.array([1.0, np.nan], np.float32),
        label=np.array(1),
        spacing_mm=(),
    )
    prepared = prepare(row, Preprocessing(size=(4, 4), spacing_mm=(1.0, 1.0)))
    np.testing.assert_array_equal(prepared.image_CIJK, row.image)
    assert prepared.label_IJK == 1
    assert prepared.geometry is None
    scan = prepare(case(label=np.array(2)), Preprocessing(size=(4, 4)))
    assert scan.label_IJK == 2
    assert scan.label_native_IJK is None
    assert prepare(case(label=None), Preprocessing()).label_IJK is None


def test_input_is_not_changed() -> None:
    raw = case()
    before = raw.image.copy(), raw.label.copy()
    prepared = prepare(raw, Preprocessing(spacing_mm=(1.0, 1.0), size=(20, 20)))
    probabilities = one_hot(prepared.label_IJK)
    copy = probabilities.copy()
    restore(probabilities, prepared)
    np.testing.assert_array_equal(raw.image, before[0])
    np.testing.assert_array_equal(raw.label, before[1])
    np.testing.assert_array_equal(probabilities, copy)


def test_what_was_cropped_away_is_background() -> None:
    """No class bleeds out of the window by interpolation."""
    raw = case(label=np.ones((40, 36, 8), np.uint8))
    prepared = prepare(raw, Preprocessing(spacing_mm=(0.35, 0.4), size=(20, 20)))
    back = restore(one_hot(prepared.label_IJK), prepared)
    expected = np.zeros_like(back)
    expected[15:25, 13:23] = 1
    np.testing.assert_array_equal(back, expected)


def test_wrong_predictions_are_refused() -> None:
    prepared: Prepared = prepare(case(), Preprocessing(size=(20, 20)))
    good = one_hot(prepared.label_IJK)
    with pytest.raises(FedMedError, match="does not fit"):
        restore(good[:, :-1], prepared)
    good[1, 0, 0, 0] = np.nan
    with pytest.raises(FedMedError, match="not finite"):
        restore(good, prepared)


@pytest.mark.parametrize(
    "settings",
    [
        {"spacing_mm": (1.0,)},
        {"spacing_mm": (0.0, 1.0)},
        {"spacing_mm": (float("nan"), 1.0)},
        {"size": (4,)},
        {"size": (0, 4)},
        {"percentiles": (5.0, 5.0)},
        {"percentiles": (-1.0, 5.0)},
        {"intensity": "window"},
        {"intensity": "window", "window": (2.0, 1.0)},
        {"crop": "fit"},
        {"crop": "fit", "size": (4, 4), "spacing_mm": (1.0, 1.0)},
    ],
)
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(ConfigError):
        Preprocessing(**settings)


def test_absurd_spacing_is_refused() -> None:
    with pytest.raises(CaseError, match="too many"):
        prepare(case(), Preprocessing(spacing_mm=(1e-4, 1e-4)))


def test_outside_the_region_nothing_is_to_be_learned() -> None:
    region = np.ones((8, 8, 1), np.uint8)
    region[:4] = 0
    case = Case(
        "a",
        np.random.default_rng(0).random((1, 8, 8, 1), dtype=np.float32),
        np.ones((8, 8, 1), np.uint8),
        (1.0, 1.0, 1.0),
        region=region,
    )
    prepared = prepare(case, Preprocessing())
    assert prepared.label_IJK is not None
    assert np.all(prepared.label_IJK[:4] == UNKNOWN_LABEL)
    assert np.all(prepared.label_IJK[4:] == 1)


@pytest.mark.parametrize(
    ("corner", "size", "expected"),
    [
        ((6, 6), (8, 8), 0.0),
        ((0, 6), (8, 8), 1.0),
        ((2, 6), (8, 8), 0.5),
        ((0, 0), None, 0),
    ],
)
def test_an_organ_outside_the_window_is_seen(corner, size, expected) -> None:
    label = np.zeros((16, 16, 2), np.uint8)
    i, j = corner
    label[i : i + 4, j : j + 4] = 1
    case = Case("a", np.ones((1, 16, 16, 2), np.float32), label, (1.0, 1.0, 3.0))
    prepared = prepare(case, Preprocessing(size=size, intensity="none"))
    assert cut_fraction(prepared) == pytest.approx(expected)
