"""Two-modality hospitals: the same organs, other people, other looks, other grids."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedmed.study import load_study
from sites import phantom
from sites.options import parse_options
from sites.phantoms.dials import LabelStyle
from sites.phantoms.patient import visit
from sites.phantoms.plan import PhantomOptions, make_plan
from sites.phantoms.presets import PRESETS

ROOT = Path(__file__).parents[2]
STUDIES, DOCUMENT = ROOT / "studies", ROOT / "docs" / "phantom.md"
TWO = {"heart": "heart_mr_ct", "abdomen": "abdomen_mr_ct"}
FOUR = {"heart": "heart_2mr_2ct", "abdomen": "abdomen_2mr_2ct"}
SIZES = {"heart": (64, 64, 16), "abdomen": (80, 64, 16)}
"""Those of the studies."""


def plan_of(preset, **changes):
    options = {"size": SIZES[PRESETS[preset].anatomy], **changes}
    return make_plan(PhantomOptions(preset=preset, **options))


def scan_of(plan, site_id, index, **dials):
    turned = replace(plan.dials[site_id], **dials)
    return visit(plan.anatomy, turned, plan.request(site_id, index))


@pytest.mark.parametrize("preset", sorted(FOUR.values()))
def test_patients_of_every_hospital_have_all_four_structures(preset):
    plan = plan_of(preset)
    for index, site_id in enumerate(plan.dials):
        scan = scan_of(plan, site_id, index)
        counts = np.bincount(scan.label.ravel(), minlength=5)
        assert len(counts) == 5
        assert counts.min() > 100, (site_id, index, counts)
        has_air = scan.image.min() < -700  # lung or air, in Hounsfield units
        assert has_air == site_id.startswith("ct")


def mean_of(scan, value):
    return float(scan.image[scan.label == value].mean())


HEART = {"AA": 1, "LAC": 2, "LVC": 3, "MYO": 4}


@pytest.mark.parametrize("site_id", ["ct", "ct-low", "mr", "mr-3t"])
def test_in_the_heart_blood_is_brighter_than_muscle(site_id):
    plan = plan_of(FOUR["heart"])
    style = LabelStyle(-1.5, 1.0)  # away from the edges
    scan = scan_of(plan, site_id, 0, bias_field=0.0, label_style=style)
    level = {name: mean_of(scan, value) for name, value in HEART.items()}
    for chamber in ("AA", "LAC", "LVC"):
        assert level[chamber] > 2.2 * level["MYO"]
    blood = [level["LAC"], level["LVC"]]
    assert max(blood) < 1.25 * min(blood)
    if site_id.startswith("ct"):
        assert 250 < level["LVC"] < 370  # Hounsfield units
        assert 60 < level["MYO"] < 130


BRIGHTEST_FIRST = {
    "ct": ["kidney", "spleen", "liver"],
    "ct-plain": ["liver", "spleen", "kidney"],
    "mr": ["kidney", "liver"],
    "mr-3t": ["kidney", "spleen", "liver"],
}


@pytest.mark.parametrize("site_id", sorted(BRIGHTEST_FIRST))
def test_in_the_abdomen_organs_are_ordered_as_the_document_says(site_id):
    plan = plan_of(FOUR["abdomen"])
    levels = []
    for index in range(3):  # tissues vary from patient to patient
        scan = scan_of(
            plan,
            site_id,
            index,
            bias_field=0.0,
            prevalence=0.0,
            coil="none",
            label_style=LabelStyle(-4.0, 1.0),
            noise=0.0,
        )
        means = {name: mean_of(scan, v) for name, v in (("liver", 1), ("spleen", 4))}
        kidneys = np.isin(scan.label, (2, 3))
        levels.append({**means, "kidney": float(scan.image[kidneys].mean())})
    order = [
        np.mean([level[name] for level in levels]) for name in BRIGHTEST_FIRST[site_id]
    ]
    assert order == sorted(order, reverse=True)


def largest_overlap(plan):
    """Dice of all structures together, of the most alike two patients."""
    same = {
        "resolution_mm": ((5.0, 5.0), (9.0, 9.0)),
        "label_style": LabelStyle(),
        "prevalence": 0.0,
    }
    labels = [scan_of(plan, site_id, 0, **same).label for site_id in plan.dials]
    return max(
        2 * ((one == other) & (one > 0)).sum() / ((one > 0).sum() + (other > 0).sum())
        for n, one in enumerate(labels)
        for other in labels[:n]
    )


@pytest.mark.parametrize("anatomy", ["heart", "abdomen"])
def test_hospitals_share_no_patient_unless_asked_to(anatomy):
    strangers, same = (
        plan_of(FOUR[anatomy], size=(32, 32, 8), same_patients=flag)
        for flag in (False, True)
    )
    assert largest_overlap(strangers) < 0.92
    assert largest_overlap(same) == 1


@pytest.mark.parametrize("anatomy", ["heart", "abdomen"])
def test_ct_and_mr_are_the_same_hospitals_in_both_cohorts(anatomy):
    size = (32, 32, 8)
    two, four = (plan_of(by[anatomy], size=size) for by in (TWO, FOUR))
    assert list(two.dials) == ["ct", "mr"]
    for site_id in two.dials:
        assert two.dials[site_id] == four.dials[site_id]
        first, second = (scan_of(plan, site_id, 1) for plan in (two, four))
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.label, second.label)


@pytest.mark.parametrize("preset", sorted(FOUR.values()))
def test_every_scanner_differs_from_the_other_of_its_modality(preset):
    hospitals = PRESETS[preset].hospitals
    for kind, other in (
        ("ct", next(s for s in hospitals if s.startswith("ct-"))),
        ("mr", "mr-3t"),
    ):
        one, two = hospitals[kind].dials, hospitals[other].dials
        assert (one.modality == "ct") == (two.modality == "ct") == (kind == "ct")
        for name in ("noise", "resolution_mm", "orientation", "label_style"):
            assert getattr(one, name) != getattr(two, name)


@pytest.mark.parametrize("preset", sorted({*TWO.values(), *FOUR.values()}))
def test_cards_and_files_tell_the_modality_and_grids_differ(preset, tmp_path):
    options = {"preset": preset, "cases_per_site": 1, "size": (48, 48, 8)}
    opened = phantom.open_sites(None, **options, fit_organ=False, cache_dir=tmp_path)
    spacings, orders = set(), {}
    for site in opened:
        is_ct = site.site_id.startswith("ct")
        assert (site.card.modality == "CT") == is_ct
        assert ("MRI" in site.card.modality) == (not is_ct)
        assert site.card.intensity_unit == ("HU" if is_ct else "arbitrary")
        stored = nibabel.load(site.cases[0].files[0])
        orders[site.site_id] = nibabel.aff2axcodes(stored.affine)
        case = site.cases[0].read()
        spacings.add(tuple(round(s, 3) for s in case.spacing_mm))
    assert len(spacings) == len(opened)
    assert orders["ct"] != orders["mr"]
    modality = phantom.card(**options).modality
    assert "CT" in modality
    assert "MRI" in modality


def test_equal_options_give_equal_bytes_in_both_modalities(tmp_path):
    options = {"preset": FOUR["heart"], "cases_per_site": 1, "size": (24, 24, 6)}
    found = []
    for name in "pq":
        phantom.open_sites(None, **options, cache_dir=tmp_path / name)
        files = sorted((tmp_path / name).rglob("*.nii.gz"))
        found.append([path.read_bytes() for path in files])
    assert found[0] == found[1]
    assert len(set(found[0])) == 8


@pytest.mark.parametrize("name", ["ummkd_heart", "ummkd_abdomen"])
def test_the_studies_ask_for_the_fields_of_view_of_the_document(name):
    study = load_study(STUDIES / f"{name}.yaml")
    plan = make_plan(parse_options(PhantomOptions, study.sites.options))
    assert study.preprocess.size == plan.size[:2]
    fields = {}
    for site_id, dials in plan.dials.items():
        width, through = dials.resolution_mm
        fields[site_id] = [round(plan.size[0] * spacing) for spacing in width]
        (core, _, _), height = plan.anatomy.core_mm
        assert min(width) * plan.size[0] >= core  # so that fit_organ changes nothing
        assert min(through) * plan.size[2] >= height
    told = {side: f"{a} to {b} mm" for side, (a, b) in fields.items()}
    line = f"{plan.anatomy.name}: CT {told['ct']}, MR {told['mr']}"
    assert line in DOCUMENT.read_text(encoding="utf-8")
