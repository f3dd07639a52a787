r"""Distance in mm from each voxel of one mask to the nearest voxel of another.

Two surfaces that are worth comparing lie close together, and most of their voxels even
coincide. So the neighbourhood of each voxel is walked in the order of distance, all
voxels at once, until most have met the other surface; what is left is far away and is
looked up in a tree or in a distance transform, whichever is estimated to be cheaper.
All three ways give the distance of one nearest voxel from the same formula,
$\sqrt{\sum_a (\Delta_a s_a)^2}$ with integer $\Delta$, so the choice never shows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # loads its parts when they are first used: half a second

WALKED_VOXELS = 400
"""About so many voxels does a walked neighbourhood hold."""

# Estimated costs, in look-ups of one voxel (about 3 ns). They decide what is computed
# how, and must not depend on the machine. A query of the tree takes 1 us near the goal,
# but 100 us where much of the goal is about as far.
_TREE_PER_GOAL = 70
_TREE_PER_START = 8000
_TRANSFORM_PER_VOXEL = 40


@dataclass(frozen=True)
class Neighbourhood:
    """The voxels around one, in shells of equal distance, the nearest first.

    Attributes:
        reach: Voxels along each axis that it extends to either side.
        shells: Distance in mm and the offsets (voxels, axes) that lie there; the
            centre is left out.
    """

    reach: tuple[int, ...]
    shells: tuple[tuple[float, np.ndarray], ...]


def neighbourhood(
    spacing_mm: Sequence[float], shape: Sequence[int], *, voxels: int = WALKED_VOXELS
) -> Neighbourhood:
    """Give the neighbourhood that is worth walking on a grid.

    Args:
        spacing_mm: Voxel size along each axis.
        shape: Voxels along each axis; nothing lies further off than this.
        voxels: About how many voxels the neighbourhood holds.
    """
    spacing = tuple(float(length) for length in spacing_mm)
    radius_mm = _radius_mm(spacing, voxels)
    reach = tuple(
        max(1, min(int(radius_mm / length), size - 1))
        for length, size in zip(spacing, shape, strict=True)
    )
    return _neighbourhood(spacing, reach, radius_mm)


@dataclass(frozen=True)
class Surface:
    """A few voxels of a grid.

    Attributes:
        mask: bool, C order, not one voxel True within the reach of the neighbourhood
            of an edge.
        positions: Flat positions of the True voxels, rising, at least one.
    """

    mask: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, mask: np.ndarray) -> Surface:
        """List the True voxels of a mask."""
        return cls(mask, sparse_positions(mask.ravel()))


def sparse_positions(flat: np.ndarray) -> np.ndarray:
    """Give the positions of the True among many False, eight being read at once.

    Example:
        >>> sparse_positions(np.arange(20) % 9 == 1)
        array([ 1, 10, 19])
    """
    whole = flat.size // 8 * 8
    words = np.flatnonzero(flat[:whole].view(np.uint64))
    rows, places = np.nonzero(flat[:whole].reshape(-1, 8)[words])
    last = np.flatnonzero(flat[whole:]) + whole
    return np.concatenate([words[rows] * 8 + places, last])


def nearest_mm(
    start: Surface,
    goal: Surface,
    *,
    spacing_mm: Sequence[float],
    around: Neighbourhood,
) -> np.ndarray:
    """Give the distance from each voxel of `start` to the nearest one of `goal`.

    Args:
        start: From where.
        goal: To where, on the same grid.
        spacing_mm: Voxel size along each axis.
        around: Made for this voxel size.

    Returns:
        float64, mm, in the order of `start.positions`.
    """
    flat_goal = goal.mask.ravel()
    distances = np.zeros(start.positions.size)
    rest = np.flatnonzero(~flat_goal.take(start.positions))
    at = start.positions.take(rest)
    strides, spent = _strides(goal.mask.shape), 0
    for distance_mm, offsets in around.shells:
        spent += rest.size * len(offsets)
        # At worst, when nothing is near, the walk costs half as much again.
        if rest.size == 0 or 2 * spent > _cost(rest.size, goal):
            break
        is_near = _any_at(flat_goal, at, offsets @ strides)
        distances[rest[is_near]] = distance_mm
        rest, at = rest[~is_near], at[~is_near]
    if rest.size:
        distances[rest] = _far_mm(at, goal, spacing_mm)
    return distances


def _any_at(flat: np.ndarray, positions: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    found: np.ndarray = flat.take(positions + shifts[0])
    for shift in shifts[1:]:
        found |= flat.take(positions + shift)
    return found


def _cost(num_start: int, goal: Surface) -> int:
    """Estimate what the cheaper of tree and transform costs."""
    return min(_tree_cost(num_start, goal), _TRANSFORM_PER_VOXEL * goal.mask.size)


def _tree_cost(num_start: int, goal: Surface) -> int:
    return _TREE_PER_GOAL * goal.positions.size + _TREE_PER_START * num_start


def _far_mm(
    positions: np.ndarray, goal: Surface, spacing_mm: Sequence[float]
) -> np.ndarray:
    """Give the distance from some voxels (flat positions) to the goal."""
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    shape = goal.mask.shape
    if _tree_cost(positions.size, goal) > _TRANSFORM_PER_VOXEL * goal.mask.size:
        transform = scipy.ndimage.distance_transform_edt(~goal.mask, sampling=spacing)
        far: np.ndarray = transform.ravel()[positions]
        return far
    starts, goals = (
        np.stack(np.unravel_index(flat, shape), axis=1)
        for flat in (positions, goal.positions)
    )
    # Built for one query, so it pays not to balance it.
    tree = scipy.spatial.cKDTree(
        goals * spacing, balanced_tree=False, compact_nodes=False
    )
    nearest = tree.query(starts * spacing)[1]
    return _lengths_mm(starts - goals[nearest], spacing)


def _lengths_mm(
    offsets: np.ndarray, spacing: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Give the length of voxel offsets (n, axes), summed axis by axis."""
    squares = (offsets * np.asarray(spacing, dtype=np.float64)).T ** 2
    lengths: np.ndarray = np.sqrt(np.add.reduce(squares, axis=0))
    return lengths


def _radius_mm(spacing: tuple[float, ...], voxels: int) -> float:
    """Radius of the ball as large as so many voxels; at least one voxel's length."""
    axes = len(spacing)
    unit_ball = math.pi ** (axes / 2) / math.gamma(axes / 2 + 1)
    radius_mm: float = (voxels * math.prod(spacing) / unit_ball) ** (1 / axes)
    return max(radius_mm, min(spacing))


@functools.lru_cache(maxsize=32)
def _neighbourhood(
    spacing: tuple[float, ...], reach: tuple[int, ...], radius_mm: float
) -> Neighbourhood:
    offsets = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))))
    lengths_mm = _lengths_mm(offsets, spacing)
    # An axis is reached by one voxel at least; such voxels may lie outside the ball,
    # and all that are nearer must be in it.
    inside = (lengths_mm <= radius_mm) & (lengths_mm > 0)
    offsets, lengths_mm = offsets[inside], lengths_mm[inside]
    order = np.argsort(lengths_mm, kind="stable")
    values, first = np.unique(lengths_mm[order], return_index=True)
    groups = np.split(offsets[order], first[1:])
    return Neighbourhood(reach, tuple(zip(values.tolist(), groups, strict=True)))


def _strides(shape: Sequence[int]) -> np.ndarray:
    """Steps of a flat position along each axis, in C order."""
    return np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
