from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from fedmed.report.run_folder import read_comparison
from fedmed.report.significance import (
    NUM_RESAMPLES,
    Differences,
    _bootstrap_interval,
    _test,
    choose_reference,
    holm,
    paired_tests,
    planned_tests,
    wilcoxon_p,
)
from fedmed.seeds import numpy_rng

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")


@pytest.mark.parametrize("size", [1, 5, 12, 30, 50])
def test_wilcoxon_equals_scipy_without_ties(size: int) -> None:
    differences = np.random.default_rng(size).normal(0.4, 1, size)
    expected = wilcoxon(differences, method="exact").pvalue
    assert wilcoxon_p(differences) == pytest.approx(expected, rel=1e-9)


def test_wilcoxon_of_many_equals_scipys_normal() -> None:
    differences = np.round(np.random.default_rng(3).normal(0.1, 1, 200), 1)
    kept = differences[differences != 0]
    expected = wilcoxon(kept, method="asymptotic", correction=False).pvalue
    assert wilcoxon_p(differences) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "values", [[1, 1, -1, 2, 2, -3, 1], [0, 0, 0.5, 0.5, -0.5, 1, 1, 1], [1, 1, 1, 1]]
)
def test_wilcoxon_with_ties_equals_every_sign_tried(values: list[float]) -> None:
    kept = np.array([v for v in values if v], dtype=float)
    size = np.abs(kept)
    ranks = np.array([(size < v).sum() + ((size == v).sum() + 1) / 2 for v in size])
    signs = np.array(list(itertools.product([0, 1], repeat=len(kept))))
    sums = signs @ ranks
    seen = ranks[kept > 0].sum()
    far = np.abs(sums - ranks.sum() / 2) >= abs(seen - ranks.sum() / 2) - 1e-9
    assert wilcoxon_p(np.array(values, dtype=float)) == pytest.approx(far.mean())


def test_wilcoxon_of_nothing_is_nan() -> None:
    assert math.isnan(wilcoxon_p(np.zeros(5)))


def test_many_patients_of_one_site_need_not_lean_the_way_of_the_mean_over_sites() -> (
    None
):
    """30 patients at one hospital a little worse, 5 at another much better."""
    pairs = {
        "a": Differences(np.full(30, -0.01), np.arange(30)),
        "b": Differences(np.full(5, 0.2), np.arange(5)),
    }
    test = _test("m", "", pairs, [])
    assert test.difference == pytest.approx(0.095)
    assert test.p < 0.05
    assert (test.num_better, test.num_worse) == (5, 30)
    assert test.leaning == -1
    assert not test.is_of_one_mind
    alone = _test("m", "b", {"b": pairs["b"]}, [])
    assert alone.is_of_one_mind


def test_holm_is_never_below_the_raw_value_and_keeps_the_order() -> None:
    raw = [0.012, math.nan, 0.5, 0.001, 0.04]
    found = holm(raw)
    assert math.isnan(found[1])
    assert [found[i] for i in (3, 0, 4, 2)] == pytest.approx([0.004, 0.036, 0.08, 0.5])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s") / "compare"
    plan = folders.Plan(overlays=False, num_rounds=4, missed_case=None)
    names = ("separate", "fedavg", "ms_net")
    return Path(folders.write_comparison(folder, names, (0, 1), plan=plan))


def _dice(folder: Path, strategy: str, seed: int, site: str) -> np.ndarray:
    lines = (folder / f"runs/{strategy}-{seed}/cases.csv").read_text().splitlines()[1:]
    cells = [line.split(",") for line in lines]
    return np.array([float(c[5]) for c in cells if c[0] == "4" and c[2] == site])


