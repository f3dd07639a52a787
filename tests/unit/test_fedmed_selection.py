"""The round that validation picks: the same as a run that ended there."""

from __future__ import annotations

import csv
import importlib
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedmed.checkpoint import Checkpoints
from fedmed.errors import ConfigError
from fedmed.legs import content_hash
from fedmed.message import Answer, Message, SiteId
from fedmed.report.page import build_report
from fedmed.report.run_folder import read_comparison
from fedmed.report.selected import selected_table
from fedmed.transports.inprocess import InProcessTransport

sys.path.insert(0, str(Path(__file__).parents[1]))
lost = importlib.import_module("tiny.lost")
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

NUM_ROUNDS = 8
GOES_WRONG = {
    "fedavg": (5.0, 0),
    "fedbn": (8.0, 2),
    "joint": (5.0, 0),
    "per_fedavg": (0.5, 0),
    "scaffold": (5.0, 1),
    "separate": (5.0, 0),
}
"""Rates too high, and seeds, with which a round well before the last is the best."""
SAME = ("selected", "cases", "model", "summary")
SPLIT = {"train": 0.4, "validation": 0.3, "test": 0.3}


def _study(method: str = "fedbn", *, base: Any = None, **changes: Any) -> Any:
    """A study whose last rounds are worse than an earlier one."""
    rate, seed = GOES_WRONG[method]
    plain = {
        "rounds": NUM_ROUNDS,
        "seed": seed,
        "split": SPLIT,
        "train": {**runs.IMAGE["train"], "optimizer": {"name": "sgd", "lr": rate}},
        "evaluate": {"every": 1, "overlays": 0, "selected": True},
    }
    for key, value in changes.items():
        is_section = isinstance(value, Mapping) and key in plain
        plain[key] = {**plain[key], **value} if is_section else value
    return runs.make_study(base or runs.IMAGE, method, **plain)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _picked(result: Any) -> int:
    """Number of the round, which the best score must have been that of."""
    found = result.rounds[-1]["selected"]
    scores = [record["score"] for record in result.rounds]
    assert found["score"] == max(scores)
    assert found["round"] == 1 + scores.index(max(scores))
    return int(found["round"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return runs.run(_study(), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("method", GOES_WRONG)
def test_it_is_what_a_run_that_ends_there_gives(method: str, tmp_path: Path) -> None:
    """With all that the sites kept then: normalisation, whole networks, variates."""
    long = runs.run(_study(method), tmp_path / "long")
    number = _picked(long)
    assert 1 < number <= NUM_ROUNDS - 3  # the private versions of then are gone
    evaluate = {"selected": False}
    short = runs.run(_study(method, rounds=number, evaluate=evaluate), tmp_path / "s")
    last = [r for r in _rows(short.folder.cases_file) if int(r["round"]) == number]
    assert {row["split"] for row in last} == {"validation", "test"}
    assert _rows(long.folder.selected_file) == last
    assert not short.folder.selected_file.exists()
    summary = long.folder.read_summary()
    ended = short.folder.read_summary()
    assert summary["selected"]["sites"] == ended["sites"] != summary["sites"]
    assert summary["selected"]["round"] == number


def test_a_hospital_left_out_has_no_say(tmp_path: Path) -> None:
    study = _study(split={"held_out": ["c"]})
    result = runs.run(study, tmp_path)
    number = _picked(result)
    assert number < NUM_ROUNDS
    with pytest.raises(ConfigError, match="name adabn first"):
        _study(split={"held_out": ["c"]}, evaluate={"unseen": ["average", "adabn"]})
    rows = _rows(result.folder.selected_file)
    assert {row["split"] for row in rows if row["site"] == "c"} == {"test"}
    assert result.folder.read_summary()["selected"]["held_out"]["sites"].keys() == {"c"}
    assert all("c" not in r["validation"] for r in result.rounds if r["validation"])


def test_of_the_last_round_nothing_is_asked_twice(tmp_path: Path) -> None:
    transport = runs.Recorder()
    result = runs.run(_study(rounds=1), tmp_path, transport=transport)
    assert "evaluate_selected" not in {message.kind for _, message in transport.down}
    assert _picked(result) == 1
    assert _rows(result.folder.selected_file) == _rows(result.folder.cases_file)


def test_nobody_is_asked_without_need(tmp_path: Path) -> None:
    transport = runs.Recorder()
    study = _study(evaluate={"selected": False})
    result = runs.run(study, tmp_path, transport=transport)
    assert "evaluate_selected" not in {message.kind for _, message in transport.down}
    assert all("best" not in m.header.get("values", {}) for _, m in transport.down)
    assert "selected" not in result.folder.read_summary()
    assert "selected" not in result.rounds[-1]
    assert not [*tmp_path.glob("sites/*/private/selected*")]


def test_it_does_not_depend_on_checkpoints(whole: Any, tmp_path: Path) -> None:
    again = runs.run(_study(checkpoint={"every": 99}), tmp_path)
    runs.require_same_files(whole, again, "selected", "model", "summary")


@pytest.mark.parametrize(
    ("kind", "number"),
    [("evaluate_selected", NUM_ROUNDS), ("end_round", NUM_ROUNDS), ("end_round", 4)],
)
def test_a_resumed_run_picks_the_same(
    whole: Any, tmp_path: Path, kind: str, number: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs.run(_study(), tmp_path, transport=lost.ServerDies(kind, number))
    again = runs.run(_study(), tmp_path, resume=True)
    runs.require_same_files(whole, again, *SAME)


def test_a_run_that_dies_after_its_last_checkpoint_picks_the_same(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedmed.run.write_state", die)
        with pytest.raises(KeyboardInterrupt):
            runs.run(_study(), tmp_path)
    for _ in range(2):  # a finished run may be resumed too
        again = runs.run(_study(), tmp_path, resume=True)
        runs.require_same_files(whole, again, *SAME)


def test_a_checkpoint_damaged_between_two_sittings_is_named(
    whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the last round would pass for the best one."""
    with pytest.raises(KeyboardInterrupt):
        runs.run(_study(), tmp_path, transport=lost.ServerDies("end_round", NUM_ROUNDS))
    number = _picked(whole)
    (file,) = tmp_path.glob(f"checkpoints/round-*{number}.safetensors")
    file.write_bytes(b"damaged")
    with caplog.at_level(logging.ERROR):
        again = runs.run(_study(), tmp_path, resume=True)
    assert f"validation picks round {number}, but" in caplog.text
    assert again.folder.read_summary()["selected"] is None
    assert selected_table(read_comparison(tmp_path)) is None


def test_an_old_private_version_that_nobody_needs_may_be_damaged(
    whole: Any, tmp_path: Path
) -> None:
    dying = lost.ServerDies("end_round", NUM_ROUNDS - 1)
    with pytest.raises(KeyboardInterrupt):
        runs.run(_study(), tmp_path, transport=dying)
    oldest = min(tmp_path.glob("sites/a/private/round-*"))
    oldest.write_bytes(b"damaged")
    again = runs.run(_study(), tmp_path, resume=True)
    runs.require_same_files(whole, again, *SAME)


def test_a_round_that_lacks_a_site_is_not_the_best(tmp_path: Path) -> None:
    """The mean of the others is higher where the weakest site failed."""
    train = {**runs.IMAGE["train"], "optimizer": {"name": "sgd", "lr": 0.5}}
    tolerance = {"quorum": 0.5, "retries": 0}
    study = _study("fedavg", rounds=3, seed=1, train=train, tolerance=tolerance)
    plain = runs.run(study, tmp_path / "plain")
    assert _picked(plain) == 3
    before = plain.rounds[1]["validation"]
    weakest = min("abc", key=lambda site: before[site])
    silent = lost.LostAt(weakest, round=3)
    result = runs.run(study, tmp_path / "silent", transport=silent)
    assert weakest not in result.rounds[2]["validation"]
    first, second, lacking = (record["score"] for record in result.rounds)
    assert first < second < lacking
    picked = result.rounds[-1]["selected"]
    assert (picked["round"], picked["score"]) == (2, second)


def test_a_site_that_fails_there_is_named_and_took_part(
    whole: Any, tmp_path: Path
) -> None:
    study = _study(tolerance={"retries": 0})
    silent = lost.LostAt("b", "evaluate_selected")
    result = runs.run(study, tmp_path, transport=silent)
    last, summary = result.rounds[-1], result.folder.read_summary()
    assert last["answered"] == ["a", "b", "c"]
    assert not last["failed"]
    assert sorted(summary["selected"]["sites"]) == ["a", "c"]
    assert summary["selected"]["missing"].keys() == {"b"}
    assert summary["sites"] == whole.folder.read_summary()["sites"]
    table = selected_table(read_comparison(tmp_path))
    assert table is not None
    assert table.grid.rows[0][-1].text == "\u2013"  # not of the same sites
    assert table.notes[-1].startswith("Site b has no result in a round picked")


def test_without_any_score_nothing_is_picked(tmp_path: Path) -> None:
    """A file of splits may name no validation case."""
    split = tmp_path / "split.csv"
    lines = [f"case{i},{'train' if i < 3 else 'test'}" for i in range(6)]
    split.write_text("\n".join(["case_id,split", *lines]))
    study = _study("fedavg", rounds=1, split={**SPLIT, "file": str(split)})
    result = runs.run(study, tmp_path / "run")
    assert result.rounds[-1]["selected"] == {"round": None, "score": None}
    assert result.folder.read_summary()["selected"] is None
    assert selected_table(read_comparison(tmp_path / "run")) is None


def test_a_damaged_checkpoint_costs_only_the_selection(
    whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = _picked(whole)

    class Spoiling(InProcessTransport):
        def exchange(
            self, messages: Mapping[SiteId, Message], **how: Any
        ) -> dict[SiteId, Answer]:
            for message in messages.values():
                if message.header.get("round") == NUM_ROUNDS:
                    (file,) = tmp_path.glob(f"checkpoints/round-*{number}.safetensors")
                    file.write_bytes(b"damaged")
            return super().exchange(messages, **how)

    with caplog.at_level(logging.ERROR):
        result = runs.run(_study(), tmp_path, transport=Spoiling())
    assert f"validation picks round {number}, but" in caplog.text
    assert result.folder.read_summary()["selected"] is None
    runs.require_same_files(whole, result, "cases")


def test_the_report_shows_both_rounds(whole: Any) -> None:
    comparison = read_comparison(whole.folder.path)
    table = selected_table(comparison)
    assert table is not None
    (line,) = [[box.text for box in row] for row in table.grid.rows]
    assert line[:2] == ["fedbn", str(_picked(whole))]
    summary = whole.folder.read_summary()
    dice = [summary["selected"]["sites"][site]["dice"] for site in "abc"]
    assert [text.partition(" ")[0] for text in line[2:5]] == [
        f"{100 * value:.2f}" for value in dice
    ]
    gain = summary["selected"]["overall"]["dice"] - summary["overall"]["dice"]
    assert line[-1].replace("\u2212", "-") == f"{100 * gain:+.2f}"
    page = build_report(whole.folder.path).read_text(encoding="utf-8")
    assert "The round that validation picks" in page


def test_runs_of_one_row_say_how_often(whole: Any, tmp_path: Path) -> None:
    listed = []
    for seed in (0, 1, 2):
        study = _study(seed=seed, rounds=2)
        runs.run(study, tmp_path / str(seed))
        listed.append({"strategy": "fedbn", "seed": seed, "folder": str(seed)})
    (tmp_path / "compare.json").write_text(json.dumps({"study": "x", "runs": listed}))
    table = selected_table(read_comparison(tmp_path))
    assert table is not None
    picks = [_picked(runs.Result(runs.RunFolder(tmp_path / str(s)))) for s in range(3)]
    said = table.grid.rows[0][1].text
    for number in {*picks}:
        times = picks.count(number)
        assert f"{number} ({times} run{'s' if times > 1 else ''})" in said


def test_a_study_without_the_key_has_no_table_and_the_hash_of_old() -> None:
    """Comparisons that were begun before the key go on with the runs they have."""
    plain, asked = (_study(evaluate={"selected": on}) for on in (False, True))
    assert content_hash(plain, "data") != content_hash(asked, "data")
    older = plain.to_dict()
    del older["evaluate"]["selected"]
    assert content_hash(type(plain).model_validate(older), "data") == content_hash(
        plain, "data"
    )


def test_without_validation_cases_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="validation: 0 leaves none"):
        _study(split={"train": 0.6, "validation": 0.0, "test": 0.4})


def test_every_picked_round_is_on_disk(whole: Any) -> None:
    kept = Checkpoints(whole.folder.checkpoints).rounds()
    assert _picked(whole) in kept
