"""A man's pelvis about the prostate: zones, bladder, rectum, muscle, bone, fat.

Label 1 is the whole gland (peripheral zone, central gland and capsule), as the
prostate sets of the literature are used after merging their zones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from sites.phantoms.canvas import Anatomy, Blob, Body, Canvas, CoilPlace, Visit, turned
from sites.phantoms.space import Grid, Triple, deform, smooth_noise


@dataclass(frozen=True)
class _Gland:
    """One man's measures, mm; radii are half the diameters."""

    radius: Triple
    central: float
    bladder: float
    rectum: float
    balloon: float
    has_gas: bool
    hip: float


def _measure(rng: np.random.Generator, visit: Visit) -> _Gland:
    draw = rng.uniform(size=12)
    width, depth, height = (
        low + (high - low) * u
        for (low, high), u in zip(
            ((21.0, 27.0), (14.5, 19.5), (17.0, 22.0)), draw[:3], strict=True
        )
    )
    enlargement = 0.92 + 0.22 * draw[3] ** 2
    squeeze = 0.84 if visit.balloon else 1.0
    radius = (width * enlargement / np.sqrt(squeeze), depth * enlargement * squeeze)
    return _Gland(
        radius=(float(radius[0]), float(radius[1]), float(height * enlargement)),
        central=float(0.58 + 0.2 * draw[3] + 0.05 * draw[4]),
        bladder=float(22 + 16 * draw[5]),
        rectum=float(9.5 + 5 * draw[6]),
        balloon=float(17 + 3 * draw[7]),
        has_gas=bool(draw[8] < 0.4),
        hip=float(86 + 8 * draw[9]),
    )


def build(grid: Grid, rng: np.random.Generator, visit: Visit) -> Body:
    """Draw one man and paint his pelvis.

    Args:
        grid: Fine grid centred on the gland.
        rng: The patient's generator; the draw does not depend on grid or visit.
        visit: Whether a balloon distends the rectum; the lesion's diameter.

    Returns:
        The body, with the place of a possible endorectal coil.
    """
    gland = _measure(rng, visit)
    space = deform(grid, rng, amplitude_mm=1.6, scale_mm=26, position_mm=1.2)
    texture = smooth_noise(grid, rng, scale_mm=2.6)
    lesion_place = rng.uniform(-1, 1, size=3)
    canvas = Canvas(space, "air")
    _paint_pelvis(canvas, gland)
    _paint_bladder(canvas, gland)
    _paint_gland(canvas, gland)
    if visit.lesion_mm > 0:
        _paint_lesion(canvas, gland, lesion_place, visit.lesion_mm)
    coil = _paint_rectum(canvas, gland, visit)
    return Body(grid, canvas.tissue, canvas.label, texture, coil)


def _paint_pelvis(canvas: Canvas, gland: _Gland) -> None:
    hip = gland.hip
    canvas.blob("skin", Blob((0, -5, 0), (185, 118, inf), power=4))
    canvas.blob("fat", Blob((0, -5, 0), (182, 115, inf), power=4))
    gluteus = Blob((95, -78, 0), (78, 32, inf), turned(-22))
    canvas.mirrored("muscle", gluteus)
    canvas.mirrored("muscle", Blob((hip - 15, 60, 0), (48, 20, inf), turned(20)))
    canvas.mirrored("muscle", Blob((56, 4, 0), (12, 40, 60), turned(8)))  # obturator
    canvas.mirrored("muscle", Blob((30, -22, -6), (4, 24, 34), turned(14)))  # levator
    bones = (
        Blob((hip, 8, 12), (24, 24, 26)),
        Blob((60, -20, -5), (11, 20, 40), turned(20)),
        Blob((21, 45, -8), (20, 9, 20), turned(-24)),
        Blob((hip + 30, 0, -10), (18, 20, 30)),
    )
    for bone in bones:
        canvas.mirrored("cortical_bone", bone)
        canvas.mirrored("marrow", bone.grown(-2.2))
    canvas.blob("cortical_bone", Blob((0, -88, 10), (22, 7, 40)))
    canvas.blob("marrow", Blob((0, -88, 10), (20, 5, 38)))


