"""MASF: its limits, what it sends, and sites that go missing within an episode."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmed.episodes import draw_episode
from fedmed.errors import ConfigError, QuorumError
from fedmed.prove import prove
from fedmed.resolve import load_strategy
from fedmed.seeds import derive
from fedmed.strategy import Cohort, Member

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
lost = importlib.import_module("tiny.lost")
modules_are_listed_once = runs.modules_are_listed_once

ONE_STEP = {"local_steps": 1}
GRADES = ["exact", "proxy", "within_site"]
CAUTIOUS = "allowed_kinds: [Card, Metrics, Weights, Gradient, ClassStatistic]\n"


def study_of(sync="step", *, base=runs.IMAGE, **changes):
    strategy = {"sync": sync, "min_count": 1, **changes.pop("strategy", {})}
    return runs.make_study(base, "masf", strategy=strategy, **changes)


def episode_of(study):
    """The first episode that the engine draws."""
    seed = derive(study.seed, "strategy", 1)
    return draw_episode(replace(runs.Ward(study).cohort(), rng_seed=seed), 0)


def weights_of(result):
    """Trainable entries of the network itself."""
    return {
        n: t
        for n, t in result.shared.items()
        if n.endswith(("weight", "bias")) and not n.startswith("metric.")
    }


def fedsgd_on(site_ids, sync="step"):
    return runs.make_study(
        runs.IMAGE, "fedavg", rounds=1, train=ONE_STEP,
        sites={"include": list(site_ids)},
        strategy={"sync": sync, "weighting": "uniform"},
    )  # fmt: skip


@pytest.mark.parametrize("sync", ["step", "round"])
def test_with_both_weights_0_it_is_fedavg_on_the_meta_train_sites(tmp_path, sync):
    nothing = {"alignment_weight": 0.0, "clustering_weight": 0.0}
    study = study_of(sync, strategy=nothing, rounds=1, train=ONE_STEP)
    found = runs.run(study, tmp_path / "a")
    assert found.rounds[0]["exchanges"] == 1 + 1
    train = episode_of(study).meta_train.site_ids
    expected = runs.run(fedsgd_on(train, sync), tmp_path / "b")
    torch.testing.assert_close(
        weights_of(found), weights_of(expected), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("clustering", GRADES)
def test_a_round_ends_with_one_meta_step_at_the_trained_weights(clustering):
    """w' - lr (sum of the meta gradients at w', on the batch after the round's)."""
    changed = {"clustering": clustering, "meta_lr_factor": 2.0, "metric_lr_factor": 3.0}
    ward = runs.Ward(study_of("round", strategy=changed))
    cohort, lr = ward.cohort(), ward.server.optimizer.lr
    half = ward.strategy.run_round(ward.server, cohort)
    tasks = ward.answer(next(half))
    told = half.send(tasks)
    assert told.content["index"] == cohort.steps
    request = half.send(ward.answer(told))
    metas = ward.answer(request)
    with pytest.raises(StopIteration) as end:
        half.send(metas)
    for name in ward.server.trainable():
        trained = sum(reply.state[name] for reply in tasks.values()) / len(tasks)
        torch.testing.assert_close(told.content["weights"][name], trained)
        factor = 3.0 if name.startswith("metric.") else 2.0
        step = factor * lr * sum(reply.state[name] for reply in metas.values())
        found = end.value.value.shared[name]
        torch.testing.assert_close(found, trained - step, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("term", "clustering"),
    [("alignment_weight", "proxy"), *(("clustering_weight", g) for g in GRADES)],
)
def test_each_term_moves_the_network(tmp_path, term, clustering):
    found = []
    for value in (0.0, 0.5):
        changed = {"clustering": clustering, term: value}
        study = study_of(strategy=changed, rounds=1, train={"batch_size": 4})
        found.append(weights_of(runs.run(study, tmp_path / str(value))))
    far = max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0])
    assert far > 1e-5


@pytest.mark.parametrize("clustering", GRADES)
def test_the_metric_network_follows_the_clustering_only(tmp_path, clustering):
    changed = {"clustering": clustering, "clustering_weight": 0.5}
    study = study_of(strategy=changed, rounds=1)
    result = runs.run(study, tmp_path)
    start = runs.Ward(study).server.shared
    moved = {
        n: not torch.equal(t, start[n])
        for n, t in result.shared.items()
        if n.startswith("metric.")
    }
    assert len(moved) == 4
    assert all(moved.values())
    memories = result.server(1, "metric_optimizer")
    assert not memories  # plain SGD remembers nothing
    without = study_of(strategy={"clustering_weight": 0.0})
    assert not [n for n in runs.Ward(without).server.shared if "metric" in n]


