"""Options, dials and presets."""

import dataclasses
from dataclasses import replace

import pytest

from fedmed.errors import ConfigError
from sites.phantoms.dials import Dials, LabelStyle, turn
from sites.phantoms.plan import PhantomOptions, make_plan
from sites.phantoms.presets import PRESETS

BASE = PhantomOptions()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_makes_a_plan(preset):
    plan = make_plan(replace(BASE, preset=preset))
    assert list(plan.dials) == sorted(PRESETS[preset].hospitals)
    assert set(plan.num_cases.values()) == {8}
    assert plan.as_json()["preset"] == preset


@pytest.mark.parametrize(
    ("options", "seen", "nearest"),
    [
        (replace(BASE, preset="prostate_abd"), "prostate_abd", "prostate_abc"),
        (replace(BASE, dials={"A": {}}), "'A'", "'a'"),
        (replace(BASE, dials={"a": {"nose": 1}}), "nose", "noise"),
        (
            replace(BASE, dials={"a": {"label_style": {"ofset_mm": 1}}}),
            "ofset",
            "offset",
        ),
        (replace(BASE, cases_per_site={"aa": 3}), "aa", "'a'"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(options, seen, nearest):
    with pytest.raises(ConfigError) as caught:
        make_plan(options)
    assert seen in caught.value.message
    assert nearest in caught.value.message


@pytest.mark.parametrize(
    ("dial", "value"),
    [
        ("field_t", 2.0),
        ("coil", "head"),
        ("noise", -1),
        ("noise", "loud"),
        ("noise", True),
        ("noise", float("nan")),
        ("resolution_mm", 3),
        ("resolution_mm", [0.5, [3, 1]]),
        ("resolution_mm", [0, 3]),
        ("contrast", 0),
        ("orientation", "LLS"),
        ("oblique_deg", 60),
        ("prevalence", 1.5),
        ("gain", 1e6),
        ("modality", "xray"),
        ("modality", "pet"),
        ("label_style", 3),
        ("bias_field", float("inf")),
    ],
)
def test_impossible_dials_are_refused(dial, value):
    with pytest.raises(ConfigError, match=dial):
        make_plan(replace(BASE, dials={"a": {dial: value}}))


@pytest.mark.parametrize(
    ("preset", "dials"),
    [
        ("heart_mr_ct", {"ct": {"gain": 300}}),
        ("heart_mr_ct", {"ct": {"contrast": 1.2}}),
        ("heart_mr_ct", {"mr": {"prevalence": 0.5}}),
        ("brain_abcd", {"set-a": {"coil": "endorectal"}}),
        ("chest_xray", {"jsrt": {"modality": "ct", "gain": 1, "contrast": 1}}),
    ],
)
def test_dials_must_fit_the_anatomy(preset, dials):
    with pytest.raises(ConfigError):
        make_plan(replace(BASE, preset=preset, dials=dials))


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("prostate_abc", (8, 96, 16)),
        ("prostate_abc", (96, 96, 1)),
        ("chest_xray", (128, 128, 4)),
        ("prostate_abc", (100_000, 100_000, 16)),
    ],
)
def test_impossible_sizes_are_refused(preset, size):
    with pytest.raises(ConfigError, match="size"):
        make_plan(replace(BASE, preset=preset, size=size))


@pytest.mark.parametrize("count", [0, -1, 10_000])
def test_impossible_numbers_of_cases_are_refused(count):
    with pytest.raises(ConfigError, match="cases_per_site"):
        make_plan(replace(BASE, cases_per_site=count))


def test_dials_are_read_as_a_study_writes_them():
    turned = turn(
        Dials(),
        {
            "resolution_mm": [0.4, [3, 4]],
            "label_style": {"offset_mm": 1},
            "noise": 0,
            "lesion": 5,
        },
        site_id="a",
    )
    assert turned.resolution_mm == ((0.4, 0.4), (3.0, 4.0))
    assert turned.label_style == LabelStyle(1.0, 0.0)
    assert turned.noise == 0.0
    assert turned.lesion == (5.0, 5.0)


def test_the_fingerprint_follows_all_that_changes_bytes():
    changes = [
        {},
        {"preset": "prostate_af"},
        {"cases_per_site": 9},
        {"cases_per_site": {"a": 9}},
        {"size": (96, 96, 18)},
        {"seed": 1},
        {"dials": {"a": {"noise": 0.036}}},
        {"fit_organ": False},
        {"same_patients": True},
    ]
    prints = [make_plan(replace(BASE, **change)).fingerprint for change in changes]
    assert len(set(prints)) == len(prints)
    named = {field.name for field in dataclasses.fields(PhantomOptions)}
    assert named - {"cache_dir"} == {name for change in changes for name in change}
    assert make_plan(replace(BASE, size=(96, 96, 16))).fingerprint == prints[0]


def test_presets_follow_the_published_table():
    """Liu, Dou et al., MS-Net, 2020: field, coil, voxel size, maker and size."""
    published = {
        "a": (3.0, "surface", (0.6, 0.625), (3.6, 4.0), "Siemens", 30),
        "b": (1.5, "endorectal", (0.4, 0.4), (3.0, 3.0), "Philips", 30),
        "c": (3.0, "none", (0.67, 0.79), (1.25, 1.25), "Siemens", 19),
    }
    for site_id, row in published.items():
        hospital = PRESETS["prostate_abc"].hospitals[site_id]
        dials = hospital.dials
        assert row == (
            dials.field_t,
            dials.coil,
            *dials.resolution_mm,
            hospital.vendor,
            hospital.published_cases,
        )
