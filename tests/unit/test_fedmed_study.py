from __future__ import annotations

import pytest
import yaml

from fedmed.errors import ConfigError
from fedmed.preflight import differences
from fedmed.study import (
    apply_overrides,
    expand,
    load_study,
    read_yaml,
    study_from_dict,
)

SMALL = {"name": "x", "sites": {"dataset": "phantom"}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rouds": 3}, r"unknown key 'rouds', did you mean 'rounds'\?"),
        ({"train": {"bach_size": 3}}, r"'train\.bach_size', did you mean 'batch_size'"),
        (
            {"train": {"optimizer": {"momemtum": 0.9}}},
            r"'train\.optimizer\.momemtum', did you mean 'momentum'",
        ),
        ({"zzzzzz": 1}, "unknown key 'zzzzzz'$"),
    ],
)
def test_an_unknown_key_names_the_nearest(change, told):
    with pytest.raises(ConfigError, match=told):
        study_from_dict({**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rounds": 0}, r"rounds.*greater than or equal to 1 \(seen: 0\)"),
        ({"split": {"train": 0.9}}, r"split: train \+ validation \+ test must be 1"),
        ({"train": {"local_steps": 1, "local_epochs": 1}}, "not both"),
        ({"train": {"optimizer": {"lr": -1}}}, r"train\.optimizer\.lr.*seen: -1"),
        ({"train": {"optimizer": {"lr": float("inf")}}}, r"optimizer\.lr: .*finite"),
        ({"train": {"optimizer": {"lr": float("nan")}}}, r"optimizer\.lr: .*finite"),
        (
            {"train": {"optimizer": {"betas": [1.5, 0.9]}}},
            r"train\.optimizer\.betas\.0.*less than 1 \(seen: 1\.5\)",
        ),
        ({"train": {"optimizer": {"betas": [0.9, 1]}}}, r"optimizer\.betas\.1"),
        ({"model": {"slices": 2}}, r"model\.slices: must be odd.*\(seen: 2\)"),
        ({"train": {"precision": "half"}}, r"precision.*float64.*'half'"),
        ({"sites": {}}, "key 'sites.dataset' is missing"),
        ({"tolerance": {"quorum": 0}}, r"tolerance\.quorum"),
    ],
)
def test_an_impossible_value_is_told_with_its_place(change, told):
    with pytest.raises(ConfigError, match=told):
        study_from_dict({**SMALL, **change})


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match="rouds") as caught:
        study_from_dict({**SMALL, "rouds": 1, "seed": "one"})
    assert "seed" in str(caught.value)


def test_further_keys_of_open_sections_are_options():
    study = study_from_dict(
        {
            "name": "x",
            "sites": {"dataset": "phantom", "preset": "brain_abcd"},
            "strategy": {"name": "fedprox", "mu": 0.5},
        }
    )
    assert study.sites.options == {"preset": "brain_abcd"}
    assert study.strategy.options == {"mu": 0.5}
    assert study.model.options == {}


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_small_numbers_mean_the_same_in_a_file_and_as_an_override(tmp_path, text):
    path = tmp_path / "study.yaml"
    content = (
        f"name: x\nsites: {{dataset: phantom}}\ntrain: {{optimizer: {{lr: {text}}}}}"
    )
    path.write_text(content)
    assert load_study(path).train.optimizer.lr == 0.001
    path.write_text("name: x\nsites: {dataset: phantom}\n")
    study = load_study(path, [f"train.optimizer.lr={text}", f"strategy.mu={text}"])
    assert study.train.optimizer.lr == 0.001
    assert study.strategy.options["mu"] == 0.001


def test_overrides_change_a_copy_and_may_hold_any_yaml():
    content = {"name": "x", "sites": {"dataset": "phantom"}}
    changed = apply_overrides(
        content,
        [
            "sites.include=[a, b]",
            "seed=4",
            "name=a=b",
            "train.clip_norm=null",
            "seed=5",
        ],
    )
    assert content == {"name": "x", "sites": {"dataset": "phantom"}}
    assert changed["sites"]["include"] == ["a", "b"]
    assert changed["seed"] == 5
    assert changed["name"] == "a=b"
    assert changed["train"]["clip_norm"] is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "not of the form"),
        ("=3", "not of the form"),
        ("name.first=3", "'name' holds a value"),
        ("seed=[1", "not YAML"),
    ],
)
def test_a_wrong_override_is_explained(override, told):
    with pytest.raises(ConfigError, match=told):
        apply_overrides({"name": "x"}, [override])


def test_a_study_survives_the_lock_file():
    study = study_from_dict(
        {
            **SMALL,
            "train": {"optimizer": {"lr": 0.1 + 0.2, "eps": 1e-17}, "clip_norm": None},
            "preprocess": {"spacing_mm": [0.5, None, 3], "size": [32, 32]},
            "split": {"train": 1 / 3, "validation": 1 / 3, "test": 1 / 3},
            "strategy": {"name": "fedprox", "mu": 1e-7},
        }
    )
    text = yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True)
    again = study_from_dict(yaml.safe_load(text))
    assert again == study
    assert differences(study.to_dict(), again.to_dict()) == []
    assert again.train.optimizer.lr == 0.1 + 0.2


def test_a_lock_file_is_a_study_file(tmp_path):
    study = study_from_dict({**SMALL, "strategy": {"name": "fedavg", "sync": "round"}})
    added = {"held_out": ["a"], "task": {}, "data": {}, "versions": {"fedmed": "0"}}
    path = tmp_path / "study.lock.yaml"
    path.write_text(yaml.safe_dump(study.to_dict() | added))
    assert load_study(path) == study
    assert load_study(path, ["rounds=3"]).rounds == 3
    assert "seed" not in read_yaml(path)["split"]
    path.write_text(yaml.safe_dump({**study.to_dict(), **added, "rouds": 3}))
    with pytest.raises(ConfigError, match="unknown key 'rouds'"):
        load_study(path)
    path.write_text(yaml.safe_dump({**study.to_dict(), "held_out": ["a"]}))
    with pytest.raises(ConfigError, match="unknown key 'held_out'"):
        load_study(path)


def test_small_numbers_are_numbers_in_free_options_too(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "name: x\nsites: {dataset: phantom}\ntrain:\n"
        "  loss_options: {smooth_numerator: 1e-5}\n"
        "  augmentation: {gamma: 1e-1, flip_axes: I}\n"
    )
    train = load_study(path).train
    assert train.loss_options == {"smooth_numerator": 1e-5}
    assert train.augmentation == {"gamma": 0.1, "flip_axes": "I"}


def test_a_file_that_is_no_study_is_explained(tmp_path):
    (tmp_path / "tiny.yaml").write_text("- a\n- list\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_yaml(tmp_path / "tiny.yaml")
    (tmp_path / "tiny.yaml").write_text("name: x\n  wrong: [\n")
    with pytest.raises(ConfigError, match=r"not valid YAML at line \d"):
        read_yaml(tmp_path / "tiny.yaml")
    with pytest.raises(ConfigError, match="no study file") as caught:
        read_yaml(tmp_path / "tinny.yaml")
    assert "tiny.yaml" in str(caught.value.hint)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.setenv("HERE", "/data")
    assert str(expand("${HERE}/x")) == "/data/x"
    with pytest.raises(ConfigError, match="NOT_SET_HERE, which is not set"):
        expand("${NOT_SET_HERE}/x")