def test_a_split_update_has_three_memories(tmp_path):
    adam = {"optimizer": {"name": "adam", "lr": 0.01}}
    study = study_of(strategy={"update_mode": "split"}, rounds=1, train=adam)
    result = runs.run(study, tmp_path)
    named = {
        memory: {key.partition(".")[0] for key in result.server(1, memory)}
        for memory in ("optimizer", "meta_optimizer", "metric_optimizer")
    }
    network = {"encoder", "decoder", "head"}
    assert named["optimizer"] == named["meta_optimizer"] == network
    assert named["metric_optimizer"] == {"metric"}


@pytest.mark.parametrize(
    ("clustering", "kind", "num_bytes"),
    [
        ("proxy", "ClassStatistic", 4 * (2 * 2 + 2 + 2 * 16 + 2)),
        ("within_site", "ClassStatistic", 4 * (2 * 2 + 2)),
        ("exact", "Embedding", None),
    ],
)
def test_what_the_statistic_weighs(tmp_path, clustering, kind, num_bytes):
    transport = runs.Recorder()
    study = study_of(strategy={"clustering": clustering}, rounds=1)
    runs.run(study, tmp_path, transport=transport)
    kinds = {"Card", "Metrics", "Gradient"}
    told = [m for _, m in transport.up if m.kind not in kinds]
    assert {m.kind for m in told} == {kind}
    if num_bytes is not None:
        assert {m.num_bytes for m in told} == {num_bytes}


def test_a_cautious_policy_refuses_embeddings_and_lets_proxies_pass(tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(CAUTIOUS + "min_count: 4\npooled: false\n")
    sites = {"policy": str(policy)}
    exact = study_of(strategy={"clustering": "exact"}, sites=sites)
    with pytest.raises(QuorumError, match="Embedding message may not leave"):
        runs.run(exact, tmp_path / "exact")
    proxy = study_of(strategy={"min_count": 4}, sites=sites, rounds=1)
    assert runs.run(proxy, tmp_path / "proxy").rounds
    wary = study_of(strategy={"min_count": 1}, sites=sites, rounds=1)
    policy.write_text(CAUTIOUS + "min_count: 100\n")
    with pytest.raises(QuorumError, match="min_count"):
        runs.run(wary, tmp_path / "wary")


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("allowed_kinds: [Card, Metrics, Gradient, Embedding]", "ClassStatistic"),
        (CAUTIOUS.replace("]", ", Embedding]") + "min_count: 1000", "min_count"),
    ],
)
def test_rows_that_travel_with_embeddings_are_held_to_their_own_rules(
    tmp_path, line, rule
):
    policy = tmp_path / "policy.yaml"
    policy.write_text(line + "\n")
    exact = {"clustering": "exact"}
    study = study_of(strategy=exact, sites={"policy": str(policy)}, rounds=1)
    with pytest.raises(QuorumError, match=rule):
        runs.run(study, tmp_path / "both")
    alone = {**exact, "alignment_weight": 0.0}
    study = study_of(strategy=alone, sites={"policy": str(policy)}, rounds=1)
    assert not runs.run(study, tmp_path / "alone").rounds[0]["failed"]


