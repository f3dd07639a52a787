"""Metrics against MONAI, SciPy (brute force) and scikit-learn on the same input."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from fedmed.metrics.classification import score_classification
from fedmed.metrics.overlap import dice_coefficient
from fedmed.metrics.surface import surface_distances

# MONAI 1.6 passes its own deprecated argument.
pytestmark = pytest.mark.filterwarnings("ignore:monai.*deprecated:FutureWarning")

SPACING_MM = (0.5, 0.75, 3.0)
SHAPE = (12, 11, 6)


@pytest.fixture(scope="module")
def monai_metrics():
    # Its import warns about its own dependencies, on some versions.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("monai", reason="MONAI is not installed")
        return importlib.import_module("monai.metrics")


def blob(shape, seed):
    smooth = ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(size=shape), 1.5
    )
    return smooth > np.quantile(smooth, 0.7)


def one_voxel(shape, position):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(min(position, length - 1) for length in shape)] = True
    return mask


def pairs(shape):
    rng = np.random.default_rng(0)
    full = np.ones(shape, dtype=bool)
    return {
        "blobs": (blob(shape, 1), blob(shape, 2)),
        "noise": (rng.random(shape) < 0.5, rng.random(shape) < 0.5),
        "sparse": (rng.random(shape) < 0.02, rng.random(shape) < 0.02),
        "one voxel each": (one_voxel(shape, 1), one_voxel(shape, 9)),
        "one voxel and blob": (one_voxel(shape, 1), blob(shape, 2)),
        "full and blob": (full, blob(shape, 3)),
        "full and full": (full, full),
        "blob and itself": (blob(shape, 4), blob(shape, 4)),
        "corner and full": (one_voxel(shape, 0), full),
    }


every_pair = pytest.mark.parametrize("pair", pairs(SHAPE))
in_3d_and_2d = pytest.mark.parametrize("num_axes", [3, 2])


def inputs(pair, num_axes):
    return *pairs(SHAPE[:num_axes])[pair], SPACING_MM[:num_axes]


@every_pair
@in_3d_and_2d
def test_surface_distances_equal_monai(monai_metrics, pair, num_axes):
    prediction, label, spacing_mm = inputs(pair, num_axes)
    ours = surface_distances(prediction, label, spacing_mm=spacing_mm)
    to_monai = [torch.from_numpy(m)[None, None].float() for m in (prediction, label)]
    options = {"include_background": True, "spacing": list(spacing_mm)}
    average = monai_metrics.compute_average_surface_distance
    expected = {
        "assd_mm": average(*to_monai, symmetric=True, **options),
        "asd_mm_pred2gt": average(*to_monai, symmetric=False, **options),
        "asd_mm_gt2pred": average(*to_monai[::-1], symmetric=False, **options),
        "hd95_mm": monai_metrics.compute_hausdorff_distance(
            *to_monai, percentile=95, **options
        ),
    }
    for name, value in expected.items():
        # MONAI computes in float32.
        assert getattr(ours, name) == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


@every_pair
def test_a_singleton_axis_is_monai_in_2d(monai_metrics, pair):
    prediction, label, spacing_mm = inputs(pair, 2)
    ours = surface_distances(
        prediction[..., None], label[..., None], spacing_mm=(*spacing_mm, 3.0)
    )
    value = monai_metrics.compute_average_surface_distance(
        *[torch.from_numpy(m)[None, None].float() for m in (prediction, label)],
        include_background=True,
        symmetric=True,
        spacing=list(spacing_mm),
    )
    assert ours.assd_mm == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


@every_pair
@in_3d_and_2d
def test_surface_distances_equal_brute_force(pair, num_axes):
    prediction, label, spacing_mm = inputs(pair, num_axes)
    ours = surface_distances(prediction, label, spacing_mm=spacing_mm)
    cross = ndimage.generate_binary_structure(num_axes, 1)
    points = []
    for mask in (prediction, label):
        # The neighbourhood's minimum, outside = 0: another way to say erosion.
        inner = ndimage.minimum_filter(
            mask.astype(int), footprint=cross, mode="constant", cval=0
        )
        points.append(np.argwhere(mask & (inner == 0)) * spacing_mm)
    table = cdist(*points)
    p2g, g2p = table.min(axis=1), table.min(axis=0)
    assert ours.asd_mm_pred2gt == pytest.approx(p2g.mean(), abs=1e-12)
    assert ours.asd_mm_gt2pred == pytest.approx(g2p.mean(), abs=1e-12)
    assert ours.assd_mm == pytest.approx(np.concatenate([p2g, g2p]).mean(), abs=1e-12)
    assert ours.hd95_mm == pytest.approx(
        max(np.quantile(p2g, 0.95), np.quantile(g2p, 0.95)), abs=1e-12
    )


@every_pair
def test_dice_equals_monai_and_the_f1_score(monai_metrics, pair):
    prediction, label, _ = inputs(pair, 3)
    ours = dice_coefficient(prediction, label)
    assert ours == pytest.approx(f1_score(label.ravel(), prediction.ravel()))
    value = monai_metrics.compute_dice(
        *[torch.from_numpy(m)[None, None].float() for m in (prediction, label)]
    )
    assert ours == pytest.approx(value.item(), abs=1e-6)


def test_dice_of_empty_masks_equals_monai(monai_metrics):
    full = torch.ones(1, 1, 3, 3, 3)
    for prediction, label in [(full * 0, full), (full * 0, full * 0)]:
        value = monai_metrics.compute_dice(prediction, label, ignore_empty=True).item()
        ours = dice_coefficient(
            *[m[0, 0].numpy().astype(bool) for m in (prediction, label)]
        )
        np.testing.assert_equal(ours, value)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("decimals", [1, 8])  # one decimal: many ties
def test_classification_equals_scikit_learn(num_classes, decimals):
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(0, num_classes, 60)
    logits = rng.normal(size=(60, num_classes)) + np.eye(num_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = np.round(probabilities, decimals)
    probabilities[:, 0] += 1 - probabilities.sum(axis=1)
    ours = score_classification(
        probabilities, labels, class_names={i: str(i) for i in range(num_classes)}
    )
    predicted = probabilities.argmax(axis=1)
    assert ours.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert ours.balanced_accuracy == pytest.approx(
        balanced_accuracy_score(labels, predicted)
    )
    scores = probabilities[:, 1] if num_classes == 2 else probabilities
    expected = roc_auc_score(labels, scores, multi_class="ovr")
    assert ours.roc_auc == pytest.approx(expected)