def test_seeds_are_averaged_before_cases_are_paired(compared: Path) -> None:
    overall, by_site = paired_tests(read_comparison(compared), "fedavg")
    assert [test.row for test in overall] == ["separate", "ms_net"]
    assert len(by_site) == 2 * 3
    pairs = {
        site: np.mean([_dice(compared, "ms_net", s, site) for s in (0, 1)], axis=0)
        - np.mean([_dice(compared, "fedavg", s, site) for s in (0, 1)], axis=0)
        for site in ("a", "b", "c")
    }
    test = overall[1]
    assert test.num_cases == 26
    mean = np.mean([found.mean() for found in pairs.values()])
    assert test.difference == pytest.approx(mean)
    pooled = np.concatenate(list(pairs.values()))
    assert test.p == pytest.approx(wilcoxon(pooled, method="exact").pvalue)
    assert test.low < test.difference < test.high
    seeds = []
    for s in (0, 1):
        ours = [_dice(compared, "ms_net", s, site).mean() for site in "abc"]
        theirs = [_dice(compared, "fedavg", s, site).mean() for site in "abc"]
        seeds.append(np.mean(ours) - np.mean(theirs))
    assert test.seed_differences == pytest.approx(seeds)


def test_each_table_is_one_family(compared: Path) -> None:
    for family in paired_tests(read_comparison(compared), "fedavg"):
        assert [t.p_holm for t in family] == pytest.approx(holm([t.p for t in family]))


def _singles(rng: np.random.Generator, mean: float, size: int) -> Differences:
    return Differences(rng.normal(mean, 1, size), np.arange(size))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        low, high = _bootstrap_interval(
            {"a": _singles(rng, 0.5, 30), "b": _singles(rng, 1.5, 30)}
        )
        hits += low < 1.0 < high
    assert 86 <= hits <= 100


def _repeated(rng: np.random.Generator, num_patients: int) -> Differences:
    """Three scans a patient, which differ little from one another."""
    patients = np.repeat(np.arange(num_patients), 3)
    of_patient = rng.normal(0.0, 1.0, num_patients)[patients]
    return Differences(of_patient + rng.normal(0, 0.1, len(patients)), patients)


def test_scans_of_one_patient_are_no_further_patients() -> None:
    """Of 100 intervals about 95 hold the truth; of naive ones, about 75 would."""
    rng = np.random.default_rng(1)
    hits, naive, false = 0, 0, 0
    for _ in range(100):
        found = _repeated(rng, 25)
        low, high = _bootstrap_interval({"a": found})
        hits += low < 0 < high
        alone = Differences(found.cases, np.arange(len(found.cases)))
        low, high = _bootstrap_interval({"a": alone})
        naive += low < 0 < high
        false += wilcoxon_p(found.by_patient) < 0.05
    assert 87 <= hits <= 100
    assert naive < 85
    assert false <= 11


def test_patients_are_drawn_with_all_of_their_cases() -> None:
    """Davison and Hinkley 1997, 3.8: the mean over the cases of the drawn patients."""
    cases = {0: [0.3, 0.1, 0.2], 1: [-0.4], 2: [0.5, 0.9], 3: [0.0]}
    patients = [p for p, values in cases.items() for _ in values]
    values = np.array([v for found in cases.values() for v in found])
    low, high = _bootstrap_interval({"x": Differences(values, np.array(patients))})
    rng = numpy_rng(0, "report", "bootstrap", "x")
    draws = [
        np.mean([v for patient in row for v in cases[int(patient)]])
        for row in rng.integers(4, size=(NUM_RESAMPLES, 4))
    ]
    expected = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose((low, high), expected, atol=1e-12)


