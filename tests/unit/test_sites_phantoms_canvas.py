"""Painting shapes."""

import numpy as np
import pytest

from sites.phantoms.canvas import Blob, Canvas, along, turned
from sites.phantoms.space import Grid, deform
from sites.phantoms.tissues import CODE


@pytest.fixture
def space():
    grid = Grid((30, 28, 12), (2.0, 2.0, 4.0))
    return deform(
        grid, np.random.default_rng(0), amplitude_mm=2.0, scale_mm=25, position_mm=2.0
    )


@pytest.mark.parametrize(
    "blob",
    [
        Blob((3, -4, 2), (12, 8, 10)),
        Blob((3, -4, 2), (20, 5, 10), turned(35)),
        Blob((-6, 4, 0), (5, 7, 22), along((1.0, 0.4, 0.5))),
        Blob((0, 0, 0), (18, 12, np.inf), None, 4),
        Blob((0, 0, 0), (900, 900, 900)),
        Blob((4, 4, 0), (9, 15, np.inf), turned(-20)),
        Blob((0, 6, 0), (np.inf, 9, np.inf)),
    ],
)
def test_painting_in_a_window_misses_nothing(space, blob):
    canvas = Canvas(space, "fat")
    canvas.blob("muscle", blob, label=1)
    parts = np.stack(
        [
            p - c
            for p, c in zip((space.x, space.y, space.z), blob.centre_mm, strict=True)
        ]
    ).astype(np.float64)
    if blob.axes is not None:
        parts = np.einsum("ab,bijk->aijk", blob.axes, parts)
    radii = np.array(blob.radius_mm)[:, None, None, None]
    level = ((parts / radii) ** blob.power).sum(axis=0)
    clear = np.abs(level - 1) > 1e-4
    np.testing.assert_array_equal(canvas.label[clear], (level < 1)[clear])
    painted = canvas.tissue == CODE["muscle"]
    np.testing.assert_array_equal(painted, canvas.label == 1)


def test_what_lies_on_top_takes_the_label(space):
    canvas = Canvas(space, "fat")
    canvas.blob("muscle", Blob((0, 0, 0), (15, 15, 15)), label=1)
    canvas.walled("wall", "gas", Blob((0, -12, 0), (8, 8, 8)), wall_mm=2)
    assert not canvas.label[canvas.tissue == CODE["wall"]].any()
    assert not canvas.label[canvas.tissue == CODE["gas"]].any()
    assert canvas.label.any()


@pytest.mark.parametrize("axes", [turned(30), turned(-50, about="x"), along((1, 2, 3))])
def test_axes_are_a_rotation(axes):
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(axes) == pytest.approx(1, abs=1e-5)


def test_along_points_its_third_axis():
    np.testing.assert_allclose(along((0.0, 3.0, 4.0))[2], [0, 0.6, 0.8], atol=1e-6)
