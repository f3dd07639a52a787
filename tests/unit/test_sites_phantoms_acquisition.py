"""Scanners: every dial does what it says."""

from dataclasses import replace

import numpy as np
import pytest

from sites.phantoms.acquisition import (
    ENDORECTAL_DEPTH_MM,
    acquire,
    box_average,
    endorectal_profile,
    mr_signal,
)
from sites.phantoms.canvas import Body, CoilPlace
from sites.phantoms.dials import Dials
from sites.phantoms.hospitals import BRAIN_SITES, PROSTATE_SITES
from sites.phantoms.space import Grid
from sites.phantoms.tissues import CODE, NAMES, TISSUES, relaxation_ms

GRID = Grid((40, 40, 12), (1.0, 1.0, 3.0))
QUIET = Dials(noise=0.0, gain=1000.0, blur=0.0)


def block(tissue="muscle", coil=None):
    """A body of one tissue without texture."""
    fine = GRID.refined((2, 2, 2))
    return Body(
        fine,
        np.full(fine.size, CODE[tissue], np.uint8),
        np.zeros(fine.size, np.uint8),
        np.zeros(fine.size, np.float32),
        coil,
    )


def scan(body, dials, seed=0):
    patient, scanner = (np.random.default_rng(seed + n) for n in (0, 100))
    image = acquire(body, GRID, dials, patient=patient, scan=scanner)
    assert image.dtype == np.int16
    assert image.shape == GRID.size
    return image.astype(np.float64)


@pytest.mark.parametrize("field_t", [1.5, 3.0, 7.0])
def test_noise_is_relative_at_3_t_and_falls_with_the_field(field_t):
    image = scan(block(), replace(QUIET, noise=0.04, field_t=field_t))
    expected = 0.04 * 3 / field_t
    assert image.std() / image.mean() == pytest.approx(expected, rel=0.05)


def test_more_noise_is_less_signal_to_noise():
    images = [scan(block(), replace(QUIET, noise=n)) for n in (0.01, 0.03, 0.1)]
    ratios = [image.mean() / image.std() for image in images]
    assert ratios[0] > 2 * ratios[1] > 4 * ratios[2]


def test_noise_of_air_is_rayleigh():
    body = block()
    body.tissue[:40] = CODE["air"]
    image = scan(body, replace(QUIET, noise=0.1, gain=4000.0))
    air, muscle = image[:18], image[22:]
    # Rayleigh: mean / std = sqrt(pi / (4 - pi)) (Gudbjartsson and Patz, 1995)
    assert air.mean() / air.std() == pytest.approx(
        np.sqrt(np.pi / (4 - np.pi)), rel=0.03
    )
    sigma = air.mean() / np.sqrt(np.pi / 2)
    assert sigma == pytest.approx(0.1 * muscle.mean(), rel=0.03)


def test_endorectal_coil_is_bright_near_the_rectum():
    place = CoilPlace((0.0, -30.0), 10.0)
    image = scan(block(coil=place), replace(QUIET, coil="endorectal"))
    flat = scan(block(coil=place), replace(QUIET, coil="none"))
    near, middle, far = (image[18:22, j, 4:8].mean() for j in (1, 19, 38))
    assert near > middle > far
    assert near > 2.5 * far
    assert flat.std() == 0


def test_endorectal_profile_halves_at_its_depth():
    place = CoilPlace((0.0, -20.0), 15.0)
    y = -20.0 + 15.0 + np.array([0.0, ENDORECTAL_DEPTH_MM, 2 * ENDORECTAL_DEPTH_MM])
    profile = endorectal_profile(np.zeros(3), y, np.zeros(3), place=place)
    np.testing.assert_allclose(profile, [1, 1 / 2, 1 / 5], rtol=1e-6)


def test_bias_field_shades_smoothly():
    image = scan(block(), replace(QUIET, bias_field=0.2))
    logarithm = np.log(image)
    assert 0.03 < logarithm.std() < 0.5
    assert np.abs(np.diff(logarithm, axis=0)).max() < 0.06
    assert scan(block(), QUIET).std() == 0


def test_gain_is_the_mean_grey_value():
    images = [scan(block(), replace(QUIET, gain=g)) for g in (200.0, 2000.0)]
    assert images[1].mean() / images[0].mean() == pytest.approx(10, rel=0.02)
    assert 200 * 0.7 < images[0].mean() < 200 * 1.4


def test_contrast_bends_the_grey_curve_and_keeps_order():
    body = block()
    body.tissue[:26] = CODE["fat"]
    body.tissue[26:52] = CODE["central_gland"]
    ratios = []
    for contrast in (0.7, 1.0, 1.4):
        image = scan(body, replace(QUIET, contrast=contrast))
        fat, gland, muscle = image[2:10], image[16:24], image[30:]
        assert fat.mean() > gland.mean() > muscle.mean()
        ratios.append(fat.mean() / muscle.mean())
    assert ratios[0] == pytest.approx(ratios[1] ** 0.7, rel=0.05)
    assert ratios[2] == pytest.approx(ratios[1] ** 1.4, rel=0.05)


