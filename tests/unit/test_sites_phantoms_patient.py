"""Patients: alike in distribution, different as persons, untouched by dials."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from sites.phantoms.dials import Dials, LabelStyle
from sites.phantoms.patient import Request, choose_grid, visit
from sites.phantoms.plan import PhantomOptions, make_plan
from sites.phantoms.presets import ANATOMIES, PRESETS

SIZES = {
    "prostate": (40, 40, 10),
    "brain": (48, 56, 8),
    "heart": (40, 40, 12),
    "abdomen": (48, 40, 12),
    "chest": (32, 32, 1),
}


def request(anatomy, index, **changes):
    asked = Request(0, (anatomy, "x", index), ("x", index), SIZES[anatomy])
    return replace(asked, **changes)


def first_dials(anatomy):
    preset = next(p for p in PRESETS.values() if p.anatomy == anatomy)
    return next(iter(preset.hospitals.values())).dials


@pytest.mark.parametrize("name", sorted(ANATOMIES))
def test_every_organ_is_there_and_patients_differ(name):
    anatomy, dials = ANATOMIES[name], first_dials(name)
    scans = [visit(anatomy, dials, request(name, n)) for n in range(3)]
    for scan in scans:
        assert scan.image.shape == scan.label.shape == SIZES[name]
        assert scan.image.dtype == np.int16
        assert scan.label.dtype == np.uint8
        assert set(np.unique(scan.label)) == set(anatomy.labels)
    assert (scans[0].label != scans[1].label).mean() > 0.005
    volumes = [(scan.label > 0).sum() * np.prod(scan.spacing_mm) for scan in scans]
    assert max(volumes) > 1.02 * min(volumes)


@pytest.mark.parametrize("name", ["prostate", "heart", "abdomen"])
def test_organs_are_in_one_piece_and_on_their_side(name):
    scan = visit(ANATOMIES[name], first_dials(name), request(name, 1))
    for value in ANATOMIES[name].labels:
        if value == 0:
            continue
        _, count = ndimage.label(scan.label == value)
        sizes = ndimage.sum_labels(scan.label == value, _, range(1, count + 1))
        assert sizes.max() > 0.9 * sizes.sum()
    if name == "abdomen":
        right = [ndimage.center_of_mass(scan.label == v)[0] for v in (1, 2, 3, 4)]
        assert min(right[:2]) > SIZES[name][0] / 2 > max(right[2:])


def test_dials_of_the_scanner_leave_the_patient_alone():
    anatomy = ANATOMIES["prostate"]
    dials = Dials(resolution_mm=((0.8, 0.8), (3.0, 3.0)))
    truth = visit(anatomy, dials, request("prostate", 0)).label
    for change in (
        {"noise": 0.2},
        {"field_t": 1.5},
        {"bias_field": 0.3},
        {"coil": "surface"},
        {"gain": 900.0},
        {"contrast": 1.4},
        {"te_ms": 140.0},
        {"blur": 2.0},
        {"prevalence": 1.0},
    ):
        scan = visit(anatomy, replace(dials, **change), request("prostate", 0))
        np.testing.assert_array_equal(scan.label, truth)


def test_a_patient_is_the_same_on_another_grid():
    anatomy = ANATOMIES["prostate"]
    volumes = []
    for in_plane, size in ((1.6, (40, 40, 10)), (0.8, (80, 80, 20))):
        dials = Dials(resolution_mm=((in_plane,) * 2, (4.8 * in_plane / 1.6,) * 2))
        scan = visit(anatomy, dials, request("prostate", 2, size=size))
        volumes.append((scan.label > 0).sum() * np.prod(scan.spacing_mm))
    assert volumes[0] == pytest.approx(volumes[1], rel=0.03)


def test_hospitals_share_the_distribution_of_anatomy():
    plan = make_plan(PhantomOptions(preset="prostate_af", size=(32, 32, 10)))
    volumes_ml = {}
    for site_id in ("a", "d"):
        dials = replace(plan.dials[site_id], label_style=LabelStyle())
        scans = [
            visit(plan.anatomy, dials, plan.request(site_id, n)) for n in range(16)
        ]
        volumes_ml[site_id] = np.array(
            [(s.label > 0).sum() * np.prod(s.spacing_mm) / 1000 for s in scans]
        )
    a, d = volumes_ml["a"], volumes_ml["d"]
    error = np.sqrt((a.var(ddof=1) + d.var(ddof=1)) / 16)
    assert abs(a.mean() - d.mean()) < 3 * error
    assert 25 < a.mean() < 70  # ml, men who are sent to prostate MRI
    assert a.std() > 4


def test_a_balloon_squeezes_but_hardly_shrinks_the_gland():
    anatomy = ANATOMIES["prostate"]
    extents, volumes = [], []
    for coil in ("none", "endorectal"):
        dials = Dials(coil=coil, resolution_mm=((1.0, 1.0), (4.0, 4.0)))
        scan = visit(anatomy, dials, request("prostate", 1, size=(72, 72, 12)))
        where = np.argwhere(scan.label)
        extents.append(np.ptp(where, axis=0) + 1)
        volumes.append(len(where))
    assert extents[1][1] < extents[0][1]
    assert 0.75 < volumes[1] / volumes[0] < 1.1


def test_resolution_reaches_the_grid_unless_the_organ_would_be_cut():
    anatomy, rng = ANATOMIES["prostate"], np.random.default_rng(0)
    dials = Dials(resolution_mm=((0.4, 0.5), (3.0, 3.0)))
    large = request("prostate", 0, size=(160, 160, 16))
    grid = choose_grid(anatomy, dials, large, rng=rng)
    assert 0.4 <= grid.spacing_mm[0] == grid.spacing_mm[1] <= 0.5
    assert grid.spacing_mm[2] == 3.0
    small = request("prostate", 0, size=(48, 48, 16))
    grid = choose_grid(anatomy, dials, small, rng=rng)
    assert grid.spacing_mm == (1.25, 1.25, 3.0)  # 60 mm / 48
    literal = replace(small, fit_organ=False)
    grid = choose_grid(anatomy, dials, literal, rng=rng)
    assert 0.4 <= grid.spacing_mm[0] <= 0.5


def test_prevalence_is_the_share_of_patients_with_a_lesion():
    dials = first_dials("chest")
    for prevalence in (0.0, 0.3):
        turned = replace(dials, prevalence=prevalence)
        scans = [
            visit(ANATOMIES["chest"], turned, request("chest", n)) for n in range(40)
        ]
        share = np.mean([scan.has_lesion for scan in scans])
        assert abs(share - prevalence) <= 3 * np.sqrt(
            prevalence * (1 - prevalence) / 40
        )


@pytest.mark.parametrize(
    ("name", "darker"),
    [("prostate", True), ("chest", False), ("abdomen", True), ("brain", True)],
)
def test_a_lesion_shows_inside_the_organ(name, darker):
    anatomy = ANATOMIES[name]
    preset = next(p for p in PRESETS.values() if p.anatomy == name)
    dials = replace(preset.hospitals[min(preset.hospitals)].dials, noise=0.0)
    well, ill = (
        visit(
            anatomy, replace(dials, prevalence=p, lesion=(14.0, 14.0)), request(name, 3)
        )
        for p in (0.0, 1.0)
    )
    change = ill.image.astype(float) - well.image
    changed = np.abs(change) > 0.3 * np.abs(change).max()
    assert changed.any()
    assert change[changed].mean() * (-1 if darker else 1) > 0
