"""Rules for hospitals that took no part: what they give, and what had to leave."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fedmed.errors import PolicyError
from fedmed.message import Answer, Message, SiteFailure, SiteId
from fedmed.partition import describe_state
from fedmed.study import UnseenRule, study_from_dict
from fedmed.unseen import NEEDS_SETS, RE_ESTIMATES, shareable
from sites.context import Workbench
from sites.host import open_host
from sites.ledger import LEDGER_FILE

sys.path.insert(0, str(Path(__file__).parents[1]))
lost = importlib.import_module("tiny.lost")
runs = importlib.import_module("tiny.runs")
hospitals = importlib.import_module("tiny.hospitals")
modules_are_listed_once = runs.modules_are_listed_once

RULES = ("adabn", "average", "average_adabn", "nearest", "ensemble")
EPS = 1e-5
"""Of torch's batch normalisation."""


def _study(
    method: str = "fedbn", base: Mapping[str, Any] = runs.TABLE, **how: Any
) -> Any:
    """Site c is held out."""
    split = {"held_out": ["c"]}
    model = {"norm": "batch"}
    return runs.make_study(base, method, **{"split": split, "model": model, **how})


def _rules(*rules: str, **more: Any) -> dict[str, Any]:
    return {"evaluate": {"unseen": list(rules), **more}}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _by_rule(result: Any) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in _read(result.folder.unseen_file):
        found.setdefault(row["rule"], []).append(row)
    return found


