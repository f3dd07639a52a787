from __future__ import annotations

import numpy as np
import pytest
import scipy
from scipy.spatial.distance import cdist

from fedmed.metrics import nearest
from fedmed.metrics.nearest import (
    Surface,
    nearest_mm,
    neighbourhood,
    sparse_positions,
)

SPACINGS = [(1.0,), (0.5, 0.7), (0.5, 0.75, 3.0), (1.0, 1.0, 1.0), (4.0, 0.1, 1.0)]


def framed(mask, around):
    return np.pad(mask, [(reach, reach) for reach in around.reach])


def both(spacing, density, seed=0):
    """Two random masks of a shape that fits the voxel size."""
    rng = np.random.default_rng(seed)
    shape = (40,) if len(spacing) == 1 else (17, 14, 9)[: len(spacing)]
    masks = rng.random((2, *shape)) < density
    masks[0][(0,) * len(shape)] = masks[1][(-1,) * len(shape)] = True
    return masks


def by_brute_force(start, goal, spacing):
    return cdist(np.argwhere(start) * spacing, np.argwhere(goal) * spacing).min(axis=1)


@pytest.fixture(params=["as estimated", "walk", "tree", "transform"])
def way(request, monkeypatch):
    """Force each of the ways to find the nearest voxel."""
    costs = {
        "walk": {"_TREE_PER_START": 10**9, "_TRANSFORM_PER_VOXEL": 10**9},
        "tree": {"_TREE_PER_START": 0, "_TREE_PER_GOAL": 0},
        "transform": {"_TRANSFORM_PER_VOXEL": 0},
    }
    for name, value in costs.get(request.param, {}).items():
        monkeypatch.setattr(nearest, name, value)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("density", [0.01, 0.3])
@pytest.mark.parametrize("voxels", [1, 30, 3000])
def test_every_way_finds_the_nearest_voxel(spacing, density, voxels):
    start, goal = both(spacing, density)
    around = neighbourhood(spacing, start.shape, voxels=voxels)
    got = nearest_mm(
        Surface.of(framed(start, around)),
        Surface.of(framed(goal, around)),
        spacing_mm=spacing,
        around=around,
    )
    expected = by_brute_force(start, goal, spacing)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_all_three_ways_are_taken(monkeypatch):
    # Close: the walk. A few far ones: the tree. Many far ones: the transform.
    near, far = np.zeros((2, 40, 40, 12), dtype=bool)
    near[10, 10, :] = True
    far[:, :, 11] = True
    taken = []
    for part, name in (
        (scipy.spatial, "cKDTree"),
        (scipy.ndimage, "distance_transform_edt"),
    ):
        monkeypatch.setattr(part, name, Recorder(getattr(part, name), name, taken))
    around = neighbourhood((1.0, 1.0, 1.0), near.shape, voxels=30)
    ends = [Surface.of(framed(mask, around)) for mask in (near, far)]
    options = {"spacing_mm": (1.0, 1.0, 1.0), "around": around}
    nearest_mm(ends[0], ends[0], **options)
    assert taken == []
    nearest_mm(*ends, **options)
    assert taken == ["cKDTree"]
    nearest_mm(*ends[::-1], **options)
    assert taken == ["cKDTree", "distance_transform_edt"]


class Recorder:
    """The real thing, noting that it was used."""

    def __init__(self, real, name, taken):
        self.real, self.name, self.taken = real, name, taken

    def __call__(self, *args, **options):
        self.taken.append(self.name)
        return self.real(*args, **options)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_neighbourhood_is_a_ball(spacing):
    around = neighbourhood(spacing, (50,) * len(spacing))
    lengths = [distance for distance, _ in around.shells]
    assert lengths == sorted(set(lengths))
    offsets = np.concatenate([shell for _, shell in around.shells])
    grid = np.indices([2 * r + 5 for r in around.reach]).reshape(len(spacing), -1).T
    grid -= np.array(around.reach) + 2
    norms = np.sqrt(((grid * spacing) ** 2).sum(axis=1))
    inside = (norms <= lengths[-1] + 1e-9) & (norms > 0)
    assert {tuple(o) for o in offsets} == {tuple(o) for o in grid[inside]}


def test_a_neighbourhood_ends_at_the_image():
    assert neighbourhood((0.001, 1.0, 1.0), (5, 5, 5)).reach == (4, 1, 1)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 101])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_sparse_positions_are_those_of_numpy(size, density):
    flat = np.random.default_rng(size).random(size) < density
    np.testing.assert_array_equal(sparse_positions(flat), np.flatnonzero(flat))
