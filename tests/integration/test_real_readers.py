"""The readers on the real data sets: every case is read.

The expected numbers stand in the README files of the data sets, or are computed here
from the files with nibabel, Pillow and csv, without our readers.
"""

import csv
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fedmed.case import UNKNOWN_LABEL
from sites.catalogue import open_dataset
from sites.check import check_dataset
from sites.splits import SPLITS, split_by_subject

pytestmark = pytest.mark.real_data

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def data_folder(name):
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("FEDMED_DATA", beside)) / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} not found: set FEDMED_DATA to its parent")
    return folder


@pytest.fixture(scope="module")
def spinal():
    return data_folder("spinal_gm_3d")


@pytest.fixture(scope="module")
def fundus():
    return data_folder("fundus_vessels")


@pytest.fixture(scope="module")
def heart():
    return data_folder("heart_uci")


def by_id(name, root, **options):
    return {site.site_id: site for site in open_dataset(name, root, options)[1]}


def test_spinal_is_clean_and_complete(spinal):
    result = check_dataset("spinal_gm", spinal, {})
    assert result.is_clean
    assert {name: fact.num_cases for name, fact in result.facts.items()} == {
        "ceitec": 2, "chum": 1, "juntendo": 1, "milan": 2, "nwu": 1, "ucl": 1,
    }  # fmt: skip
    assert sum(fact.num_subjects for fact in result.facts.values()) == 6
    axes = {name: tuple(fact.orientations) for name, fact in result.facts.items()}
    assert axes.pop("chum") == ("LPS",)
    assert set(axes.values()) == {("LAS",)}
    assert dict(result.facts["nwu"].shapes) == {(1, 384, 210, 17): 1}
    assert set(result.facts["ceitec"].spacings_mm) == {
        (0.7, 0.7, 2.5),
        (0.59, 0.59, 2.5),
    }


def test_spinal_slices_are_unknown_where_nobody_drew(spinal):
    num_drawn = 0
    for site_id, site in by_id("spinal_gm", spinal).items():
        for ref in site.cases:
            label = ref.read().label
            unknown_K = (label == UNKNOWN_LABEL).all(axis=(0, 1))
            drawn_K = ((label == 1) | (label == 2)).any(axis=(0, 1))
            assert not (unknown_K & drawn_K).any()
            assert (unknown_K | drawn_K).all(), "no slice is plain background"
            assert unknown_K.sum() == (6 if site_id == "chum" else 0)
            num_drawn += drawn_K.sum()
    assert num_drawn == 143