def _scores(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([float(row["score"]) for row in rows])


def _features(site: SiteId) -> np.ndarray:
    (found,) = [s for s in hospitals.open_sites(kind="table") if s.site_id == site]
    return np.stack([ref.read().image for ref in found.cases]).astype(np.float64)


def _kept(result: Any, site: SiteId) -> dict[str, np.ndarray]:
    state = result.private(site).states["kept"]
    return {name.rpartition(".")[2]: t.numpy() for name, t in state.items()}


def _predicted(result: Any, norm: Mapping[str, Any]) -> Any:
    """Probability of class 1 of each of c's rows, in NumPy, with one set."""
    shared = {name: tensor.numpy() for name, tensor in result.shared.items()}
    hidden = _features("c") @ shared["encoder.layers.0.weight"].T
    hidden = (hidden - norm["running_mean"]) / np.sqrt(norm["running_var"] + EPS)
    hidden = np.maximum(hidden * norm["weight"] + norm["bias"], 0)
    logits = hidden @ shared["head.weight"].T + shared["head.bias"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds[:, 1] / odds.sum(axis=1)


def _average(first: Mapping[str, Any], second: Mapping[str, Any], p: float) -> Any:
    """Set of two sites by total variance; `p` is the weight of the first."""
    names = ("weight", "bias", "running_mean")
    norm = {name: p * first[name] + (1 - p) * second[name] for name in names}
    square = p * (first["running_var"] + first["running_mean"] ** 2)
    square += (1 - p) * (second["running_var"] + second["running_mean"] ** 2)
    return norm | {"running_var": square - norm["running_mean"] ** 2}


@pytest.fixture(scope="module")
def every_rule(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("every")
    return runs.run(_study(**_rules(*RULES)), folder)


def test_average_is_that_of_sets_by_total_variance(every_rule: Any) -> None:
    norm = _average(_kept(every_rule, "a"), _kept(every_rule, "b"), 0.5)
    rows = _by_rule(every_rule)["average"]
    np.testing.assert_allclose(_scores(rows), _predicted(every_rule, norm), atol=1e-6)
    assert {row["sets_of"] for row in rows} == {"a b"}


def test_average_weighs_sites_as_the_strategy_does(tmp_path: Path) -> None:
    """Site a has 6 examples, site b 5."""
    study = _study(**_rules("average"), strategy={"weighting": "examples"})
    result = runs.run(study, tmp_path)
    sets = _kept(result, "a"), _kept(result, "b")
    rows = _by_rule(result)["average"]
    expected = _predicted(result, _average(*sets, 6 / 11))
    np.testing.assert_allclose(_scores(rows), expected, atol=1e-6)
    assert np.abs(expected - _predicted(result, _average(*sets, 0.5))).max() > 1e-5


def test_ensemble_is_the_mean_of_the_predictions(every_rule: Any) -> None:
    apart = [_predicted(every_rule, _kept(every_rule, site)) for site in "ab"]
    rows = _by_rule(every_rule)["ensemble"]
    np.testing.assert_allclose(_scores(rows), np.mean(apart, axis=0), atol=1e-6)
    assert {row["sets_of"] for row in rows} == {"a b"}
    other = _by_rule(every_rule)["average"]
    assert np.abs(_scores(rows) - _scores(other)).max() > 1e-4


def test_average_adabn_has_the_newcomers_own_statistics(every_rule: Any) -> None:
    norm = _average(_kept(every_rule, "a"), _kept(every_rule, "b"), 0.5)
    weight = every_rule.shared["encoder.layers.0.weight"].numpy()
    hidden = _features("c") @ weight.T  # one batch holds all three rows
    norm |= {"running_mean": hidden.mean(0), "running_var": hidden.var(0, ddof=1)}
    rows = _by_rule(every_rule)["average_adabn"]
    np.testing.assert_allclose(_scores(rows), _predicted(every_rule, norm), atol=1e-6)


def test_adabn_starts_from_initial_scale_and_shift(every_rule: Any) -> None:
    weight = every_rule.shared["encoder.layers.0.weight"].numpy()
    hidden = _features("c") @ weight.T
    norm: dict[str, Any] = {"weight": 1.0, "bias": 0.0}
    norm |= {"running_mean": hidden.mean(0), "running_var": hidden.var(0, ddof=1)}
    rows = _by_rule(every_rule)["adabn"]
    np.testing.assert_allclose(_scores(rows), _predicted(every_rule, norm), atol=1e-6)
    assert {row["sets_of"] for row in rows} == {""}


@dataclass
class Carded(runs.Recorder):  # type: ignore[misc, name-defined]
    """Sites that say more on their cards."""

    cards: Mapping[SiteId, Mapping[str, Any]] | None = None

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers: dict[SiteId, Answer] = super().exchange(messages, **how)
        for site, answer in answers.items():
            if isinstance(answer, Message) and answer.kind == "Card":
                values = answer.header["values"]
                card = {**values["card"], "facts": (self.cards or {})[site]}
                header = {**answer.header, "values": {**values, "card": card}}
                answers[site] = replace(answer, header=header)
        return answers


@pytest.mark.parametrize(("field", "nearest"), [(1.5, "a"), (3.0, "b")])
def test_nearest_is_the_set_of_the_site_with_the_like_card(
    tmp_path: Path, field: float, nearest: SiteId
) -> None:
    cards = {"a": {"field_T": 1.5}, "b": {"field_T": 3.0}, "c": {"field_T": field}}
    transport = Carded(cards=cards)
    result = runs.run(_study(**_rules("nearest")), tmp_path, transport=transport)
    rows = _by_rule(result)["nearest"]
    expected = _predicted(result, _kept(result, nearest))
    np.testing.assert_allclose(_scores(rows), expected, atol=1e-6)
    assert {row["sets_of"] for row in rows} == {nearest}
    sent = [m for _, m in transport.down if m.kind == "evaluate_newcomer"]
    assert [m.header["values"]["sets"] for m in sent] == [1]
    # Nobody else's leaves.
    assert [site for site, m in transport.up if m.kind == "Normalisation"] == [nearest]


@pytest.mark.parametrize("first", RULES)
def test_the_first_rule_is_the_result(
    every_rule: Any, tmp_path: Path, first: str
) -> None:
    others = [rule for rule in ("average", "adabn") if rule != first]
    result = runs.run(_study(**_rules(first, *others)), tmp_path)
    drop = ("rule", "sets_of")
    wanted = _by_rule(every_rule)[first]
    main = [row for row in _read(result.folder.cases_file) if row["site"] == "c"]
    assert main == [{k: v for k, v in r.items() if k not in drop} for r in wanted]
    assert _by_rule(result) == {r: _by_rule(every_rule)[r] for r in (first, *others)}
    assert result.folder.read_summary()["held_out"]["sites"].keys() == {"c"}


def test_without_a_rule_there_is_one_result(every_rule: Any, tmp_path: Path) -> None:
    plain = runs.run(_study(), tmp_path)
    assert not plain.folder.unseen_file.exists()
    runs.require_same_files(plain, every_rule, "cases", "model")


def _normal(message: Message) -> set[str]:
    """Names in a message that belong to normalisation or an auxiliary decoder."""
    words = ("norm", "auxiliary", "adapter")
    return {n for n in message.tensors if any(w in n.split("/")[-1] for w in words)}


METHODS = ("fedbn", "silobn", "dsbn", "ms_net", "series_adapter")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rules", [("adabn",), RULES])
def test_what_leaves_is_asked_for_once_and_only_by_a_rule(
    tmp_path: Path, method: str, rules: tuple[str, ...]
) -> None:
    transport = runs.Recorder()
    study = _study(method, runs.IMAGE, **_rules(*rules))
    runs.run(study, tmp_path, transport=transport)
    sharing = [(s, m) for s, m in transport.up if m.kind == "Normalisation"]
    others = [(s, m) for s, m in transport.up if m.kind != "Normalisation"]
    kept = Workbench(study, "a", runs.CACHE).partition.kept
    assert not {name.partition("/")[2] for _, m in others for name in m.tensors} & {
        *kept
    }
    if rules == ("adabn",):
        assert not sharing
        assert not any("newcomer" in m.kind for _, m in transport.down)
        return
    assert [site for site, _ in sharing] == ["a", "b"]
    for _, message in sharing:
        names = {name.removeprefix("state/") for name in message.tensors}
        assert names <= {*kept}
        assert names
        assert not any("auxiliary" in name for name in names)
    asked = [m.header["round"] for _, m in transport.down if "share" in m.kind]
    assert asked == [2, 2]


def test_a_newcomer_gets_sets_and_training_sites_get_none(tmp_path: Path) -> None:
    transport = runs.Recorder()
    runs.run(_study(**_rules(*RULES)), tmp_path, transport=transport)
    got = {site for site, m in transport.down if _normal(m)}
    assert got == {"c"}


def _entry_names(method: str) -> set[str]:
    bench = Workbench(_study(method, runs.IMAGE), "a", runs.CACHE)
    chosen = shareable(bench.partition, bench.strategy.training_only)
    return {entry.name for entry in chosen}


@pytest.mark.parametrize(
    "method", ["dual_stream", "separate", "fedavg", "joint", "epi_fcr"]
)
def test_there_is_no_rule_for_whole_layers(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor for methods that keep nothing; the run is that without rules."""
    assert not _entry_names(method)
    base = runs.IMAGE
    plain = runs.run(_study(method, base), tmp_path / "plain")
    transport = runs.Recorder()
    study = _study(method, base, **_rules("average", "nearest"))
    asked = runs.run(study, tmp_path / "asked", transport=transport)
    assert not any("share" in m.kind for _, m in transport.down)
    runs.require_same_files(plain, asked, "cases")
    assert not asked.folder.unseen_file.exists()
    said = [r for r in caplog.records if "keeps layers" in r.message]
    assert bool(said) == (method in {"dual_stream", "separate"})


def test_what_would_be_shared_is_normalisation_and_adapters() -> None:
    bench = Workbench(_study("ms_net", runs.IMAGE), "a", runs.CACHE)
    model = bench.model
    norms = {e.name for e in describe_state(model) if e.role.startswith("norm")}
    counters = {e.name for e in describe_state(model) if e.role == "counter"}
    own = {name for name in norms | counters if not name.startswith("auxiliary")}
    assert _entry_names("ms_net") == own
    assert own < norms | counters
    statistics = {n for n in _entry_names("fedbn") if "running" in n or "num" in n}
    assert _entry_names("silobn") == statistics
    assert any("adapter" in n for n in _entry_names("series_adapter"))


def _policy(folder: Path, kinds: str) -> dict[str, Any]:
    policy = folder / "policy.yaml"
    policy.write_text(f"allowed_kinds: [{kinds}]\ncase_ids: keep\nmin_count: 0\n")
    return {"sites": {"policy": str(policy)}}


def test_a_policy_refuses_and_the_run_goes_on(tmp_path: Path) -> None:
    allowed = _policy(tmp_path, "Card, Metrics, Weights")
    study = _study(**_rules("average", "adabn"), **allowed)
    result = runs.run(study, tmp_path / "run")
    last = result.rounds[-1]
    assert last["not_shared"].keys() == {"a", "b"}
    assert "allowed_kinds" in last["not_shared"]["a"]
    assert "average" in last["failed"]["c"]
    assert not any(row["site"] == "c" for row in _read(result.folder.cases_file))
    assert [*_by_rule(result)] == ["adabn"]
    assert "average" in result.folder.read_summary()["missing"]["c"]


def test_what_is_shared_is_on_the_ledger(every_rule: Any) -> None:
    for site, times in {"a": 1, "b": 1, "c": 0}.items():
        path = every_rule.folder.ledger / site / LEDGER_FILE
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum(line["kind"] == "Normalisation" for line in lines) == times


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"evaluate": {"unseen": ["adabn"]}}, 2),
        ({"split": {"held_out": []}}, 2),
        ({}, 1),
        ({}, 3),
    ],
)
def test_a_server_that_asks_out_of_turn_gets_nothing(
    tmp_path: Path, changes: dict[str, Any], number: int
) -> None:
    study = _study(**{**_rules("average"), **changes})
    options = {
        "study": study.to_dict(),
        "folder": str(tmp_path),
        "cache": str(runs.CACHE),
        "durable": False,
    }
    host = open_host("a", options)
    header = {"round": number, "version": 0, "values": {}, "states": ["weights"]}
    with pytest.raises(PolicyError, match="never else"):
        host.handle(Message("share_normalisation", header))
    host.close()


@dataclass
class Spoiling(runs.Recorder):  # type: ignore[misc, name-defined]
    """Site b shares something that nobody can use."""

    fault: str = ""
    asked: int = 0

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers: dict[SiteId, Answer] = super().exchange(messages, **how)
        sent, answer = messages.get("b"), answers.get("b")
        if sent is None or sent.kind != "share_normalisation":
            return answers
        self.asked += 1
        if self.fault == "silent":
            answers["b"] = SiteFailure("timeout", "no answer")
        elif isinstance(answer, Message):
            answers["b"] = replace(answer, tensors=self._spoiled(answer), norms=None)
        return answers

    def _spoiled(self, answer: Message) -> dict[str, torch.Tensor]:
        tensors = {name: t.clone() for name, t in answer.tensors.items()}
        name = next(name for name in tensors if name.endswith("running_var"))
        if self.fault == "nan":
            tensors[name] *= float("nan")
        elif self.fault == "negative":
            tensors[name] -= 1e6
        elif self.fault == "shape":
            tensors[name] = tensors[name][:1]
        elif self.fault == "dtype":
            tensors[name] = tensors[name].half()
        elif self.fault == "missing":
            del tensors[name]
        return tensors


FAULTS = ("silent", "nan", "negative", "shape", "dtype", "missing")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_that_shares_nothing_usable_is_left_out_by_name(
    tmp_path: Path, fault: str
) -> None:
    transport = Spoiling(fault=fault)
    result = runs.run(_study(**_rules("average")), tmp_path, transport=transport)
    assert result.rounds[-1]["not_shared"].keys() == {"b"}
    rows = _by_rule(result)["average"]
    assert {row["sets_of"] for row in rows} == {"a"}
    expected = _predicted(result, _kept(result, "a"))
    np.testing.assert_allclose(_scores(rows), expected, atol=1e-6)
    assert transport.asked == (2 if fault == "silent" else 1)
    assert result.rounds[-1]["failed"] == {}
    assert result.rounds[-1]["answered"] == ["a", "b"]


@dataclass
class CardedAndSpoiling(Carded, Spoiling):
    """Both: the nearest site shares something that nobody can use."""


@pytest.mark.parametrize("fault", ["silent", "nan"])
def test_if_the_nearest_shares_nothing_the_next_one_is_asked(
    tmp_path: Path, fault: str
) -> None:
    cards = {"a": {"field_T": 1.5}, "b": {"field_T": 3.0}, "c": {"field_T": 3.0}}
    transport = CardedAndSpoiling(cards=cards, fault=fault)
    result = runs.run(_study(**_rules("nearest")), tmp_path, transport=transport)
    assert result.rounds[-1]["not_shared"].keys() == {"b"}
    rows = _by_rule(result)["nearest"]
    assert {row["sets_of"] for row in rows} == {"a"}
    expected = _predicted(result, _kept(result, "a"))
    np.testing.assert_allclose(_scores(rows), expected, atol=1e-6)


def test_a_site_that_never_trained_has_nothing_to_share(tmp_path: Path) -> None:
    study = _study(rounds=1, sites_per_round=1, **_rules("ensemble"))
    result = runs.run(study, tmp_path)
    (drawn,) = result.rounds[0]["answered"]
    assert {row["sets_of"] for row in _by_rule(result)["ensemble"]} == {drawn}
    (other,) = result.rounds[0]["not_shared"].items()
    assert other == ({"a": "b", "b": "a"}[drawn], "it never trained")


@pytest.mark.parametrize("kind", ["", "share_normalisation", "evaluate_newcomer"])
def test_a_resumed_run_ends_with_the_same_files(
    every_rule: Any, tmp_path: Path, kind: str
) -> None:
    study = _study(**_rules(*RULES))
    if kind:
        with pytest.raises(KeyboardInterrupt):
            runs.run(study, tmp_path, transport=lost.ServerDies(kind))
    else:
        stops = iter([True])
        runs.run(study, tmp_path, should_stop=lambda: next(stops, False))
    result = runs.run(study, tmp_path, resume=True)
    runs.require_same_files(result, every_rule, "cases", "unseen", "model", "summary")
    again = runs.run(study, tmp_path, resume=True)
    runs.require_same_files(again, result, "unseen")


def test_half_a_line_of_a_dead_run_is_cut_off(every_rule: Any, tmp_path: Path) -> None:
    study = _study(**_rules(*RULES))
    with pytest.raises(KeyboardInterrupt):
        runs.run(study, tmp_path, transport=lost.ServerDies("evaluate_newcomer"))
    whole = every_rule.folder.unseen_file.read_text()
    (tmp_path / "unseen.csv").write_text(whole[: len(whole) // 2])
    result = runs.run(study, tmp_path, resume=True)
    assert result.folder.unseen_file.read_text() == whole


def test_recalibrated_statistics_are_what_is_shared(tmp_path: Path) -> None:
    found = {}
    for how in ("kept", "recalibrated"):
        transport = runs.Recorder()
        study = _study(**_rules("average", statistics=how))
        result = runs.run(study, tmp_path / how, transport=transport)
        found[how] = {s: m for s, m in transport.up if m.kind == "Normalisation"}
    weight = result.shared["encoder.layers.0.weight"].numpy()
    name = "state/encoder.norms.0."
    for site in "ab":
        hidden = _features(site) @ weight.T
        shared = found["recalibrated"][site].tensors
        np.testing.assert_allclose(shared[f"{name}running_mean"], hidden.mean(0))
        assert not torch.equal(
            shared[f"{name}running_mean"],
            found["kept"][site].tensors[f"{name}running_mean"],
        )
        same = (found[how][site].tensors[f"{name}weight"] for how in found)
        assert torch.equal(*same)


@pytest.mark.parametrize("wrong", [[], ["adabn", "adabn"], ["median"]])
def test_a_study_names_known_rules_once(wrong: list[str]) -> None:
    content = _study().to_dict()
    with pytest.raises(Exception, match="unseen"):
        study_from_dict({**content, "evaluate": {"unseen": wrong}})


def test_every_rule_says_what_it_needs() -> None:
    assert {*RULES} == {*get_args(UnseenRule)} == NEEDS_SETS | RE_ESTIMATES