def _paint_bladder(canvas: Canvas, gland: _Gland) -> None:
    top = gland.radius[2] + 0.72 * gland.bladder
    bladder = Blob((0, 10, top), (1.25 * gland.bladder, gland.bladder, gland.bladder))
    for side in (-1, 1):
        vesicle = Blob(
            (side * 14, -15.0, gland.radius[2] + 2), (14, 5, 6.5), turned(-18.0 * side)
        )
        canvas.blob("stroma", vesicle.grown(0.8))
        canvas.blob("vesicle", vesicle)
    canvas.walled("stroma", "fluid", bladder, wall_mm=3.0)


def _paint_gland(canvas: Canvas, gland: _Gland) -> None:
    a, b, c = gland.radius
    whole = Blob((0, 0, 0), gland.radius)
    canvas.blob("venous_blood", Blob((0, b - 1, -3), (0.7 * a, 5, 0.7 * c)))  # plexus
    canvas.blob("stroma", whole.grown(0.2), label=1)  # capsule
    canvas.blob("peripheral_zone", whole.grown(-0.45), label=1)
    f = gland.central
    inner = Blob((0, 0.24 * b, 0.2 * c), (1.02 * f * a, 0.92 * f * b, 0.92 * f * c))
    canvas.blob("stroma", inner.grown(0.7), label=1)  # surgical capsule
    for side in (-1, 1):
        lobe = Blob(
            (side * 0.42 * f * a, 0.24 * b, 0.2 * c),
            (0.62 * f * a, 0.88 * f * b, 0.88 * f * c),
        )
        canvas.blob("central_gland", lobe, label=1)
    front = Blob((0, 0.86 * b, 0.1 * c), (0.6 * a, 0.24 * b, 0.72 * c))
    surface = whole.grown(0.2)
    canvas.blob(
        "stroma", front, label=1, keep=lambda x, y, z: surface.level(x, y, z) < 1
    )
    urethra = Blob((0, 0.05 * b, -0.15 * c), (1.8, 1.5, 0.7 * c))
    canvas.blob("vesicle", urethra, label=1)


def _paint_lesion(
    canvas: Canvas, gland: _Gland, place: np.ndarray, diameter_mm: float
) -> None:
    a, b, c = gland.radius
    side = 1.0 if place[0] > 0 else -1.0
    centre = (side * (0.45 + 0.15 * place[1]) * a, -0.55 * b, 0.35 * place[2] * c)
    r = diameter_mm / 2
    whole = Blob((0, 0, 0), gland.radius)
    canvas.blob(
        "prostate_lesion",
        Blob((float(centre[0]), float(centre[1]), float(centre[2])), (r, 0.8 * r, r)),
        label=1,
        keep=lambda x, y, z: whole.level(x, y, z) < 1,
    )


def _paint_rectum(canvas: Canvas, gland: _Gland, visit: Visit) -> CoilPlace:
    b = gland.radius[1]
    if visit.balloon:
        r = gland.balloon
        y = -(b + 0.88 * r) + 2.0  # presses into the gland
        canvas.walled(
            "wall", "perfluorocarbon", Blob((0, y, 0), (1.12 * r, r, 60)), wall_mm=2.0
        )
        canvas.blob("stroma", Blob((0, y + 0.25 * r, 0), (2.5, 2.5, 36)))  # shaft
        return CoilPlace((0.0, y), r)
    r = gland.rectum
    y = -(b + r) - 1.5
    content = "gas" if gland.has_gas else "stool"
    canvas.walled("wall", content, Blob((0, y, 0), (1.25 * r, r, inf)), wall_mm=3.2)
    return CoilPlace((0.0, y), r)


ANATOMY = Anatomy(
    name="prostate",
    labels={0: "background", 1: "prostate"},
    core_mm=((60.0, 60.0, 0.0), 36.0),
    build=build,
    has_lesions=True,
    default_size=(96, 96, 16),
)
