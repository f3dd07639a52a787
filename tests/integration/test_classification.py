"""Images with one class each, from the study file to the report."""

import json
import math

import pytest

pytestmark = pytest.mark.timeout(180)

STUDY = "studies/chest_xray.yaml"
SMALLER = [
    "rounds=6", "sites.cases_per_site=60", "sites.size=[32, 32, 1]",
    "preprocess.size=[32, 32]", "split.train=0.5", "split.validation=0",
    "split.test=0.5", "evaluate.every=9",
]  # fmt: skip
BRIEF = [
    *SMALLER, "rounds=1", "sites.cases_per_site=6", "sites.size=[16, 16, 1]",
    "preprocess.size=[16, 16]", "train.local_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(request):
    return request.config.rootpath / STUDY


@pytest.fixture(scope="module")
def finished(fedmed, study, tmp_path_factory):
    """The study of the repository, with smaller images: the run folder."""
    out = tmp_path_factory.mktemp("chest") / "run"
    ended = fedmed("run", study, *SMALLER, "--out", out, "--no-report")
    assert ended.code == 0, ended.err
    return out


def test_the_loss_falls_at_every_hospital(finished):
    lines = (finished / "rounds.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 6
    for site, first in losses[0].items():
        assert losses[-1][site] < 0.75 * first, site


def test_findings_are_recognised_in_new_patients(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["metric"] == "balanced_accuracy"
    assert sorted(summary["sites"]) == ["jsrt", "montgomery", "portable"]
    for values in (*summary["sites"].values(), summary["overall"]):
        assert {"accuracy", "balanced_accuracy", "auc"} <= set(values)
    # 90 patients, about half of them with a finding: chance has a standard deviation
    # of about 0.06.
    assert summary["overall"]["auc"] > 0.5 + 3 * 0.06
    assert summary["overall"]["balanced_accuracy"] > 0.5


def test_the_report_speaks_of_classes(fedmed, finished):
    shown = fedmed("report", finished)
    assert shown.code == 0, shown.err
    assert "Balanced accuracy" in shown.out
    page = (finished / "report.html").read_text()
    for words in ("Balanced accuracy in per cent", "Opacities in chest", "montgomery"):
        assert words in page
    assert "HD95" not in page


@pytest.mark.parametrize("strategy", ["silobn", "joint"])
def test_other_methods_classify_too(fedmed, study, work, strategy):
    # The newcomer has no statistics of silobn's; with joint, images are pooled.
    ended = fedmed(
        "run", study, *BRIEF, f"strategy.name={strategy}", "split.held_out=[portable]",
        "--out", work / "run", "--no-report", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = ended.record["metrics"]["portable"]["balanced_accuracy"]
    assert math.isfinite(found)


def test_a_network_for_outlines_is_refused(fedmed, study, work):
    ended = fedmed(
        "run", study, *BRIEF, "model={name: unet, mode: slice}", "--out", work / "run"
    )
    told = ended.refused(2)
    assert "one class each" in told
    assert "model.name: classifier" in told
