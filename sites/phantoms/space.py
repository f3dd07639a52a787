"""Where a phantom lives: a voxel grid in millimetres and smooth random fields on it.

Axes are NIfTI's: x grows to the patient's right, y to the front, z to the head, and
the origin is the centre of the organ. Random fields hang on a lattice fixed in
millimetres, so that one patient looks the same on every scanner's grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Number = float | int
Triple = tuple[Number, Number, Number]

LATTICE_POINTS = 20
"""Lattice points per axis; the field repeats after this many times its scale."""


@dataclass(frozen=True)
class Grid:
    """Voxel centres, symmetric about the origin.

    Attributes:
        size: Voxels along I, J, K.
        spacing_mm: Voxel size along I, J, K.
    """

    size: tuple[int, int, int]
    spacing_mm: Triple

    def axis_mm(self, axis: int) -> np.ndarray:
        """Positions of the voxel centres along one axis, float32, mm."""
        steps = np.arange(self.size[axis], dtype=np.float32)
        centred = steps - np.float32((self.size[axis] - 1) / 2)
        return centred * np.float32(self.spacing_mm[axis])

    def refined(self, factors: tuple[int, int, int]) -> Grid:
        """The same field of view with each voxel cut into `factors` pieces."""
        size = tuple(n * f for n, f in zip(self.size, factors, strict=True))
        spacing = tuple(s / f for s, f in zip(self.spacing_mm, factors, strict=True))
        return Grid((size[0], size[1], size[2]), (spacing[0], spacing[1], spacing[2]))

    @property
    def field_mm(self) -> Triple:
        """Field of view along I, J, K."""
        i, j, k = (n * s for n, s in zip(self.size, self.spacing_mm, strict=True))
        return (i, j, k)


@dataclass(frozen=True)
class Space:
    """A grid seen through a patient's deformation.

    Attributes:
        grid: The undeformed grid.
        x: float32 (I, J, K): anatomical position of each voxel, mm; `y`, `z` alike.
        reach_mm: The deformation moves no voxel further than this.
    """

    grid: Grid
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    reach_mm: Number

    def window(self, centre_mm: Triple, radius_mm: Triple) -> tuple[slice, ...]:
        """Slices of the grid that can hold points within a box about a centre."""
        slices = []
        for axis in range(3):
            positions = self.grid.axis_mm(axis)
            reach = radius_mm[axis] + self.reach_mm
            low = int(np.searchsorted(positions, centre_mm[axis] - reach))
            high = int(np.searchsorted(positions, centre_mm[axis] + reach, "right"))
            slices.append(slice(low, high))
        return tuple(slices)


def smooth_noise(
    grid: Grid, rng: np.random.Generator, *, scale_mm: Number
) -> np.ndarray:
    """Give a smooth random field of mean 0 and standard deviation about 1.

    A cubic B-spline over normal deviates on a lattice of pitch `scale_mm`. The draw
    does not depend on the grid.

    Args:
        grid: Where to evaluate.
        rng: Source of the deviates; always `LATTICE_POINTS` ** 3 of them.
        scale_mm: Lattice pitch; structures are about twice as large.

    Returns:
        float32 (I, J, K).
    """
    shape = (LATTICE_POINTS,) * 3
    field = rng.standard_normal(shape, dtype=np.float32)
    weights = [_spline_weights(grid.axis_mm(axis) / scale_mm) for axis in range(3)]
    field = field @ weights[2].T
    field = weights[1] @ field
    field = np.tensordot(weights[0], field, axes=1)
    power = np.prod([np.mean(np.sum(w * w, axis=1)) for w in weights])
    return np.asarray(field / np.float32(np.sqrt(power)), dtype=np.float32)


def _spline_weights(position: np.ndarray) -> np.ndarray:
    base = np.floor(position)
    t = position - base
    pieces = (
        (1 - t) ** 3,
        3 * t**3 - 6 * t**2 + 4,
        -3 * t**3 + 3 * t**2 + 3 * t + 1,
        t**3,
    )
    weights = np.zeros((len(position), LATTICE_POINTS), dtype=np.float32)
    rows = np.arange(len(position))
    for offset, piece in enumerate(pieces):
        columns = (base.astype(np.int64) + offset - 1) % LATTICE_POINTS
        weights[rows, columns] += piece / 6
    return weights


def deform(
    grid: Grid,
    rng: np.random.Generator,
    *,
    amplitude_mm: Number,
    scale_mm: Number,
    position_mm: Number,
) -> Space:
    """Draw a patient's smooth deformation and shift of the whole body.

    Args:
        grid: The grid to deform.
        rng: The patient's generator.
        amplitude_mm: Standard deviation of the displacement; keep it below a quarter
            of `scale_mm` or the body folds over itself.
        scale_mm: Distance over which the displacement changes.
        position_mm: Standard deviation of the rigid shift.

    Returns:
        The deformed space.
    """
    shift = np.clip(rng.standard_normal(3), -2, 2).astype(np.float32) * position_mm
    coordinates = []
    for axis in range(3):
        noise = smooth_noise(grid, rng, scale_mm=scale_mm)
        noise = np.clip(noise, -2.5, 2.5) * np.float32(amplitude_mm)
        shape = [1, 1, 1]
        shape[axis] = -1
        axis_mm = grid.axis_mm(axis).reshape(shape) - shift[axis]
        coordinates.append(axis_mm + noise)
    reach_mm = 2.5 * amplitude_mm + 2 * position_mm
    return Space(grid, coordinates[0], coordinates[1], coordinates[2], reach_mm)
