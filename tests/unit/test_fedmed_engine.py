"""The end of a round: who is asked, who is asked again, and what is believed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedmed.checkpoint import Checkpoints
from fedmed.errors import QuorumError, WireError
from fedmed.message import Answer, Message, SiteFailure, SiteId
from fedmed.round_end import check_rows
from fedmed.runfolder import CLASSIFICATION_COLUMNS, SEGMENTATION_COLUMNS
from fedmed.transports.inprocess import InProcessTransport

sys.path.insert(0, str(Path(__file__).parents[1]))
lost = importlib.import_module("tiny.lost")
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}
Spoil = Callable[[Message, Answer, int], Answer]


@dataclass
class Spoiling(InProcessTransport):
    """Lets a function change what one site answers; it sees how often it was asked."""

    site: SiteId
    spoil: Spoil
    asked: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers = super().exchange(messages, **how)
        if self.site in messages:
            sent = messages[self.site]
            self.asked.append(sent)
            before = sum(m.kind == sent.kind for m in self.asked) - 1
            answers[self.site] = self.spoil(sent, answers[self.site], before)
        return answers


def _study(**changes: Any) -> Any:
    return runs.make_study(runs.TABLE, "fedbn", **{"split": SPLIT, **changes})


def _keeping(**changes: Any) -> Any:
    """A study in which every site keeps something."""
    return runs.make_study(runs.TABLE, "scaffold", **{"split": SPLIT, **changes})


def _run(folder: Path, study: Any, site: SiteId, spoil: Spoil) -> tuple[Any, Any]:
    transport = Spoiling(site, spoil)
    return runs.run(study, folder, transport=transport), transport


def _fail_end(times: int, *, fatal: bool = False) -> Spoil:
    def spoil(sent: Message, answer: Answer, before: int) -> Answer:
        if sent.kind == "end_round" and before < times:
            return SiteFailure("timeout", "no answer", fatal)
        return answer

    return spoil


def _change_rows(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    def spoil(sent: Message, answer: Answer, before: int) -> Answer:
        if sent.kind != "end_round" or not isinstance(answer, Message):
            return answer
        rows = [change(dict(row)) for row in answer.header["rows"]]
        return replace(answer, header={**answer.header, "rows": rows})

    return spoil


def test_a_site_lost_between_two_exchanges_does_not_end_the_run(
    tmp_path: Path,
) -> None:
    """Its first answer is staged, but it files nothing, and may fail to the end."""

    def spoil(sent: Message, answer: Answer, before: int) -> Answer:
        is_first = sent.kind == "join" or (sent.kind != "end_round" and before == 0)
        return answer if is_first else SiteFailure("died", "gone", fatal=False)

    study = _study(
        rounds=1, strategy={"sync": "step"}, tolerance={"quorum": 0.5, "retries": 0}
    )
    result, transport = _run(tmp_path, study, "b", spoil)
    (record,) = result.rounds
    assert record["failed"] == {"b": "died: gone"}
    assert record["answered"] == ["a", "c"]
    ends = [message for message in transport.asked if message.kind == "end_round"]
    assert [message.header["after"] for message in ends] == [""]
    assert result.folder.read_summary()["missing"] == {"b": "died: gone"}
    assert sorted(result.folder.read_summary()["sites"]) == ["a", "c"]


def test_a_site_lost_between_two_exchanges_is_not_asked_without_need(
    tmp_path: Path,
) -> None:
    def spoil(sent: Message, answer: Answer, before: int) -> Answer:
        number = sent.header["round"]
        is_lost = number == 1 and sent.kind not in {"join", "end_round"} and before > 0
        return SiteFailure("died", "gone") if is_lost else answer

    study = _study(
        rounds=2, strategy={"sync": "step"}, tolerance={"quorum": 0.5, "retries": 0}
    )
    result, transport = _run(tmp_path, study, "b", spoil)
    ends = [message for message in transport.asked if message.kind == "end_round"]
    assert [message.header["round"] for message in ends] == [2]
    assert result.rounds[1]["answered"] == ["a", "b", "c"]
    assert result.folder.read_summary()["missing"] == {}


def test_the_end_of_a_round_is_asked_for_again(tmp_path: Path) -> None:
    """The site had filed its state already; the run ends with the same bytes."""
    study = _study(model={"norm": "batch"})
    whole = runs.run(study, tmp_path / "whole", transport=InProcessTransport())
    result, transport = _run(tmp_path / "again", study, "b", _fail_end(1))
    assert result.private("b").states
    assert sum(message.kind == "end_round" for message in transport.asked) == 3
    runs.require_same_files(whole, result, "cases", "model")
    assert result.rounds[0]["failed"] == {}


class Forgetful(runs.Recorder):
    """Sites that say that they keep nothing; `keeping` do keep something."""

    keeping: tuple[SiteId, ...] = ()

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers = super().exchange(messages, **how)
        for site, answer in answers.items():
            if isinstance(answer, Message) and site not in self.keeping:
                header = {**answer.header, "keeps": False}
                answers[site] = replace(answer, header=header)
        return answers


def _ends(transport: Any) -> dict[int, list[tuple[SiteId, Message]]]:
    """End-of-round messages by round."""
    found: dict[int, list[tuple[SiteId, Message]]] = {}
    for site, message in transport.down:
        if message.kind == "end_round":
            found.setdefault(message.header["round"], []).append((site, message))
    return found


@pytest.mark.parametrize("keeping", [(), ("b",)])
def test_nobody_is_asked_without_need(
    tmp_path: Path, keeping: tuple[SiteId, ...]
) -> None:
    """Four rounds, evaluated are the second and the last."""
    transport = Forgetful()
    transport.keeping = keeping
    study = _keeping(rounds=4, evaluate={"every": 2})
    result = runs.run(study, tmp_path, transport=transport)
    ends = _ends(transport)
    everybody = ["a", "b", "c"]
    for number, asked in {
        1: [*keeping],
        2: everybody,
        3: [*keeping],
        4: everybody,
    }.items():
        messages = ends.get(number, [])
        assert [site for site, _ in messages] == asked
        for _, message in messages:
            assert bool(message.tensors) == (number % 2 == 0)
    assert [r["exchanges"] for r in result.rounds] == [1 + bool(keeping), 2] * 2
    again = runs.run(study, tmp_path / "again")
    assert again.rounds[0]["loss"] == result.rounds[0]["loss"]


def test_what_is_kept_is_filed_where_the_server_can_resume(tmp_path: Path) -> None:
    """Drawn sites that are not drawn at the checkpoint still file what they kept."""
    transport = runs.Recorder()
    study = _keeping(
        rounds=5, sites_per_round=1, checkpoint={"every": 3}, evaluate={"every": 9}
    )
    result = runs.run(study, tmp_path, transport=transport)
    drawn = [record["answered"][0] for record in result.rounds]
    ends = _ends(transport)
    told = {
        n: [(s, m.header["values"]["file"]) for s, m in ms] for n, ms in ends.items()
    }
    assert told[1] == [(drawn[0], False)]
    assert told[2] == [(drawn[1], False)]
    assert told[3] == [(site, True) for site in sorted({*drawn[:3]})]
    assert told[4] == [(drawn[3], False)]
    versions = {
        (m.header["round"], site): m.header["version"]
        for site, m in transport.down
        if m.kind == "training"
    }
    for number, site in enumerate(drawn, start=1):
        earlier = [n for n, s in enumerate(drawn[: number - 1], start=1) if s == site]
        assert versions[number, site] == max(earlier, default=0)
    saved = Checkpoints(result.folder.checkpoints).rounds()
    assert saved == (3, 5)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("method", ["scaffold", "separate"])
def test_a_run_of_few_checkpoints_ends_with_the_same_bytes(
    tmp_path: Path, method: str, stop_after: int
) -> None:
    """It dies after a round that has no checkpoint, or is asked to stop."""
    study = runs.make_study(
        runs.TABLE, method, split=SPLIT, rounds=4, checkpoint={"every": 2}
    )
    whole = runs.run(study, tmp_path / "whole")
    plain = runs.make_study(runs.TABLE, method, split=SPLIT, rounds=4)
    same = runs.run(plain, tmp_path / "plain")
    assert _bytes(whole) == _bytes(same)
    died = lost.ServerDies(round=stop_after + 1)
    with pytest.raises(KeyboardInterrupt):
        runs.run(study, tmp_path / "died", transport=died)
    newest = max(Checkpoints(tmp_path / "died" / "checkpoints").rounds())
    assert newest == stop_after // 2 * 2
    again = runs.run(study, tmp_path / "died", resume=True)
    assert _bytes(again) == _bytes(whole)
    assert [r["round"] for r in again.rounds] == [1, 2, 3, 4]
    stops = iter([False] * stop_after + [True] * 9)
    runs.run(study, tmp_path / "stopped", should_stop=lambda: next(stops))
    stopped = runs.run(study, tmp_path / "stopped", resume=True)
    assert _bytes(stopped) == _bytes(whole)


def _bytes(result: Any) -> list[Any]:
    """Model and tables, and what the sites keep."""
    files = (result.folder.model_file, result.folder.cases_file)
    kept = [
        {
            f"{name}/{entry}": tensor.tolist()
            for name, state in result.private(site).states.items()
            for entry, tensor in state.items()
        }
        for site in "abc"
    ]
    return [*(file.read_bytes() for file in files), kept]


@pytest.mark.parametrize(("times", "fatal", "asked"), [(9, False, 3), (9, True, 1)])
def test_a_site_that_took_part_and_cannot_end_the_round(
    tmp_path: Path, times: int, fatal: bool, asked: int
) -> None:
    transport = Spoiling("b", _fail_end(times, fatal=fatal))
    study = _study(tolerance={"retries": 2, "quorum": 0.5})
    with pytest.raises(QuorumError, match="site b could not end the round"):
        runs.run(study, tmp_path, transport=transport)
    assert sum(message.kind == "end_round" for message in transport.asked) == asked


@pytest.mark.parametrize("fatal", [False, True])
def test_a_held_out_site_without_a_result_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fatal: bool
) -> None:
    study = _study(rounds=1, split={**SPLIT, "held_out": ["b"]})
    result, _ = _run(tmp_path, study, "b", _fail_end(9, fatal=fatal))
    summary = result.folder.read_summary()
    assert summary["missing"] == {"b": "timeout while evaluating: no answer"}
    assert sorted(summary["sites"]) == ["a", "c"]
    assert any(
        record.levelname == "ERROR" and "site b has no result" in record.message
        for record in caplog.records
    )


def test_a_site_speaks_for_itself_and_for_this_round_only(tmp_path: Path) -> None:
    """Extra columns are refused; what the server writes is the server's."""
    changed = _change_rows(lambda row: {**row, "site": "a", "round": 1})
    result, _ = _run(tmp_path, _study(rounds=1), "b", changed)
    assert "columns" in result.rounds[0]["refused"]["b"]
    lines = result.folder.cases_file.read_text().splitlines()
    sites = {line.split(",")[2] for line in lines}
    assert sites == {"site", "a", "c"}
    assert "columns" in result.folder.read_summary()["missing"]["b"]


