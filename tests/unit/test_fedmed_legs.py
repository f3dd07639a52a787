from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmed import legs
from fedmed.errors import ConfigError, ResumeError, UsageError
from fedmed.legs import Leg, Turn
from fedmed.runfolder import RunFolder
from fedmed.study import Study, study_from_dict

CONTENT: dict[str, Any] = {
    "name": "small",
    "sites": {"dataset": "phantom", "cases_per_site": 2, "size": [16, 16, 4]},
    "preprocess": {"size": [16, 16]},
    "strategy": {"name": "fedavg", "sync": "step"},
}


def study(**changes: Any) -> Study:
    return study_from_dict({**CONTENT, **changes})


def hashed(label: str, seed: int = 0, data: str = "d", **changes: Any) -> str:
    content = {**CONTENT, **changes}
    own = legs.study_of(content, study_from_dict(content), Leg(label, seed, None, ""))
    return legs.content_hash(own, data)


@pytest.mark.parametrize("label", ["a]", "a[b", "a[]", "[b=1]", "a[b=1]c", "a[b[c]]"])
def test_brackets_must_match(label: str) -> None:
    with pytest.raises(UsageError, match="is no method"):
        legs.read_method(label)


def test_a_method_in_brackets_is_the_strategy_with_these_options() -> None:
    leg = Leg("fedprox[mu=0.5,sync=round]", 3, None, "")
    own = legs.study_of(CONTENT, study(), leg)
    assert own.strategy.name == "fedprox"
    assert own.strategy.options == {"mu": 0.5, "sync": "round"}
    assert (own.seed, own.split.seed) == (3, 0)