def test_a_policy_has_nothing_to_refuse_where_nothing_is_told(tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(CAUTIOUS + "min_count: 1000000\n")
    within = {"alignment_weight": 0.0, "clustering": "within_site"}
    study = study_of(strategy=within, sites={"policy": str(policy)}, rounds=1)
    (record,) = runs.run(study, tmp_path / "run").rounds
    assert not record["failed"]


@pytest.mark.parametrize("clustering", GRADES)
@pytest.mark.parametrize("site", ["a", "b", "c"])
def test_a_site_lost_between_the_halves_is_out_of_the_sum(site, clustering):
    """The survivors' parts of the meta gradient stand, to the last bit."""
    study = study_of(strategy={"clustering": clustering}, train=ONE_STEP)
    ward = runs.Ward(study)
    cohort = ward.cohort()
    half = ward.strategy.run_round(ward.server, cohort)
    tasks = ward.answer(next(half))
    request = half.send(ward.answer(half.send(tasks)))
    assert request.action == "meta_gradient"
    replies = ward.answer(request)
    replies.pop(site)
    with pytest.raises(StopIteration) as end:
        half.send(replies)
    after, before = end.value.value.shared, ward.server.shared
    lr = ward.server.optimizer.lr
    for name in ward.server.trainable():
        meta = sum(reply.state[name] for reply in replies.values())
        task = [reply.state[name] for reply in tasks.values() if name in reply.state]
        step = meta + (sum(task) / len(tasks) if task else 0.0)
        torch.testing.assert_close(
            after[name], before[name] - lr * step, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    ("site", "action"),
    [
        ("a", "gradient"),
        ("b", "statistic"),
        ("a", "meta_gradient"),
        ("b", "meta_gradient"),
        ("c", "meta_gradient"),
    ],
)
def test_the_engine_goes_on_without_a_site_lost_in_an_episode(tmp_path, site, action):
    study = study_of(tolerance={"quorum": 0.5, "retries": 0})
    transport = lost.LostAt(site=site, action=action)
    result = runs.run(study, tmp_path, transport=transport)
    assert [record["round"] for record in result.rounds] == [1, 2]
    train = episode_of(study).meta_train.site_ids
    if action != "gradient" or site in train:
        assert list(result.rounds[0]["failed"]) == [site]
    assert all(torch.isfinite(tensor).all() for tensor in result.shared.values())


def test_without_a_meta_test_site_the_step_is_one_on_the_meta_train_sites():
    study = study_of(train=ONE_STEP)
    ward = runs.Ward(study)
    cohort = ward.cohort()
    (judge,) = draw_episode(cohort, 0).meta_test.site_ids
    half = ward.strategy.run_round(ward.server, cohort)
    after = lost.finish_without(ward, half, judge, "statistic")
    nothing = study_of(
        train=ONE_STEP, strategy={"alignment_weight": 0.0, "clustering_weight": 0.0}
    )
    plain = runs.Ward(nothing)
    expected = plain.finish(plain.strategy.run_round(plain.server, cohort))
    for name in plain.server.trainable():
        assert torch.equal(after.shared[name], expected.shared[name])


def test_no_group_of_four_or_more_sites_has_one_only():
    strategy = load_strategy("masf", {"sync": "step"})
    for count in range(4, 9):
        members = tuple(Member(f"site{n}", 3) for n in range(count))
        for index in range(5):
            cohort = Cohort(members, 1, 1, rng_seed=3)
            episode = strategy._episode(cohort, index)
            assert len(episode.meta_train.members) >= 2
            assert len(episode.meta_test.members) >= 2


@pytest.mark.parametrize("clustering", GRADES)
@pytest.mark.parametrize("metric_loss", ["triplet", "contrastive"])
def test_it_trains_classifiers(tmp_path, clustering, metric_loss):
    changed = {
        "clustering": clustering, "metric_loss": metric_loss, "clustering_weight": 0.05,
    }  # fmt: skip
    result = runs.run(study_of(base=runs.TABLE, strategy=changed), tmp_path)
    assert [record["round"] for record in result.rounds] == [1, 2]


def test_it_trains_classifiers_in_rounds(tmp_path):
    changed = {"clustering": "exact"}
    result = runs.run(study_of("round", base=runs.TABLE, strategy=changed), tmp_path)
    assert [record["round"] for record in result.rounds] == [1, 2]


TINY = (
    f"cache={runs.CACHE}",
    "sites={dataset: tiny.hospitals, kind: image}",
    "preprocess={size: [8, 8], intensity: none}",
    "model={name: unet, base_width: 2, levels: 2, norm: batch}",
    "train.batch_size=4",
)
PROOFS = {
    "exact": ("clustering=exact",),
    "exact, contrastive": ("clustering=exact", "metric_loss=contrastive"),
    "proxy": ("clustering=proxy", "weighting=examples"),
    "within_site": ("clustering=within_site", "alignment_weight=0.0"),
    "split and clipped": (
        "clustering=exact", "update_mode=split", "tensor_clip=0.05",
        "meta_lr_factor=3.0", "metric_lr_factor=2.0", "num_meta_test=2",
    ),
    "no inner step": ("clustering=exact", "inner_lr=0.0"),
    "no clustering": ("clustering_weight=0.0", "inner_lr=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("options", PROOFS.values(), ids=PROOFS)
def test_it_equals_the_pooled_method(options):
    weight = () if "clustering_weight=0.0" in options else ("clustering_weight=0.1",)
    chosen = [f"strategy.{o}" for o in ("min_count=1", *weight, *options)]
    found = prove("masf", steps=3, overrides=(*TINY, *chosen))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3


def test_it_equals_the_pooled_method_for_classification():
    table = (
        f"cache={runs.CACHE}",
        "sites={dataset: tiny.hospitals, kind: table}",
        "preprocess={intensity: none}",
        "model={name: mlp, mode: row, norm: none, widths: [5]}",
        "train.loss=cross_entropy",
        "strategy.min_count=1",
        "strategy.clustering=exact",
    )
    found = prove("masf", steps=3, overrides=table)
    assert found.max_abs_diff <= 1e-12, found.where


@pytest.mark.parametrize(
    "options",
    [
        {"inner_lr": -1.0},
        {"alignment_weight": -0.1},
        {"clustering_weight": -0.1},
        {"temperature": 0.0},
        {"margin": 0.0},
        {"min_count": 0},
        {"tensor_clip": 0.0},
        {"meta_lr_factor": 0.0},
        {"metric_lr_factor": 0.0},
        {"clustering": "none"},
        {"metric_loss": "cosine"},
        {"update_mode": "both"},
    ],
)
def test_impossible_constants_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_strategy("masf", options)


@pytest.mark.parametrize("sync", ["round", "step"])
def test_a_batch_too_small_for_any_class_is_said_and_not_passed_over(tmp_path, sync):
    study = study_of(sync, base=runs.TABLE, strategy={"min_count": 100})
    with pytest.raises(ConfigError, match="min_count is 100, and a batch holds 3"):
        runs.run(study, tmp_path)
