"""Scores of whole cases against their definitions on the whole volume, with SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from fedmed.case import UNKNOWN_LABEL
from fedmed.metrics.case_scores import score_case

NAMES = {0: "-", 1: "large", 2: "small", 3: "rare", 5: "never"}
DISTANCES = ("asd_mm_pred2gt", "asd_mm_gt2pred", "assd_mm", "hd95_mm")


def blobs(rng, shape):
    """Give label and prediction: thresholds of a smooth field, and of it with noise."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2) * 8
    edges = [0.5, 1.0, 1.6]
    label = np.digitize(field, edges)
    error = ndimage.gaussian_filter(rng.normal(size=shape), 1)
    prediction = np.digitize(field + error, edges)
    prediction[rng.random(shape) < 0.002] = 2  # islands
    return prediction.astype(np.uint8), label.astype(np.uint8)


def surface(mask, known):
    """Erode the whole volume; an axis of one voxel carries no surface."""
    axes = [n for n in mask.shape if n > 1] or [1]
    filled = (mask | ~known).reshape(axes)
    eroded = ndimage.binary_erosion(filled).reshape(mask.shape)
    found = mask & ~eroded
    if not found.any():
        found = mask & ~ndimage.binary_erosion(mask.reshape(axes)).reshape(mask.shape)
    return found


def expected_distances(prediction, label, known, spacing):
    p, g = surface(prediction, known), surface(label, known)
    to_p, to_g = (
        ndimage.distance_transform_edt(~mask, sampling=spacing) for mask in (p, g)
    )
    p2g, g2p = to_g[p], to_p[g]
    return (
        p2g.mean(),
        g2p.mean(),
        np.concatenate([p2g, g2p]).mean(),
        max(np.percentile(p2g, 95), np.percentile(g2p, 95)),
    )


def unknown_parts(kind, rng, label):
    """Make some voxels unknown; give the region."""
    if kind == "slices":
        label[:, :, rng.random(label.shape[2]) < 0.5] = UNKNOWN_LABEL
    if kind == "scattered":
        label[rng.random(label.shape) < 0.1] = UNKNOWN_LABEL
    if kind == "region":
        grid = np.indices(label.shape[:2]) / np.array(label.shape[:2])[:, None, None]
        disc = ((grid - 0.5) ** 2).sum(axis=0) < 0.2
        return np.repeat(disc[:, :, None], label.shape[2], axis=2).astype(np.uint8)
    return None


@pytest.mark.parametrize("kind", ["none", "slices", "scattered", "region"])
@pytest.mark.parametrize("shape", [(30, 25, 12), (40, 33, 1), (1, 20, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_a_case_is_scored_as_its_whole_volume_says(shape, kind, seed):
    rng = np.random.default_rng([seed, *shape])
    prediction, label = blobs(rng, shape)
    region = unknown_parts(kind, rng, label)
    spacing = tuple(rng.uniform(0.3, 4.0, 3))
    scores = score_case(
        prediction, label, spacing_mm=spacing, class_names=NAMES, region_IJK=region
    )
    known = (label != UNKNOWN_LABEL) & (region != 0 if region is not None else True)
    assert [s.class_index for s in scores] == [1, 2, 3, 5]
    diagonal = np.linalg.norm(
        [n * s for n, s in zip(shape, spacing, strict=True) if n > 1]
    )
    for score in scores:
        p, g = ((a == score.class_index) & known for a in (prediction, label))
        if p.any() and g.any():
            expected = expected_distances(p, g, known, spacing)
            dice = 2 * (p & g).sum() / (p.sum() + g.sum())
        elif p.any() or g.any():
            expected, dice = (diagonal,) * 4, 0.0
        else:
            expected, dice = (np.nan,) * 4, np.nan
        got = [getattr(score, name) for name in DISTANCES]
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        np.testing.assert_equal(score.dice, dice)
        voxel_ml = np.prod(spacing) / 1000
        assert score.volume_ml_prediction == pytest.approx(p.sum() * voxel_ml)
        assert score.volume_ml_label == pytest.approx(g.sum() * voxel_ml)