def test_rows_of_a_split_that_was_not_asked_for_are_refused(tmp_path: Path) -> None:
    changed = _change_rows(lambda row: {**row, "split": "train"})
    result, _ = _run(tmp_path, _study(rounds=1), "b", changed)
    assert "'train'" in result.rounds[0]["refused"]["b"]
    assert sorted(result.folder.read_summary()["sites"]) == ["a", "c"]


def _row(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(set(SEGMENTATION_COLUMNS) - {"round", "site"}, 1.0)
    return {**row, "split": "test", **changes}


@pytest.mark.parametrize("dice", [0, 0.0, 1, 1.0, float("nan")])
def test_a_dice_that_can_be(dice: float) -> None:
    check_rows([_row(dice=dice)], SEGMENTATION_COLUMNS, ("test",))


@pytest.mark.parametrize("dice", [-0.1, 1.01, float("inf"), "0.5", None, True])
def test_a_dice_that_cannot_be(dice: Any) -> None:
    with pytest.raises(WireError, match="Dice"):
        check_rows([_row(), _row(dice=dice)], SEGMENTATION_COLUMNS, ("test",))


def test_a_missing_column_and_no_mapping() -> None:
    with pytest.raises(WireError, match="columns"):
        check_rows([{"split": "test"}], CLASSIFICATION_COLUMNS, ("test",))
    with pytest.raises(WireError, match="mapping"):
        check_rows(["row"], CLASSIFICATION_COLUMNS, ("test",))
