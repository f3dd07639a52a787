"""What the script makes of results: claims, their words, and the page."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.multi_site import arguments, write
from benchmarks.multi_site_page import section, verdict, with_section
from benchmarks.multi_site_questions import QUESTIONS, Claim, Question
from fedmed.legs import Leg, read_method, study_of
from fedmed.report.run_folder import read_comparison
from fedmed.report.significance import PairedTest, planned_tests
from fedmed.study import apply_overrides, read_yaml, study_from_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")

ROOT = Path(__file__).parents[2]
TEST = PairedTest(
    "m", "", 0.02, 0.01, 0.03, 20, 15, 5, (0.01, 0.03), 0.001, 0.01, leaning=1
)
MS_NET = Claim("ms_net", "separate")
CLAIMS = (MS_NET, Claim("separate", "fedavg", "b"), Claim("ms_net", "absent"))
QUESTION = Question(
    "try",
    "A try",
    "studies/ms_net_prostate.yaml",
    ("separate", "fedavg", "ms_net"),
    CLAIMS,
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("t") / "c"
    plan = folders.Plan(overlays=False, num_rounds=2, missed_case=None)
    methods = ("separate", "fedavg", "ms_net", "fedbn")
    folders.write_comparison(folder, methods, (0, 1), plan=plan)
    for lock in folder.glob("runs/*/study.lock.yaml"):
        text = lock.read_text() + "train: {local_steps: 5, batch_size: 4}\n"
        lock.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "**holds**"),
        ({"p_holm": 0.06}, "not shown: may be chance"),
        ({"p_holm": math.nan}, "not shown: may be chance"),
        ({"difference": -0.02, "leaning": -1}, "**the reverse holds**"),
        (
            {"leaning": -1},
            "not shown: patients' ranks lean the other way than the mean over sites",
        ),
        ({"difference": math.nan}, "not measured"),
        ({"seed_differences": (-0.01, 0.05)}, "**holds**, though not with every seed"),
    ],
)
def test_words_of_a_claim(changes: dict[str, Any], told: str) -> None:
    assert verdict(MS_NET, replace(TEST, **changes)) == told


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-0.01, 0.009, "**holds**"),
        (0.011, 0.02, "**does not hold**"),
        (0.005, 0.02, "not shown"),
        (math.nan, math.nan, "not measured"),
    ],
)
def test_words_of_a_cost(low: float, high: float, told: str) -> None:
    claim = Claim("step", "round", margin=1.0)
    assert verdict(claim, replace(TEST, low=low, high=high)).startswith(told)


def test_claims_are_tested_over_cases_at_their_site(compared: Path) -> None:
    comparison = read_comparison(compared)
    plan = [(claim.better, claim.worse, claim.site) for claim in CLAIMS]
    overall, at_b, absent = planned_tests(comparison, plan)
    assert overall.num_cases == sum(folders.NUM_TEST.values())
    assert at_b.num_cases == folders.NUM_TEST["b"]
    assert math.isnan(absent.difference)
    assert absent.num_cases == 0
    cells: dict[tuple[str, str], list[float]] = {}
    for entry in comparison.entries:
        for row in entry.run.cases:
            cells.setdefault((entry.strategy, row["site"]), []).append(
                float(row["dice"])
            )
    means = {key: np.mean(values) for key, values in cells.items()}
    expected = np.mean([means["ms_net", s] - means["separate", s] for s in "abc"])
    assert overall.difference == pytest.approx(expected)
    # Holm over the two that could be tested.
    smaller, larger = sorted((overall.p, at_b.p))
    assert min(overall.p_holm, at_b.p_holm) == pytest.approx(min(1, 2 * smaller))
    assert max(overall.p_holm, at_b.p_holm) == pytest.approx(max(2 * smaller, larger))


def test_section_holds_the_rows_asked_for_and_every_claim(compared: Path) -> None:
    text = section(QUESTION, read_comparison(compared))
    table = [line for line in text.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in table]
    assert names[:5] == [
        "Dice, %, profile strict",
        "---",
        "separate",
        "fedavg",
        "ms_net",
    ]
    assert "fedbn" not in text
    for claim in CLAIMS:
        assert str(claim) in names
    assert "not measured" in text
    assert "6 runs" in text
    assert "10 steps with 4 examples" in text


def test_rows_of_other_protocols_stay_out(tmp_path: Path) -> None:
    """One folder holds runs that saw a site, that did not, and that saw one only."""
    plan = folders.Plan(overlays=False, num_rounds=2, sites=("a", "b"))
    folders.write_comparison(
        tmp_path / "c", ("joint", "masf"), (0,), leave_out=(None, "a", "b"), plan=plan
    )
    index = json.loads((tmp_path / "c" / "compare.json").read_text())
    for only, out in (("a", "b"), ("b", "a")):
        name = f"runs/joint-on-{only}"
        run = folders.Plan(**{**vars(plan), "strategy": "joint", "held_out": (out,)})
        folders.write_run(tmp_path / "c" / name, run)
        index["runs"].append(
            {"strategy": "joint", "seed": 0, "trained_on": only, "folder": name}
        )
    (tmp_path / "c" / "compare.json").write_text(json.dumps(index))
    for lock in (tmp_path / "c").glob("runs/*/study.lock.yaml"):
        text = lock.read_text() + "train: {local_steps: 5, batch_size: 4}\n"
        lock.write_text(text)
    question = replace(QUESTIONS["brain"], left_out=("masf", "joint"))
    text = section(question, read_comparison(tmp_path / "c"))
    table = [line for line in text.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in table]
    rows = ["masf (site unseen)", "joint (site unseen)"]
    single = ["joint (trained on a)", "joint (trained on b)"]
    assert names[2:6] == rows + single
    assert names[6:11] == ["Tested on", "---", "a", "b", "mean of unseen sites"]
    assert "6 runs" in text
    claims = [str(claim) for claim in question.claims]
    assert names[-len(claims) :] == claims
    assert "not measured" not in text


def test_a_section_replaces_itself_and_nothing_else(compared: Path) -> None:
    page = compared / "results.md"
    page.write_text("# Results\n\nBefore.\n")
    write(QUESTION, compared, page)
    once = page.read_text()
    page.write_text(once + "\nAfter.\n")
    write(QUESTION, compared, page)
    assert page.read_text() == once + "\nAfter.\n"
    assert once.startswith("# Results\n\nBefore.\n\n<!-- multi_site try -->\n## A try")
    changed = with_section(once, "other", "text\n")
    assert changed.startswith(once)
    assert changed.endswith(
        "<!-- multi_site other -->\ntext\n<!-- end of multi_site other -->\n"
    )


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_questions_ask_for_what_there_is(question: Question) -> None:
    content = apply_overrides(read_yaml(ROOT / question.study), question.changes)
    study = study_from_dict(content)
    known = {path.stem for path in (ROOT / "strategies").glob("*.py")}
    for method in (*question.methods, *question.left_out, *question.single):
        assert read_method(method)[0] in known
        study_of(content, study, Leg(method, 0, None, ""))
    for claim in question.claims:
        assert {claim.better, claim.worse} <= set(question.labels)
    same = [q for q in QUESTIONS.values() if q.folder == question.folder]
    assert len({q.study for q in same}) == len({q.changes for q in same}) == 1


def test_seeds_and_changes_are_read() -> None:
    given = arguments(["prostate", "--seeds", "3,4", "--jobs", "2", "rounds=2"])
    assert (given.seeds, given.change, given.jobs) == ([3, 4], ["rounds=2"], 2)
    assert arguments(["all"]).seeds is None
    assert {q.num_seeds for q in QUESTIONS.values()} == {2, 3, 5}
