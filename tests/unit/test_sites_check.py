import shutil

import numpy as np
import pytest

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import DataError
from sites import folder, heart_uci, spinal_gm
from sites.check import check_dataset
from sites.miniature import write_nifti_case


def test_what_is_in_a_clean_data_set(tmp_path):
    spinal_gm.write_miniature(tmp_path, seed=0)
    result = check_dataset("spinal_gm", tmp_path, {})
    assert result.is_clean
    assert (result.sites, result.cases) == (6, 8)
    chum = result.facts["chum"]
    assert dict(chum.shapes) == {(1, 12, 10, 6): 1}
    assert dict(chum.spacings_mm) == {(0.5, 0.5, 3.0): 1}
    assert dict(chum.orientations) == {"LPS": 1}
    assert set(chum.labels) == {0, 1, 2, UNKNOWN_LABEL}
    assert chum.labels[UNKNOWN_LABEL] == 12 * 10 * 2
    assert sum(chum.labels.values()) == 12 * 10 * 6
    assert chum.intensity_range[0] < 100
    assert chum.intensity_range[1] > 180
    assert (result.facts["milan"].num_cases, result.facts["milan"].num_subjects) == (
        2,
        1,
    )


def test_a_table_has_missing_cells_and_no_spacing(tmp_path):
    heart_uci.write_miniature(tmp_path, seed=0)
    facts = check_dataset("heart_uci", tmp_path, {}).facts
    assert facts["cleveland"].missing_fraction == 0
    # chol, ca, and the three columns each of slope and thal
    assert facts["switzerland"].missing_fraction == pytest.approx(8 / 22)
    assert dict(facts["va"].labels) == {0: 6, 1: 6}
    assert not facts["va"].spacings_mm


def test_bad_cases_are_quarantined_with_the_reason_and_no_path(tmp_path):
    folder.write_miniature(tmp_path, seed=0)
    image = tmp_path / "alpha" / "images" / "s1.nii.gz"
    image.write_bytes(image.read_bytes()[:50])
    result = check_dataset("folder", tmp_path, {})
    assert not result.is_clean
    assert [(site, case) for site, case, _ in result.quarantined] == [
        ("alpha", "s1"),
        ("alpha", "s2"),
        ("alpha", "s9_seg"),
    ]
    assert result.facts["alpha"].num_quarantined == 3
    assert (result.cases, result.facts["alpha"].num_cases) == (4, 1)
    assert str(tmp_path) not in str(result.quarantined)


def test_an_unexpected_error_is_given_by_its_type_alone(tmp_path, monkeypatch):
    secret = "Miller^Anna"
    (tmp_path / "odd_data").mkdir()
    (tmp_path / "odd_data" / "data.py").write_text(
        "import dataclasses\n"
        "from sites import folder\n"
        "card = folder.card\n"
        "def read():\n"
        f"    raise ZeroDivisionError('/archive/{secret}')\n"
        "def open_sites(root, **options):\n"
        "    site = folder.open_sites(root, **options)[1]\n"
        "    bad = dataclasses.replace(site.cases[0], read=read)\n"
        "    return (dataclasses.replace(site, cases=(bad, *site.cases[1:])),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder.write_miniature(tmp_path / "in", seed=0)
    result = check_dataset("odd_data.data", tmp_path / "in", {})
    assert result.cases == 2
    reason = "unexpected ZeroDivisionError while reading"
    assert result.quarantined == (("beta", "p0", reason),)
    assert secret not in repr(result)


def test_a_case_that_contradicts_the_card_is_quarantined(tmp_path):
    folder.write_miniature(tmp_path, seed=0)
    result = check_dataset("folder", tmp_path, {"num_channels": 3})
    assert result.cases == 0
    assert ("beta", "p0", "1 channel(s), the card says 3") in result.quarantined


def test_one_patient_under_two_names_is_found(tmp_path):
    folder.write_miniature(tmp_path, seed=0)
    alpha = tmp_path / "alpha"
    for kind, ending in (("images", ""), ("masks", "_seg")):
        shutil.copy(
            alpha / kind / f"s0{ending}.nii.gz", alpha / kind / f"t0{ending}.nii.gz"
        )
    result = check_dataset("folder", tmp_path, {})
    assert result.twins == ((("alpha", "s0"), ("alpha", "t0")),)
    assert not result.is_clean
    same = check_dataset("folder", tmp_path, {"subject_pattern": r"(\d)"})
    assert same.twins == ()


def test_a_label_drawn_once_for_two_images_is_found(tmp_path):
    label = np.zeros((8, 8, 4), np.uint8)
    label[2:5, 3:5, 1:3] = 1
    for name in ("a", "b"):
        write_nifti_case(
            tmp_path / "x" / "images" / f"{name}.nii.gz",
            tmp_path / "x" / "masks" / f"{name}.nii.gz",
            seed=0,
            label_IJK=label,
        )
    result = check_dataset("folder", tmp_path, {})
    assert result.twins == ((("x", "a"), ("x", "b")),)


def test_a_site_without_usable_cases_is_not_clean(tmp_path):
    folder.write_miniature(tmp_path, seed=0)
    for name in ("images", "masks"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    for path in (tmp_path / "alpha" / "images" / "s2.nii.gz",
                 tmp_path / "alpha" / "masks" / "s9_seg.nii.gz"):  # fmt: skip
        path.unlink()
    result = check_dataset("folder", tmp_path, {})
    assert result.quarantined == ()
    assert result.facts["empty"].num_cases == 0
    assert result.facts["empty"].intensity_range is None
    assert not result.is_clean


def test_an_empty_data_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no site found"):
        check_dataset("folder", tmp_path, {})