def test_blur_lowers_an_edge():
    body = block()
    body.tissue[:40] = CODE["fat"]
    sharp, blurred = (scan(body, replace(QUIET, blur=b)) for b in (0.0, 3.0))
    edge = [np.abs(np.diff(image[:, 20, 6])).max() for image in (sharp, blurred)]
    assert edge[1] < 0.5 * edge[0]


def test_thick_voxels_average_their_pieces():
    fine = np.random.default_rng(0).normal(size=(8, 6, 9)).astype(np.float32)
    expected = fine.reshape(4, 2, 3, 2, 3, 3).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(box_average(fine, (4, 3, 3)), expected, rtol=1e-5)
    half = box_average(fine > 0, (4, 3, 3))
    expected = (fine > 0).reshape(4, 2, 3, 2, 3, 3).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(half, expected, rtol=1e-6)


def test_signals_are_those_of_the_equations():
    t1, t2 = (relaxation_ms(name, 3.0) for name in ("t1_ms", "t2_ms"))
    gland = CODE["central_gland"]
    a, b, rho = t1[gland], t2[gland], TISSUES["central_gland"].density
    spin_echo = Dials(modality="t2w", tr_ms=3000.0, te_ms=90.0)
    assert mr_signal(spin_echo, t1_ms=t1, t2_ms=t2)[gland] == pytest.approx(
        rho * (1 - np.exp(-3000 / a)) * np.exp(-90 / b)
    )
    inverted = Dials(modality="t1w", tr_ms=2000.0, te_ms=3.0, ti_ms=900.0)
    assert mr_signal(inverted, t1_ms=t1, t2_ms=t2)[gland] == pytest.approx(
        rho * abs(1 - 2 * np.exp(-900 / a) + np.exp(-2000 / a)) * np.exp(-3 / b)
    )
    balanced = Dials(modality="bssfp", flip_deg=60.0)
    cosine, sine = 0.5, np.sqrt(3) / 2
    assert mr_signal(balanced, t1_ms=t1, t2_ms=t2)[gland] == pytest.approx(
        rho * sine / ((a / b) * (1 - cosine) + 1 + cosine)
    )


def levels(dials):
    t1, t2 = (relaxation_ms(name, dials.field_t) for name in ("t1_ms", "t2_ms"))
    return dict(zip(NAMES, mr_signal(dials, t1_ms=t1, t2_ms=t2), strict=True))


@pytest.mark.parametrize("site", sorted(PROSTATE_SITES))
def test_t2w_looks_as_a_radiologist_expects(site):
    s = levels(PROSTATE_SITES[site].dials)
    assert s["fluid"] > s["peripheral_zone"] > s["central_gland"] > s["stroma"]
    assert s["fat"] > s["central_gland"]
    assert s["central_gland"] > 2 * s["muscle"] > 0
    assert s["peripheral_zone"] > 1.25 * s["prostate_lesion"]
    assert s["muscle"] > s["cortical_bone"]


@pytest.mark.parametrize("site", sorted(BRAIN_SITES))
def test_t1w_looks_as_a_radiologist_expects(site):
    s = levels(BRAIN_SITES[site].dials)
    assert s["scalp"] > s["white_matter"] > s["deep_grey"] > s["grey_matter"]
    assert s["grey_matter"] > 1.5 * s["fluid"]


def test_bssfp_and_spir_look_as_a_radiologist_expects():
    s = levels(Dials(modality="bssfp", field_t=1.5, flip_deg=70.0))
    assert s["blood"] > 2 * s["myocardium"]
    assert s["fat"] > 2 * s["myocardium"]
    s = levels(Dials(modality="t2_spir", field_t=1.5, tr_ms=1600.0, te_ms=70.0))
    assert s["spleen"] > 1.5 * s["liver"]
    assert s["kidney_cortex"] > 1.5 * s["liver"] > 1.5 * s["fat"]


@pytest.mark.parametrize(
    ("tissue", "plain", "enhanced"),
    [
        ("air", -1000, -1000),
        ("fat", -100, -100),
        ("muscle", 50, 60),
        ("liver", 60, 110),
        ("lung", -840, -820),
        ("cortical_bone", 900, 900),
        ("blood", 45, 355),
    ],
)
def test_ct_is_calibrated(tissue, plain, enhanced):
    for agent, expected in ((0.0, plain), (1.0, enhanced)):
        dials = Dials(modality="ct", noise=0.0, gain=1.0, contrast_agent=agent)
        values = [scan(block(tissue), dials, seed).mean() for seed in range(8)]
        assert abs(np.mean(values) - expected) < 10


def test_ct_noise_is_in_hounsfield_units_and_low_voltage_shows_iodine():
    dials = Dials(modality="ct", noise=25.0, gain=1.0)
    assert scan(block("liver"), dials).std() == pytest.approx(25, rel=0.05)
    quiet = replace(dials, noise=0.0)
    at_80 = scan(block("blood"), replace(quiet, tube_kvp=80.0)).mean()
    assert at_80 > scan(block("blood"), quiet).mean() + 150
