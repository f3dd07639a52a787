"""Segmentation metrics against their definitions, written out voxel by voxel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedmed.metrics.case_scores import score_case

SPACING_MM = (0.6, 0.8, 3.0)


def surface_points_mm(mask):
    """List the voxels with a face neighbour outside the mask, in mm."""
    inside = {tuple(index) for index in np.argwhere(mask)}
    axes = [axis for axis in range(3) if mask.shape[axis] > 1]
    points = []
    for voxel in sorted(inside):
        neighbours = [
            tuple(v + step * (a == axis) for a, v in enumerate(voxel))
            for axis, step in itertools.product(axes, (-1, 1))
        ]
        if not all(neighbour in inside for neighbour in neighbours):
            points.append(np.array(voxel) * SPACING_MM)
    return points


def distances_mm(start, goal):
    return [min(float(np.sqrt(((p - q) ** 2).sum())) for q in goal) for p in start]


def percentile_95(values):
    """Interpolate linearly between the order statistics around 0.95 (n - 1)."""
    ordered = sorted(values)
    position = 0.95 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("shape", [(7, 6, 4), (9, 8, 1)])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_scores_follow_their_definitions(shape, density):
    rng = np.random.default_rng(int(10 * density))
    prediction, label = (rng.random((2, *shape)) < density).astype(np.uint8)
    [score] = score_case(
        prediction, label, spacing_mm=SPACING_MM, class_names={0: "-", 1: "organ"}
    )
    p, g = surface_points_mm(prediction), surface_points_mm(label)
    p2g, g2p = distances_mm(p, g), distances_mm(g, p)
    both = int((prediction & label).sum())
    expected = {
        "dice": 2 * both / int(prediction.sum() + label.sum()),
        "asd_mm_pred2gt": sum(p2g) / len(p2g),
        "asd_mm_gt2pred": sum(g2p) / len(g2p),
        "assd_mm": sum(p2g + g2p) / len(p2g + g2p),
        "hd95_mm": max(percentile_95(p2g), percentile_95(g2p)),
        "volume_ml_prediction": int(prediction.sum()) * 0.6 * 0.8 * 3.0 / 1000,
        "volume_ml_label": int(label.sum()) * 0.6 * 0.8 * 3.0 / 1000,
    }
    for name, value in expected.items():
        assert getattr(score, name) == pytest.approx(value, abs=1e-12), name
