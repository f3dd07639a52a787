"""Evaluation of volumes at one hospital: each predicted once, scored wherever it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedmed.errors import FedMedError
from fedmed.imaging.preprocess import restore
from fedmed.metrics.case_scores import score_case
from fedmed.strategy import Private
from fedmed.study import study_from_dict
from fedmed.training.predict import predict_case
from sites.context import Workbench
from sites.evaluation import COLUMNS, evaluate, num_helpers

SPLITS = ("train", "validation", "test")
CONTENT = {
    "name": "volumes",
    "sites": {
        "dataset": "phantom",
        "preset": "prostate_abc",
        "cases_per_site": 4,
        "size": [24, 24, 6],
    },
    "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
    "preprocess": {"size": [16, 16]},
    "model": {"name": "unet", "base_width": 4, "levels": 2},
    "train": {"batch_size": 4},
    "strategy": {"name": "fedavg"},
    "evaluate": {"batch_size": 4, "overlays": 3},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def make_bench(cache, **changes):
    content = {**CONTENT}
    for key, value in changes.items():
        content[key] = {**content[key], **value}
    return Workbench(study_from_dict(content), "a", cache)


def weights_of(bench):
    """A network that finds something everywhere."""
    return {n: t.detach().clone() for n, t in bench.model.state_dict().items()}


def rows_of(bench, splits=SPLITS, **options):
    weights = weights_of(bench)
    return evaluate(bench, Private(), weights=weights, splits=splits, **options)


def count_predicted(bench):
    """Count the slices that the network sees."""
    seen = []
    bench.model.register_forward_hook(
        lambda _module, inputs, _output: seen.append(len(inputs[0]))
    )
    return seen


def test_rows_are_the_scores_of_the_restored_prediction(cache):
    bench = make_bench(cache)
    rows = rows_of(bench)
    expected = []
    for split in SPLITS:
        for case in bench.data.splits[split]:
            prediction = restore(predict_case(bench.model, case, batch_size=4), case)
            for score in score_case(
                prediction,
                case.label_native_IJK,
                spacing_mm=case.spacing_native_mm,
                class_names=dict(enumerate(bench.task.class_names)),
            ):
                values = {name: getattr(score, name) for name in COLUMNS}
                names = {
                    "case_id": case.case_id,
                    "subject_id": case.subject_id,
                    "class": score.class_name,
                }
                expected.append({"split": split, **names, **values})
    assert len(rows) >= 4
    for row, wanted in zip(rows, expected, strict=True):
        np.testing.assert_equal(row, wanted)


def test_a_volume_divided_between_splits_is_predicted_once(cache):
    bench = make_bench(cache, split={"by": "slices"})
    apart = [rows_of(bench, (split,)) for split in SPLITS]
    seen = count_predicted(bench)
    rows = rows_of(bench)
    assert sum(seen) == sum(
        case.image_CIJK.shape[3] for case in bench.data.splits["train"]
    )
    assert {row["split"] for row in rows} == set(SPLITS)
    np.testing.assert_equal(rows, [row for found in apart for row in found])


@pytest.mark.parametrize("by", ["subject", "slices"])
def test_helper_threads_change_no_row_and_no_picture(cache, tmp_path, monkeypatch, by):
    bench = make_bench(cache, split={"by": by})
    found = {}
    for cores in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        named = []

        def name(case_id, named=named):
            named.append(case_id)
            return f"case-{len(named)}"

        folder = tmp_path / str(cores)
        rows = rows_of(bench, overlays=folder, name=name)
        pictures = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
        found[cores] = rows, pictures, named
        assert pictures
        places = dict.fromkeys((row["split"], row["case_id"]) for row in rows)
        assert named == [case_id for _, case_id in places]
    np.testing.assert_equal(found[2], found[1])
    np.testing.assert_equal(found[5], found[1])


@pytest.mark.parametrize("cores", [1, 3])
def test_what_goes_wrong_in_a_helper_thread_is_raised(cache, monkeypatch, cores):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    bench = make_bench(cache)
    weights = weights_of(bench)
    weights["head.bias"] = weights["head.bias"] * float("nan")
    with pytest.raises(FedMedError, match="not finite"):
        evaluate(bench, Private(), weights=weights, splits=SPLITS)


def test_where_there_is_no_case_nothing_is_computed(cache):
    """As at a held-out site before the last round: no calibration for nothing."""
    bench = make_bench(cache, split={"held_out": ["a"]}, strategy={"name": "fedbn"})
    seen = count_predicted(bench)
    assert rows_of(bench, ("train", "validation")) == []
    assert not seen
    assert rows_of(bench, ("validation", "test"))
    assert seen


@pytest.mark.parametrize(
    ("cores", "device", "expected"),
    [(1, "cpu", 0), (2, "cpu", 1), (64, "cpu", 4), (1, "cuda", 1), (3, "cuda:1", 2)],
)
def test_only_free_cores_help(monkeypatch, cores, device, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert num_helpers(device) == expected


def test_pictures_are_of_the_last_split_and_bear_the_name_outside(cache, tmp_path):
    bench = make_bench(cache, split={"train": 0.25, "validation": 0.0, "test": 0.75})
    names = {}

    def name(case_id):
        return names.setdefault(case_id, f"n{len(names)}")

    rows = rows_of(bench, ("train", "test"), overlays=tmp_path / "seen", name=name)
    dice = {}
    for row in rows:
        if row["split"] == "test" and not np.isnan(row["dice"]):
            dice.setdefault(row["case_id"], []).append(row["dice"])
    means = {case_id: np.mean(values) for case_id, values in dice.items()}
    ranked = sorted(means, key=lambda case_id: (means[case_id], case_id))
    picks = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    files = sorted(p.name for p in (tmp_path / "seen").iterdir())
    assert files == sorted(f"{rank}-{names[c]}.npz" for rank, c in picks.items())
    cases = {case.case_id: case for case in bench.data.splits["test"]}
    for rank, case_id in picks.items():
        with np.load(tmp_path / "seen" / f"{rank}-{names[case_id]}.npz") as found:
            facts = json.loads(str(found["facts"]))
            label = cases[case_id].label_IJK
            np.testing.assert_array_equal(
                found["truth"], np.where(label == 255, 0, label)[..., facts["slice"]]
            )
            whole = predict_case(bench.model, cases[case_id], batch_size=4).argmax(0)
            np.testing.assert_array_equal(
                found["prediction"],
                np.where(label == 255, 0, whole)[..., facts["slice"]],
            )
        assert facts["dice"] == means[case_id]
        assert facts["case_id"] == names[case_id]


def test_a_study_in_bfloat16_is_evaluated_in_it(cache):
    plain, rounded = (
        make_bench(cache),
        make_bench(cache, train={"precision": "bfloat16"}),
    )
    for bench in (plain, rounded):
        assert rows_of(bench) == rows_of(bench)
    case = plain.data.splits["test"][0]
    options = {"batch_size": 4}
    exact = predict_case(plain.model, case, **options)
    coarse = predict_case(plain.model, case, precision="bfloat16", **options)
    assert 0 < np.abs(exact - coarse).max() < 0.05
