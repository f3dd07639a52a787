"""A chest about the heart: four labelled structures of cardiac CT and MR.

Labels: 1 ascending aorta (AA), 2 left atrium cavity (LAC), 3 left ventricle cavity
(LVC), 4 myocardium of the left ventricle (MYO).
"""

from __future__ import annotations

from math import inf

import numpy as np

from sites.phantoms.canvas import Anatomy, Blob, Body, Canvas, Visit, along, turned
from sites.phantoms.space import Grid, Triple, deform, smooth_noise

AORTA, ATRIUM, VENTRICLE, MYOCARDIUM = 1, 2, 3, 4
BASE_MM: Triple = (8.0, -8.0, 12.0)
"""Centre of the mitral plane; the origin lies in the left ventricle's wall."""


def build(grid: Grid, rng: np.random.Generator, visit: Visit) -> Body:
    """Draw one chest.

    Args:
        grid: Fine grid centred on the heart.
        rng: The patient's generator.
        visit: Without effect here.

    Returns:
        The body; blood of the left side is "blood", of the right "venous_blood".
    """
    del visit
    draw = rng.uniform(size=8)
    space = deform(grid, rng, amplitude_mm=2.0, scale_mm=34, position_mm=2.5)
    texture = smooth_noise(grid, rng, scale_mm=5.0)
    scale = 0.9 + 0.2 * float(draw[0])
    apex = (-0.72 + 0.1 * draw[1], 0.55 + 0.12 * draw[2], -0.48 + 0.15 * draw[3])
    axes = along((float(apex[0]), float(apex[1]), float(apex[2])))
    canvas = Canvas(space, "air")
    _paint_thorax(canvas)
    _paint_right_heart(canvas, axes, scale)
    _paint_vessels(canvas, scale * (0.9 + 0.2 * float(draw[4])))
    _paint_left_heart(canvas, axes, scale, wall_mm=8.5 + 3.5 * float(draw[5]))
    return Body(grid, canvas.tissue, canvas.label, texture)


def _paint_thorax(canvas: Canvas) -> None:
    canvas.blob("skin", Blob((5, -10, 0), (172, 122, inf), power=4))
    canvas.blob("fat", Blob((5, -10, 0), (169, 119, inf), power=4))
    canvas.blob("muscle", Blob((5, -12, 0), (152, 104, inf), power=2))
    ribs = Blob((5, -12, 0), (140, 96, inf))
    space = canvas.space
    turns = np.sin((space.z - 0.5 * space.y) * np.float32(2 * np.pi / 26)) > 0.35
    canvas.mask("cortical_bone", (ribs.level(space.x, space.y, space.z) < 1) & turns)
    canvas.blob("muscle", ribs.grown(-6))
    for centre_x in (72.0, -72.0):
        lung = Blob((centre_x, -14, 5), (62, 84, inf))
        canvas.blob("lung", lung, keep=lambda _x, y, z: z > -45 - 0.15 * y)
    canvas.blob("fat", Blob((5, 5, 20), (31, 78, inf)))  # mediastinum
    canvas.blob("liver", Blob((45, 0, -85), (90, 75, 50)))
    canvas.blob("cortical_bone", Blob((5, -82, 0), (20, 18, inf)))
    canvas.blob("marrow", Blob((5, -82, 0), (17.5, 15.5, inf)))
    canvas.blob("fluid", Blob((5, -104, 0), (8, 7, inf)))
    canvas.mirrored("muscle", Blob((30, -104, 0), (24, 14, inf)))
    canvas.blob("cortical_bone", Blob((5, 84, 0), (18, 6, inf)))
    canvas.blob("marrow", Blob((5, 84, 0), (16, 4, inf)))


def _paint_right_heart(canvas: Canvas, axes: np.ndarray, scale: float) -> None:
    pericardium = Blob((4, 4, -4), (52 * scale, 45 * scale, 56 * scale), axes)
    canvas.blob("fat", pericardium)
    ventricle = Blob((8, 30 * scale, -10), (25 * scale, 28 * scale, 43 * scale), axes)
    canvas.walled("myocardium", "venous_blood", ventricle, wall_mm=3.0)
    atrium = Blob((44 * scale, 6, 4), (21 * scale, 25 * scale, 27 * scale))
    canvas.walled("myocardium", "venous_blood", atrium, wall_mm=2.0)


def _paint_vessels(canvas: Canvas, scale: float) -> None:
    canvas.walled(
        "wall", "blood", Blob((-14, -52, 0), (12, 12, inf)), wall_mm=1.5
    )  # descending aorta
    canvas.walled(
        "wall", "venous_blood", Blob((36, -4, 90), (9, 10, 75)), wall_mm=1.0
    )  # superior vena cava
    trunk = Blob((-14, 22, 50), (13 * scale, 14 * scale, 40), along((-0.2, -0.3, 1)))
    canvas.walled("wall", "venous_blood", trunk, wall_mm=1.2)


def _paint_left_heart(
    canvas: Canvas, axes: np.ndarray, scale: float, *, wall_mm: float
) -> None:
    apex = axes[2]
    atrium = Blob((14, -30, 20), (30 * scale, 18 * scale, 23 * scale))
    canvas.blob("myocardium", atrium.grown(1.8))
    for side in (1, -1):  # pulmonary veins
        vein = Blob((14.0 + side * 38, -42, 26), (26, 5.5, 6), turned(-18.0 * side))
        canvas.blob("blood", vein)
    canvas.blob("blood", atrium, label=ATRIUM)
    length = 48 * scale
    middle = tuple(
        float(base + 0.42 * length * d) for base, d in zip(BASE_MM, apex, strict=True)
    )
    cavity = Blob(
        (middle[0], middle[1], middle[2]), (22 * scale, 22 * scale, length), axes
    )

    def beyond_base(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        parts = zip((x, y, z), BASE_MM, apex, strict=True)
        along_axis = sum((p - np.float32(b)) * d for p, b, d in parts)
        return np.asarray(along_axis > 0)

    canvas.blob("myocardium", cavity.grown(wall_mm), label=MYOCARDIUM, keep=beyond_base)
    canvas.blob("blood", cavity, label=VENTRICLE, keep=beyond_base)
    root = Blob((14, 12, 46), (15 * scale, 15 * scale, 40), along((0.25, 0.1, 1)))
    canvas.blob("wall", root.grown(1.5), keep=lambda _x, _y, z: z > 12)
    canvas.blob("blood", root, label=AORTA, keep=lambda _x, _y, z: z > 12)


ANATOMY = Anatomy(
    name="heart",
    labels={0: "background", 1: "AA", 2: "LAC", 3: "LVC", 4: "MYO"},
    core_mm=((150.0, 150.0, 0.0), 110.0),
    build=build,
    has_lesions=False,
    default_size=(96, 96, 24),
)
