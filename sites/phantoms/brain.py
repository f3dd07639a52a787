"""A head: folded cortex, white matter, ventricles and deep nuclei inside a skull."""

from __future__ import annotations

import numpy as np

from sites.phantoms.canvas import Anatomy, Blob, Body, Canvas, Visit, turned
from sites.phantoms.space import Grid, Space, Triple, deform, smooth_noise

WHITE, GREY, CSF = 1, 2, 3


def build(grid: Grid, rng: np.random.Generator, visit: Visit) -> Body:
    """Draw one head.

    Sulci are the zero surfaces of a smooth random field, which are folded sheets; the
    cortex is the rind of fixed thickness about them and under the hull.

    Args:
        grid: Fine grid centred between the thalami, 1 cm above them.
        rng: The patient's generator.
        visit: `lesion_mm` puts white-matter lesions beside the ventricles.

    Returns:
        The body; labels 1 white matter, 2 grey matter, 3 fluid inside the skull.
    """
    draw = rng.uniform(size=8)
    hull = (64 + 6 * draw[0], 80 + 8 * draw[1], 62 + 6 * draw[2])
    radius = (float(hull[0]), float(hull[1]), float(hull[2]))
    space = deform(grid, rng, amplitude_mm=1.8, scale_mm=38, position_mm=2.0)
    folds = smooth_noise(grid, rng, scale_mm=6.8)
    texture = smooth_noise(grid, rng, scale_mm=5.0)
    atrophy = float(draw[3] ** 2)
    lesion_place = rng.uniform(-1, 1, size=(3, 3))
    canvas = Canvas(space, "air")
    _paint_head(canvas, radius)
    _paint_cerebrum(canvas, radius, folds, atrophy)
    _paint_cerebellum(canvas, folds)
    _paint_depth(canvas, atrophy, ventricle=float(draw[4]))
    if visit.lesion_mm > 0:
        _paint_lesions(canvas, lesion_place, visit.lesion_mm)
    return Body(grid, canvas.tissue, canvas.label, texture)


def _paint_head(canvas: Canvas, radius: Triple) -> None:
    hull = Blob((0, 0, 0), radius)
    canvas.blob("muscle", Blob((0, -20, -75), (62, 62, 60)))
    for layer, by_mm in (
        ("skin", 16.0),
        ("scalp", 14.0),
        ("cortical_bone", 9.5),
        ("marrow", 7.5),
        ("cortical_bone", 4.5),
    ):
        canvas.blob(layer, hull.grown(by_mm))
    canvas.mirrored("fluid", Blob((32, radius[1] - 2, -34), (12, 12, 12)))  # eyes
    canvas.blob("fluid", hull.grown(2.6), label=CSF)


def _paint_cerebrum(
    canvas: Canvas, radius: Triple, folds: np.ndarray, atrophy: float
) -> None:
    space = canvas.space
    depth = _depth_mm(space, radius)
    sulcus = np.abs(folds) * np.float32(6.0)  # mm from the sheet: slope about 1/6
    # sheets thin out and close with depth
    open_mm = np.float32(1.1 + 0.9 * atrophy) - depth * np.float32(0.05)
    middle = np.abs(space.x)
    fissure = (middle < 1.6 + 0.8 * atrophy) & ((space.z > 24) | (depth < 30))
    inside = (depth > 0) & (space.z > -38 + 0.12 * space.y)
    to_pia = np.minimum(depth, sulcus - open_mm + np.maximum(depth - 28, 0))
    near_fissure = np.where((space.z > 22) | (depth < 28), middle - 1.6, 99)
    to_pia = np.minimum(to_pia, near_fissure.astype(np.float32))
    canvas.mask("white_matter", inside, label=WHITE)
    canvas.mask("grey_matter", inside & (to_pia < 3.2), label=GREY)
    sulci = (sulcus < open_mm) & (depth < 20)
    canvas.mask("fluid", inside & (sulci | fissure), label=CSF)


def _depth_mm(space: Space, radius: Triple) -> np.ndarray:
    level = Blob((0, 0, 0), radius).level(space.x, space.y, space.z)
    mean = np.float32(sum(radius) / 3)
    return np.asarray((1 - np.sqrt(level)) * mean, np.float32)


def _paint_cerebellum(canvas: Canvas, folds: np.ndarray) -> None:
    space = canvas.space
    if space.grid.axis_mm(2)[0] > -20 + space.reach_mm:
        return
    blob = Blob((0, -42, -52), (48, 30, 20))
    level = blob.level(space.x, space.y, space.z)
    inside = level < 1
    leaves = np.abs(np.sin(space.z * np.float32(0.9) + folds)) < 0.45
    canvas.mask("grey_matter", inside, label=GREY)
    canvas.mask("white_matter", inside & leaves & (level < 0.75), label=WHITE)
    canvas.blob("white_matter", Blob((0, -12, -55), (15, 13, 28)), label=WHITE)  # stem


def _paint_depth(canvas: Canvas, atrophy: float, *, ventricle: float) -> None:
    wide = 4.5 + 3.0 * atrophy + 2.0 * ventricle
    canvas.blob("white_matter", Blob((0, -2, 22), (16, 38, 7)), label=WHITE)  # callosum
    canvas.mirrored(
        "deep_grey", Blob((25, 4, 0), (6.5, 15, 11), turned(-14)), label=GREY
    )
    canvas.mirrored(
        "deep_grey", Blob((12, -12, 2), (8, 13, 10), turned(-25)), label=GREY
    )
    canvas.mirrored("deep_grey", Blob((14, 18, 9), (4.5, 11, 9)), label=GREY)
    canvas.mirrored(
        "fluid", Blob((9, 12, 12), (wide * 0.8, 20, wide), turned(-16)), label=CSF
    )
    canvas.mirrored(
        "fluid", Blob((15, -26, 11), (wide, 19, wide * 1.1), turned(22)), label=CSF
    )
    canvas.blob("fluid", Blob((0, -6, 0), (1.5 + 1.5 * atrophy, 13, 10)), label=CSF)


def _paint_lesions(canvas: Canvas, place: np.ndarray, diameter_mm: float) -> None:
    r = diameter_mm / 2
    for side, (dx, dy, dz) in zip((-1, 1, 1), place.tolist(), strict=True):
        centre = (side * (26 + 4 * dx), 24 * dy, 20 + 6 * dz)
        canvas.blob("white_lesion", Blob(centre, (r, 1.2 * r, r)), label=WHITE)


ANATOMY = Anatomy(
    name="brain",
    labels={0: "background", 1: "white_matter", 2: "grey_matter", 3: "csf"},
    core_mm=((148.0, 184.0, 0.0), 32.0),
    build=build,
    has_lesions=True,
    default_size=(96, 112, 24),
)
