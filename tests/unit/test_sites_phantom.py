"""The dataset module: files, cards, cache, contract."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import sites
from fedmed.errors import CaseError, ConfigError, DataError, StorageError
from sites import phantom
from sites.phantoms.patient import visit
from sites.phantoms.plan import PhantomOptions, make_plan
from sites.phantoms.presets import PRESETS

SMALL = {"cases_per_site": 1, "size": (24, 24, 6)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniature")
    phantom.write_miniature(root, 5)
    return root


@pytest.fixture
def miniature(written, tmp_path):
    return shutil.copytree(written, tmp_path / "miniature")


def files_of(root):
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def only_folder(cache):
    (folder,) = cache.iterdir()
    return folder


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_opens_and_keeps_the_case_contract(preset, tmp_path):
    size = (40, 40, 1) if "chest" in preset else (40, 40, 8)
    options = {"preset": preset, "cases_per_site": 2, "size": size}
    opened = phantom.open_sites(None, **options, cache_dir=tmp_path)
    card = phantom.card(**options)
    assert tuple(site.site_id for site in opened) == card.sites
    for site in opened:
        assert re.fullmatch(r"[a-z0-9_.-]+", site.site_id)
        assert len(site.cases) == 2
        assert not site.problems
        assert site.card.facts["phantom"] is True
        case = site.cases[0].read()
        assert case.case_id == site.cases[0].case_id
        assert case.image.dtype == np.float32
        assert case.image.shape == (1, *size)
        assert case.image.std() > 0
        if card.kind == "classification":
            assert (case.label.shape, case.label.dtype) == ((), np.int64)
        else:
            assert (case.label.shape, case.label.dtype) == (size, np.uint8)
        assert set(np.unique(case.label)) <= set(card.labels)
    assert card.spatial_dims == (2 if size[2] == 1 else 3)


def test_the_default_card_is_that_of_the_default_preset():
    assert phantom.card() == phantom.CARD
    assert phantom.CARD.labels == {0: "background", 1: "prostate"}
    assert phantom.card(preset="heart_mr_ct").labels[4] == "MYO"
    abdomen = phantom.card(preset="abdomen_mr_ct").labels
    assert [abdomen[n] for n in (1, 2, 3, 4)] == [
        "liver",
        "r_kidney",
        "l_kidney",
        "spleen",
    ]


def test_equal_options_give_equal_bytes(tmp_path):
    for name in "pq":
        phantom.open_sites(None, **SMALL, cache_dir=tmp_path / name)
    first, second = (files_of(only_folder(tmp_path / name)) for name in "pq")
    assert first == second
    assert len(first) == 1 + 3 * 3
    phantom.open_sites(None, **SMALL, seed=1, cache_dir=tmp_path / "r")
    third = files_of(only_folder(tmp_path / "r"))
    assert third["a/images/a_0000.nii.gz"] != first["a/images/a_0000.nii.gz"]


def test_more_cases_leave_the_first_ones_alone(tmp_path):
    kept = {}
    for count in (1, 2):
        cache = tmp_path / str(count)
        phantom.open_sites(None, **{**SMALL, "cases_per_site": count}, cache_dir=cache)
        kept[count] = files_of(only_folder(cache))
    name = "b/images/b_0000.nii.gz"
    assert kept[1][name] == kept[2][name]


def test_the_cache_is_used_again(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="sites.phantoms.writing"):
        phantom.open_sites(None, **SMALL, cache_dir=tmp_path)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nii.gz")}
        phantom.open_sites(None, **SMALL, cache_dir=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nii.gz")} == before
    assert len(caplog.records) == 1


def test_two_processes_may_generate_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sites import phantom\n"
        "sys.stdin.readline()\n"
        "opened = phantom.open_sites(None, cases_per_site=2, size=(24, 24, 6),"
        " cache_dir=Path(sys.argv[1]))\n"
        "print([len(site.cases) for site in opened])"
    )
    home = str(Path(next(iter(sites.__path__))).parent)
    environment = {**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    answers = []
    for worker in workers:  # both wait for the same starting signal
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        answers.append(worker.communicate(timeout=60)[0].strip())
        assert worker.returncode == 0
    assert answers == ["[2, 2, 2]"] * 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    only_folder(tmp_path)


def test_a_dead_generator_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("gzip.compress", _raise_disk_full)
        with pytest.raises(StorageError, match="No space"):
            phantom.open_sites(None, **SMALL, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert phantom.open_sites(None, **SMALL, cache_dir=tmp_path)


def _raise_disk_full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "RPI", "AIR", "SLP"])
def test_files_lie_as_the_hospital_stores_them_and_are_read_upright(
    orientation, tmp_path
):
    dials = {"a": {"orientation": orientation, "oblique_deg": 12.0}}
    options = {"size": (24, 28, 6), "cases_per_site": 1, "dials": dials}
    opened = phantom.open_sites(None, **options, cache_dir=tmp_path)
    ref = opened[0].cases[0]
    stored = nibabel.load(ref.files[0])
    assert "".join(nibabel.aff2axcodes(stored.affine)) == orientation
    assert stored.get_data_dtype() == np.int16
    assert nibabel.load(ref.files[1]).get_data_dtype() == np.uint8
    for affine, code in (
        stored.get_qform(coded=True),
        stored.get_sform(coded=True),
    ):
        assert code == 1
        np.testing.assert_allclose(affine, stored.affine, atol=1e-3)
    assert stored.header.get_xyzt_units()[0] == "mm"
    plan = make_plan(PhantomOptions(**options))
    expected = visit(plan.anatomy, plan.dials["a"], plan.request("a", 0))
    case = ref.read()
    np.testing.assert_array_equal(case.image[0], expected.image)
    np.testing.assert_array_equal(case.label, expected.label)
    assert case.spacing_mm == pytest.approx(expected.spacing_mm, abs=1e-4)


def test_tilted_slices_are_oblique_in_the_header(tmp_path):
    dials = {"a": {"orientation": "RAS", "oblique_deg": 12.0}}
    opened = phantom.open_sites(None, **SMALL, dials=dials, cache_dir=tmp_path)
    affine = nibabel.load(opened[0].cases[0].files[0]).affine
    normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    assert np.degrees(np.arccos(normal[2])) == pytest.approx(12, abs=1e-3)


def test_resolution_reaches_the_header(tmp_path):
    dials = {"b": {"resolution_mm": [3.0, 7.0]}}
    opened = phantom.open_sites(None, **SMALL, dials=dials, cache_dir=tmp_path)
    assert opened[1].cases[0].read().spacing_mm == pytest.approx((3.0, 3.0, 7.0))


def test_same_patients_travel_to_every_hospital(tmp_path):
    same = {
        "resolution_mm": [2.6, 6.0],
        "label_style": {"offset_mm": 0, "smooth_mm": 0},
    }
    dials = {"a": same, "b": {**same, "coil": "none"}, "c": same}
    options = {**SMALL, "dials": dials, "cache_dir": tmp_path}
    opened = phantom.open_sites(None, **options, same_patients=True)
    labels = [site.cases[0].read().label for site in opened]
    np.testing.assert_array_equal(labels[0], labels[1])
    np.testing.assert_array_equal(labels[0], labels[2])
    assert {site.cases[0].subject_id for site in opened} == {"patient_0000"}
    images = [site.cases[0].read().image for site in opened]
    assert not np.array_equal(images[0], images[2])
    strangers = phantom.open_sites(None, **options)
    labels = [site.cases[0].read().label for site in strangers]
    assert not np.array_equal(labels[0], labels[2])


def test_miniature_is_read_like_any_folder(miniature):
    opened = phantom.open_sites(miniature)
    assert [site.site_id for site in opened] == ["a", "b", "c"]
    assert [len(site.cases) for site in opened] == [3, 3, 3]
    for site in opened:
        for ref in site.cases:
            assert ref.read().label.max() == 1
    assert phantom.card(miniature) == phantom.CARD
    assert phantom.open_sites(miniature, preset="prostate_abc", seed=5)


@pytest.mark.parametrize(
    "options",
    [{"seed": 6}, {"preset": "prostate_af"}, {"dials": {"a": {"noise": 0.9}}}],
)
def test_a_folder_made_with_other_options_is_refused(options, miniature):
    with pytest.raises(ConfigError):
        phantom.open_sites(miniature, **options)


def test_a_folder_without_phantom_is_refused(tmp_path, miniature):
    with pytest.raises(DataError, match=r"phantom\.json"):
        phantom.open_sites(tmp_path)
    (miniature / "b" / "site.json").write_text("{")
    with pytest.raises(DataError, match=r"site\.json"):
        phantom.open_sites(miniature)


def test_missing_and_damaged_files_are_seen(miniature):
    (miniature / "a" / "masks" / "a_0001.nii.gz").unlink()
    damaged = miniature / "a" / "images" / "a_0002.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    site = phantom.open_sites(miniature)[0]
    assert [ref.case_id for ref in site.cases] == ["a_0000", "a_0002"]
    assert list(site.problems) == ["a_0001"]
    with pytest.raises(CaseError, match="a_0002"):
        site.cases[1].read()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"preset": "x"}',
        '{"preset": "prostate_abc", "num_cases": {"..": 1}}',
    ],
)
def test_a_damaged_manifest_is_refused(text, tmp_path):
    (tmp_path / "phantom.json").write_text(text)
    with pytest.raises(DataError, match=r"phantom\.json"):
        phantom.open_sites(tmp_path)


def test_a_file_outside_the_site_is_not_read(miniature):
    scan = miniature / "a" / "images" / "a_0001.nii.gz"
    scan.unlink()
    scan.symlink_to(miniature / "b" / "images" / "b_0001.nii.gz")
    site = phantom.open_sites(miniature)[0]
    assert "a_0001" in site.problems


def test_unknown_options_and_presets_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="preset"):
        phantom.open_sites(None, preset="prostat_abc", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="cases_per_sit"):
        phantom.open_sites(None, cases_per_sit=3, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_site_json_tells_the_dials_and_no_path(miniature):
    text = (miniature / "b" / "site.json").read_text()
    facts = json.loads(text)
    assert facts["dials"]["coil"] == "endorectal"
    assert facts["facts"] == {
        "phantom": True,
        "vendor": "Philips",
        "field_t": 1.5,
        "coil": "endorectal",
    }
    assert str(miniature) not in text