def test_a_method_may_change_keys_of_the_study() -> None:
    label = "fedprox[mu=0.5,train.optimizer.lr=0.5,evaluate.statistics=recalibrated]"
    own = legs.study_of(CONTENT, study(), Leg(label, 0, None, ""))
    assert own.strategy.options == {"mu": 0.5, "sync": "step"}
    assert own.train.optimizer.lr == 0.5
    assert own.evaluate.statistics == "recalibrated"
    plain = legs.study_of(CONTENT, study(), Leg("fedprox[mu=0.5]", 0, None, ""))
    assert plain.train.optimizer == study().train.optimizer
    longer = legs.study_of(CONTENT, study(), Leg("fedavg[rounds=7]", 0, None, ""))
    assert longer.rounds == 7


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("fedavg[train.optimizer.rate=1]", r"train\.optimizer\.rate"),
        ("fedavg[sites.cases_per_site=9]", r"strategy\.sites"),
        ("fedavg[seed=9]", r"strategy\.seed"),
    ],
)
def test_a_method_may_not_change_the_data_or_what_is_no_key(
    label: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        legs.study_of(CONTENT, study(), Leg(label, 0, None, ""))


def test_unknown_options_of_a_method_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.nu"):
        legs.study_of(CONTENT, study(), Leg("fedprox[nu=1]", 0, None, ""))


def test_folders_have_names_without_brackets() -> None:
    turns = legs.turns_of("leave_one_site_out", ["s", "t"])
    found = list(legs.make_legs(["separate", "a[b=1,c=x]"], [0, 1], turns))
    names = [leg.folder for leg in found]
    assert names[:2] == ["separate-seed0", "separate-seed1"]
    assert names[2] == "a-b-1-c-x-seed0-without-s"
    assert len(set(names)) == len(names) == 6


def test_protocols_say_who_trains_and_who_is_tested() -> None:
    sites = ["s", "t", "u"]
    assert legs.turns_of("within_site", sites) == (Turn(),)
    out = legs.turns_of("leave_one_site_out", sites)
    assert [turn.held_out for turn in out] == sites
    cross = legs.turns_of("cross_site", sites)
    assert [turn.trained_on for turn in cross] == sites
    found = list(legs.make_legs(["fedavg", "separate"], [0], cross))
    assert [leg.folder for leg in found] == [
        "fedavg-seed0-on-s", "fedavg-seed0-on-t", "fedavg-seed0-on-u", "separate-seed0",
    ]  # fmt: skip
    own = legs.study_of(CONTENT, study(), found[1], sites=sites)
    assert own.split.held_out == ("s", "u")


def test_with_two_sites_training_on_one_is_leaving_the_other_out(
    tmp_path: Path,
) -> None:
    turns = [Turn(held_out="t"), Turn(trained_on="s")]
    wanted = {
        leg: legs.study_of(CONTENT, study(), leg, sites=["s", "t"])
        for leg in legs.make_legs(["fedavg"], [0], turns)
    }
    placed = legs.place_legs(tmp_path, wanted, "d")
    assert [leg.folder for leg in placed] == ["fedavg-seed0-without-t"] * 2
    legs.write_index(tmp_path, study(), tuple(placed))
    index = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert [(r["held_out"], r["trained_on"]) for r in index] == [
        ("t", None), (None, "s"),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["mldg", "masf", "saml", "meta_reg", "epi_fcr"])
def test_methods_of_episodes_cannot_train_at_one_site(method: str) -> None:
    leg = Leg(method, 0, None, "", trained_on="s")
    with pytest.raises(ConfigError, match="under cross_site one trains alone"):
        legs.study_of(CONTENT, study(), leg, sites=["s", "t"])


@pytest.mark.parametrize("protocol", ["leave_one_site_out", "cross_site"])
def test_one_site_is_too_few(protocol: Any) -> None:
    with pytest.raises(UsageError, match="needs two sites; the study has 1"):
        legs.turns_of(protocol, ["s"])


def test_protocols_are_read_by_name() -> None:
    assert legs.read_protocol("") == "within_site"
    assert legs.read_protocol("", leave_one_site_out=True) == "leave_one_site_out"
    assert legs.read_protocol("cross_site") == "cross_site"
    with pytest.raises(UsageError, match="did you mean 'cross_site'"):
        legs.read_protocol("crosssite")
    with pytest.raises(UsageError, match="--protocol cross_site"):
        legs.read_protocol("cross_site", leave_one_site_out=True)


def test_content_is_what_the_numbers_depend_on() -> None:
    base = hashed("fedprox")
    assert base == hashed("fedprox[mu=0.01]")  # the default, written out
    assert base == hashed("fedprox", title="Another title")
    assert base == hashed("fedprox", transport={"name": "workers"}, cache="elsewhere")
    others = [
        hashed("fedprox[mu=0.02]"),
        hashed("fedprox[sync=round]"),
        hashed("fedavg"),
        hashed("fedprox", seed=1),
        hashed("fedprox", data="other"),
        hashed("fedprox", train={"local_steps": 3}),
    ]
    assert len({base, *others}) == 1 + len(others)


def place(folder: Path, *labels: str, data: str = "d") -> list[str]:
    wanted = {
        leg: legs.study_of(CONTENT, study(), leg)
        for leg in legs.make_legs(labels, [0], [Turn()])
    }
    placed = legs.place_legs(folder, wanted, data)
    legs.write_index(folder, study(), tuple(placed))
    return [leg.folder for leg in placed]


def test_equal_content_is_one_run_under_any_label(tmp_path: Path) -> None:
    assert place(tmp_path, "fedprox") == ["fedprox-seed0"]
    assert place(tmp_path, "fedprox[mu=0.01]") == ["fedprox-seed0"]
    assert place(tmp_path, "fedavg", "fedavg[sync=step]") == ["fedavg-seed0"] * 2
    index = json.loads((tmp_path / "compare.json").read_text())["runs"]
    rows = ["fedprox", "fedprox[mu=0.01]", "fedavg", "fedavg[sync=step]"]
    assert [run["strategy"] for run in index] == rows


def test_other_data_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    place(tmp_path, "fedprox")
    (leg,) = legs.make_legs(["fedprox"], [0], [Turn()])
    own = legs.study_of(CONTENT, study(), leg).to_dict()
    own["strategy"] = {**own["strategy"], "sync": "step"}
    run = RunFolder(tmp_path / "fedprox-seed0")
    run.create()
    run.write_lock(own)
    with pytest.raises(ResumeError, match="fedprox-seed0 was trained on other images"):
        place(tmp_path, "fedprox", data="changed")
    # Without the folder there is nothing that the changed data could be mixed with.
    run.lock_file.unlink()
    assert place(tmp_path, "fedprox", data="changed") == ["fedprox-seed0"]


def test_data_hash_sees_labels_and_sites(tmp_path: Path) -> None:
    sites = {**CONTENT["sites"], "preset": "prostate_abc"}
    given = {"cache": str(tmp_path), "sites": sites}
    base = legs.data_hash(study(**given))
    assert base == legs.data_hash(study(**given, seed=5))
    fewer = {**given, "sites": {**sites, "include": ["a", "b"]}}
    wider = {**sites, "dials": {"a": {"label_style": {"offset_mm": 3.0}}}}
    assert legs.data_hash(study(**fewer)) != base
    assert legs.data_hash(study(**{**given, "sites": wider})) != base