def test_spinal_voxels_are_counted_as_in_the_manifest(spinal):
    with (spinal / "manifest.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    opened = by_id("spinal_gm", spinal)
    cases = [ref for site in opened.values() for ref in site.cases]
    assert {ref.case_id for ref in cases} == set(rows)
    for ref in cases:
        label, row = ref.read().label, rows[ref.case_id]
        stray = int(row["gm_outside_cord"])
        assert (label == 2).sum() == int(row["gm_voxels"]) - stray
        assert np.isin(label, (1, 2)).sum() == int(row["cord_voxels"])


def test_spinal_chum_is_turned_to_ras(spinal):
    ref = by_id("spinal_gm", spinal)["chum"].cases[0]
    stored = np.asarray(nib.load(ref.files[0]).dataobj, np.float32)
    np.testing.assert_array_equal(ref.read().image[0], stored[::-1, ::-1, :])


def test_fundus_is_clean_and_complete(fundus):
    result = check_dataset("fundus_vessels", fundus, {})
    assert result.is_clean, "also: no two subjects share an image or a mask"
    facts = result.facts
    assert {name: fact.num_cases for name, fact in facts.items()} == {
        "chasedb1": 28, "fives": 20, "hrf": 20,
    }  # fmt: skip
    assert {name: fact.num_subjects for name, fact in facts.items()} == {
        "chasedb1": 14, "fives": 19, "hrf": 20,
    }  # fmt: skip
    assert {name: tuple(fact.shapes) for name, fact in facts.items()} == {
        "chasedb1": ((3, 500, 480, 1),),
        "fives": ((3, 512, 512, 1),),
        "hrf": ((3, 876, 584, 1),),
    }
    assert all(set(fact.labels) == {0, 1} for fact in facts.values())
    assert not any(fact.spacings_mm for fact in facts.values())


def test_fundus_masks_of_different_subjects_differ(fundus):
    """Vessels are a fingerprint: two eyes overlap little, one eye almost wholly."""
    for site in by_id("fundus_vessels", fundus).values():
        masks = [
            (ref.subject_id, np.asarray(Image.open(ref.files[1])) > 0)
            for ref in site.cases
        ]
        for (one, a), (other, b) in itertools.combinations(masks, 2):
            if one != other:
                assert 2 * (a & b).sum() / (a.sum() + b.sum()) < 0.5, (one, other)


def test_fundus_field_of_view_holds_the_vessels(fundus):
    expected = {"chasedb1": (0.65, 0.70), "fives": (0.74, 0.79), "hrf": (0.82, 0.87)}
    for site_id, site in by_id("fundus_vessels", fundus).items():
        low, high = expected[site_id]
        for ref in site.cases:
            case = ref.read()
            assert low < case.region.mean() < high
            assert case.region[case.label == 1].mean() > 0.98
            assert case.image.max(axis=0)[case.region == 0].mean() < 20


def test_fundus_derived_field_agrees_with_the_drawn_one(fundus):
    """Where a field of view is drawn, deriving it gives the same to 2 %."""
    from sites.fundus_vessels import find_field

    for ref in by_id("fundus_vessels", fundus)["chasedb1"].cases:
        case = ref.read()
        derived = find_field(case.image)
        overlap = (derived & case.region).sum()
        assert 2 * overlap / (derived.sum() + case.region.sum()) > 0.98


def test_heart_is_clean_and_complete(heart):
    result = check_dataset("heart_uci", heart, {})
    assert result.is_clean
    facts = result.facts
    assert {name: fact.num_cases for name, fact in facts.items()} == {
        "cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200,
    }  # fmt: skip
    disease = {name: fact.labels[1] / fact.num_cases for name, fact in facts.items()}
    assert {name: round(100 * share) for name, share in disease.items()} == {
        "cleveland": 46, "hungarian": 36, "switzerland": 93, "va": 74,
    }  # fmt: skip
    assert {name: fact.num_subjects for name, fact in facts.items()} == {
        "cleveland": 303, "hungarian": 293, "switzerland": 123, "va": 199,
    }  # fmt: skip


def test_heart_zeros_are_missing_and_nothing_else_is_lost(heart):
    for site_id, site in by_id("heart_uci", heart, scaling="none").items():
        with (heart / site_id / "data.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        table = np.stack([ref.read().image for ref in site.cases])
        for column, name in ((0, "age"), (2, "trestbps"), (3, "chol"), (7, "oldpeak")):
            text = [row[name] for row in rows]
            if name in ("trestbps", "chol"):
                text = ["" if cell == "0" else cell for cell in text]
            expected = np.array([float(cell or "nan") for cell in text], np.float32)
            np.testing.assert_array_equal(table[:, column], expected)
    chol = {
        site_id: sum(np.isnan(ref.read().image[3]) for ref in site.cases)
        for site_id, site in by_id("heart_uci", heart).items()
    }
    assert chol == {"cleveland": 0, "hungarian": 23, "switzerland": 123, "va": 56}


def test_heart_grades(heart):
    opened = by_id("heart_uci", heart, target="grade")
    assert list(opened) == ["cleveland", "switzerland", "va"]
    grades = [int(ref.read().label) for ref in opened["cleveland"].cases]
    assert np.bincount(grades).tolist() == [164, 55, 36, 35, 13]


@pytest.mark.parametrize("name", ["spinal", "fundus", "heart"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_subject_is_in_two_splits(name, seed, request):
    module = {"spinal": "spinal_gm", "fundus": "fundus_vessels", "heart": "heart_uci"}
    opened = by_id(module[name], request.getfixturevalue(name))
    for site in opened.values():
        splits = split_by_subject(site.cases, SHARES, seed=seed, site_id=site.site_id)
        where = {}
        for split in SPLITS:
            for ref in splits[split]:
                assert where.setdefault(ref.subject_id, split) == split
        assert sum(map(len, splits.values())) == len(site.cases)
        assert splits["train"]


def test_both_eyes_of_each_child_stay_together(fundus):
    site = by_id("fundus_vessels", fundus)["chasedb1"]
    splits = split_by_subject(site.cases, SHARES, seed=0, site_id="chasedb1")
    assert {name: len(splits[name]) for name in SPLITS} == {
        "train": 16, "validation": 6, "test": 6,
    }  # fmt: skip
    for refs in splits.values():
        children = [ref.case_id[:-1] for ref in refs]
        assert all(children.count(child) == 2 for child in children)


def test_data_root_is_found_by_the_usual_name(spinal, monkeypatch):
    monkeypatch.setenv("FEDMED_DATA", str(spinal.parent))
    assert len(by_id("spinal_gm", None)) == 6