def test_a_patients_cases_are_one_unit_of_the_test(compared: Path) -> None:
    folder = compared.parent / "patients"
    shutil.copytree(compared, folder)
    for path in folder.glob("runs/*/cases.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        for row in rows:  # cases 0 and 1 are of one patient, 2 and 3 ...
            row["subject_id"] = f"p{int(row['case_id'][-2:]) // 2}"
        folders.write_rows(path, tuple(rows[0]), rows)
    before, _ = paired_tests(read_comparison(compared), "fedavg")
    after, by_site = paired_tests(read_comparison(folder), "fedavg")
    assert [t.difference for t in after] == [t.difference for t in before]
    assert [(t.num_cases, t.num_patients) for t in after] == [(26, 13)] * 2
    found = [t for t in by_site if (t.row, t.site) == ("ms_net", "a")]
    ours, theirs = (
        (_dice(folder, name, 0, "a") + _dice(folder, name, 1, "a")) / 2
        for name in ("ms_net", "fedavg")
    )
    means = (ours - theirs).reshape(5, 2).mean(axis=1)
    assert found[0].p == pytest.approx(wilcoxon(means, method="exact").pvalue)
    assert found[0].num_better + found[0].num_worse == 5


def _cross_site(folder: Path, *, level: dict[str, dict[str, float]]) -> Path:
    """Write runs of one method trained on a, on b; Dice by training and test site."""
    runs = []
    for only, sites in level.items():
        name = f"x-on-{only}"
        others = tuple(s for s in sites if s != only)
        plan = folders.Plan(
            "joint", sites=tuple(sites), held_out=others, overlays=False, num_rounds=2
        )
        folders.write_run(folder / name, plan)
        rows = [
            {"round": 2, "split": "test", "site": site, "case_id": f"c{index}",
             "class": "gland", "dice": dice + index / 100, "status": "ok"}
            for site, dice in sites.items()
            for index in range(4 if site == only else 6)
        ]  # fmt: skip
        folders.write_rows(folder / name / "cases.csv", tuple(rows[0]), rows)
        runs.append({"strategy": "joint", "seed": 0, "trained_on": only,
                     "held_out": None, "folder": name})  # fmt: skip
    (folder / "compare.json").write_text(json.dumps({"study": "x", "runs": runs}))
    return folder


def test_claims_about_the_diagonal_of_a_cross_site_table(tmp_path: Path) -> None:
    level = {"a": {"a": 0.9, "b": 0.5, "c": 0.6},
             "b": {"a": 0.7, "b": 0.8, "c": 0.4},
             "c": {"a": 0.3, "b": 0.6, "c": 0.7}}  # fmt: skip
    comparison = read_comparison(_cross_site(tmp_path, level=level))
    own, other = "joint (own site alone)", "joint (one other site alone)"
    whole, at_a = planned_tests(comparison, [(own, other, ""), (own, other, "a")])
    assert at_a.difference == pytest.approx(0.9 - (0.7 + 0.3) / 2)
    expected = (0.9 - 0.5 + 0.8 - 0.55 + 0.7 - 0.5) / 3
    assert whole.difference == pytest.approx(expected)
    # On the cases that both have: those of each site's own test split.
    assert (whole.num_cases, at_a.num_cases) == (12, 4)


def test_unseen_rows_meet_unseen_rows(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4)
    folder = folders.write_comparison(
        tmp_path / "c", ("fedavg", "ms_net"), (0,), leave_out=(None, "a"), plan=plan
    )
    overall, _ = paired_tests(read_comparison(folder), "fedavg")
    assert [t.row for t in overall] == ["ms_net", "ms_net (site unseen)"]
    assert [t.num_cases for t in overall] == [26, 10]


def test_seen_and_unseen_are_compared_only_with_training_alone(tmp_path: Path) -> None:
    plan = folders.Plan(overlays=False, num_rounds=4)
    folder = folders.write_comparison(tmp_path / "c", ("separate",), (0,), plan=plan)
    index = json.loads((folder / "compare.json").read_text())
    run = {"strategy": "fedavg", "seed": 0, "held_out": "a", "folder": "runs/x"}
    folders.write_run(folder / "runs/x", folders.Plan(overlays=False, num_rounds=4))
    (folder / "compare.json").write_text(json.dumps({"runs": [*index["runs"], run]}))
    comparison = read_comparison(folder)
    assert paired_tests(comparison, "fedavg") == ((), ())
    (test,), _ = paired_tests(comparison, "separate")
    assert (test.row, test.num_cases) == ("fedavg (site unseen)", 10)


def test_a_single_run_has_no_reference(tmp_path: Path) -> None:
    folder = folders.write_run(tmp_path / "run", folders.Plan(overlays=False))
    assert choose_reference(read_comparison(folder)) is None
