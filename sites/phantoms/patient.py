"""One patient's visit to one phantom hospital: from seed to voxels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmed import seeds
from sites.phantoms.acquisition import acquire
from sites.phantoms.annotation import annotate
from sites.phantoms.canvas import Anatomy, Visit
from sites.phantoms.dials import Dials
from sites.phantoms.space import Grid


@dataclass(frozen=True)
class Scan:
    """What the hospital has after the visit.

    Attributes:
        image: int16 (I, J, K), RAS+ order.
        label: uint8 (I, J, K).
        spacing_mm: Voxel size.
        has_lesion: Whether the patient has a lesion.
    """

    image: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]
    has_lesion: bool


@dataclass(frozen=True)
class Request:
    """Which patient, how many voxels.

    Attributes:
        seed: The data set's seed.
        patient: Words that name the patient, e.g. ("prostate", "a", 3).
        scan: Words that name the scan, e.g. ("a", 3).
        size: Matrix.
        fit_organ: Enlarge voxels until the organ fits into the matrix.
    """

    seed: int
    patient: tuple[str | int, ...]
    scan: tuple[str | int, ...]
    size: tuple[int, int, int]
    fit_organ: bool = True


def visit(anatomy: Anatomy, dials: Dials, request: Request) -> Scan:
    """Draw a patient, scan and annotate.

    What belongs to the patient and what belongs to the scan come from different
    seeds: turning a dial leaves the patient as he is.

    Args:
        anatomy: The kind of body.
        dials: The hospital's dials.
        request: Which patient, how many voxels.

    Returns:
        The scan.
    """
    body_rng, tissue_rng, lesion_rng = (
        seeds.numpy_rng(request.seed, "phantom", *request.patient, purpose)
        for purpose in ("body", "tissue", "lesion")
    )
    scan_rng = seeds.numpy_rng(request.seed, "phantom", "scan", *request.scan)
    grid = choose_grid(anatomy, dials, request, rng=scan_rng)
    chance, share = lesion_rng.uniform(size=2)
    has_lesion = bool(chance < dials.prevalence)
    low, high = dials.lesion
    lesion_mm = float(low + (high - low) * share) if has_lesion else 0.0
    state = Visit(balloon=dials.coil == "endorectal", lesion_mm=lesion_mm)
    body = anatomy.build(grid.refined(_pieces(grid)), body_rng, state)
    image = acquire(body, grid, dials, patient=tissue_rng, scan=scan_rng)
    label = annotate(body.label, grid, dials.label_style)
    return Scan(image, label, grid.spacing_mm, has_lesion)


def choose_grid(
    anatomy: Anatomy, dials: Dials, request: Request, *, rng: np.random.Generator
) -> Grid:
    """Draw the patient's voxel size from the hospital's range; let the organ fit.

    Args:
        anatomy: Says how large a field holds the organ.
        dials: The hospital's range of voxel sizes.
        request: The matrix.
        rng: The scan's generator; two draws.

    Returns:
        The scanner's grid, in-plane voxels square, rounded to 1 micrometre.
    """
    draws = rng.uniform(size=2)
    in_plane, through_plane = (
        low + (high - low) * float(u)
        for (low, high), u in zip(dials.resolution_mm, draws, strict=True)
    )
    if request.fit_organ:
        (width, depth, _), height = anatomy.core_mm
        in_plane = max(in_plane, width / request.size[0], depth / request.size[1])
        through_plane = max(through_plane, height / request.size[2])
    a, c = round(in_plane, 3), round(through_plane, 3)
    return Grid(request.size, (a, a, c))


def _pieces(grid: Grid) -> tuple[int, int, int]:
    """Pieces per voxel: two in-plane; through-plane two for slices above 2 mm."""
    if grid.size[2] == 1:
        return (2, 2, 1)
    return (2, 2, 2 if grid.spacing_mm[2] > 2 else 1)
