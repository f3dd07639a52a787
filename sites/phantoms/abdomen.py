"""An upper abdomen: liver, kidneys, spleen and what surrounds them.

Labels: 1 liver, 2 right kidney, 3 left kidney, 4 spleen; the patient's right is +x.
"""

from __future__ import annotations

from math import inf

import numpy as np

from sites.phantoms.canvas import Anatomy, Blob, Body, Canvas, Visit, along, turned
from sites.phantoms.space import Grid, deform, smooth_noise

LIVER, RIGHT_KIDNEY, LEFT_KIDNEY, SPLEEN = 1, 2, 3, 4


def build(grid: Grid, rng: np.random.Generator, visit: Visit) -> Body:
    """Draw one abdomen.

    Args:
        grid: Fine grid centred on the spine's front edge at the kidneys' upper poles.
        rng: The patient's generator.
        visit: `lesion_mm` puts one lesion into the liver (it stays labelled liver).

    Returns:
        The body.
    """
    draw = rng.uniform(size=8)
    girth = 0.92 + 0.2 * float(draw[0])
    space = deform(grid, rng, amplitude_mm=4.0, scale_mm=48, position_mm=4.0)
    texture = smooth_noise(grid, rng, scale_mm=6.0)
    vessels = smooth_noise(grid, rng, scale_mm=16.0)
    lesion_place = rng.uniform(-1, 1, size=3)
    canvas = Canvas(space, "air")
    _paint_trunk(canvas, girth, fat_mm=10 + 18 * float(draw[1]))
    _paint_bowel(canvas, vessels)
    _paint_back(canvas)
    _paint_liver(canvas, 0.92 + 0.16 * float(draw[2]), vessels)
    _paint_spleen(canvas, 0.85 + 0.35 * float(draw[3]))
    if visit.lesion_mm > 0:
        _paint_lesion(canvas, lesion_place, visit.lesion_mm)
    size = 0.9 + 0.2 * float(draw[4])
    _paint_kidney(canvas, side=1, size=size, label=RIGHT_KIDNEY)
    _paint_kidney(canvas, side=-1, size=size * 1.03, label=LEFT_KIDNEY)
    return Body(grid, canvas.tissue, canvas.label, texture)


def _paint_trunk(canvas: Canvas, girth: float, *, fat_mm: float) -> None:
    trunk = Blob((0, 8, 0), (158 * girth, 108 * girth, inf), power=2)
    canvas.blob("skin", trunk)
    canvas.blob("fat", trunk.grown(-2.5))
    wall = trunk.grown(-fat_mm)
    canvas.blob("muscle", wall)
    space = canvas.space
    level = wall.grown(-4).level(space.x, space.y, space.z)
    turns = np.sin((space.z + 0.6 * space.y) * np.float32(2 * np.pi / 30)) > 0.5
    canvas.mask("cortical_bone", (level < 1) & (level > 0.9) & turns & (space.z > -20))
    canvas.blob("fat", wall.grown(-11))
    for side in (-1, 1):
        dome = Blob((side * 72.0, -5, 150), (66, 84, 92))
        canvas.blob("lung", dome)


def _paint_bowel(canvas: Canvas, noise: np.ndarray) -> None:
    space = canvas.space
    region = Blob((0, 45, -60), (105, 48, 80)).level(space.x, space.y, space.z) < 1
    canvas.mask("bowel", region & (noise > 0.1))
    canvas.mask("gas", region & (noise > 1.5) & (space.y > 48))
    stomach = Blob((-58, 40, 48), (40, 30, 42), turned(-25))
    canvas.walled("wall", "stool", stomach, wall_mm=4)
    canvas.blob("gas", stomach.grown(-4), keep=lambda _x, y, _z: y > 58)
    canvas.blob("bowel", Blob((-5, 22, 12), (52, 10, 11), turned(-10)))  # pancreas


def _paint_back(canvas: Canvas) -> None:
    canvas.blob("cortical_bone", Blob((0, -38, 0), (23, 18, inf)))
    canvas.blob("marrow", Blob((0, -38, 0), (20.5, 15.5, inf)))
    canvas.blob("cortical_bone", Blob((0, -66, 0), (10, 22, inf)))
    canvas.blob("fluid", Blob((0, -60, 0), (8, 7, inf)))
    canvas.mirrored("muscle", Blob((34, -72, 0), (26, 18, inf)))
    canvas.mirrored("muscle", Blob((32, -34, -60), (14, 18, 90)))
    canvas.walled(
        "wall", "portal_artery", Blob((-10, -10, 0), (10, 10, inf)), wall_mm=1.5
    )
    canvas.walled("wall", "portal_vein", Blob((20, -8, 0), (12, 10, inf)), wall_mm=1.0)


def _paint_liver(canvas: Canvas, size: float, vessels: np.ndarray) -> None:
    right = Blob((72, 8, 30), (58 * size, 74 * size, 82 * size), turned(12))
    left = Blob((5, 44, 52), (72 * size, 26 * size, 34 * size), turned(12))
    for lobe in (right, left):
        canvas.blob("liver", lobe, label=LIVER)
    space = canvas.space
    near_zero = (np.abs(vessels) < 0.09) & (np.abs(space.z - 40) < 40)
    inside = (canvas.label == LIVER) & near_zero
    core = right.grown(-16).level(space.x, space.y, space.z) < 1
    canvas.mask("portal_vein", inside & core, label=LIVER)
    canvas.walled("wall", "fluid", Blob((58, 52, -8), (13, 15, 24)), wall_mm=1.5)


def _paint_spleen(canvas: Canvas, size: float) -> None:
    spleen = Blob((-94, -32, 42), (19 * size, 42 * size, 44 * size), turned(-28))
    canvas.blob("spleen", spleen, label=SPLEEN)


def _paint_kidney(canvas: Canvas, *, side: int, size: float, label: int) -> None:
    low = -22.0 if side > 0 else -12.0
    centre = (side * 62.0, -38.0, low)
    axes = along((-side * 0.22, 0.12, 1.0))
    outer = Blob(centre, (27 * size, 25 * size, 54 * size), axes)
    canvas.blob("fat", outer.grown(7))
    canvas.blob("kidney_cortex", outer, label=label)
    canvas.blob("kidney_medulla", outer.grown(-7), label=label)
    hilum = Blob(
        (centre[0] - side * 17 * size, centre[1] + 6, centre[2]),
        (15 * size, 8 * size, 20 * size),
    )
    canvas.blob("fat", hilum)
    canvas.blob("fluid", hilum.grown(-5))


def _paint_lesion(canvas: Canvas, place: np.ndarray, diameter_mm: float) -> None:
    dx, dy, dz = place.tolist()
    centre = (75 + 22 * dx, 8 + 30 * dy, 38 + 25 * dz)
    r = diameter_mm / 2
    canvas.blob("liver_lesion", Blob(centre, (r, r, r)), label=LIVER)


ANATOMY = Anatomy(
    name="abdomen",
    labels={0: "background", 1: "liver", 2: "r_kidney", 3: "l_kidney", 4: "spleen"},
    core_mm=((330.0, 240.0, 0.0), 150.0),
    build=build,
    has_lesions=True,
    default_size=(96, 96, 24),
)
