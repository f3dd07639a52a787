"""SAML: rows of its table as limits, what it sends, and sites that go missing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.episodes import draw_episode
from fedmed.errors import ConfigError, QuorumError
from fedmed.losses.compactness import compactness_loss
from fedmed.losses.contour import contour_masks
from fedmed.prove import prove
from fedmed.resolve import load_strategy
from fedmed.strategy import Private

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
lost = importlib.import_module("tiny.lost")
modules_are_listed_once = runs.modules_are_listed_once

ONE_STEP = {"local_steps": 1}
PLAIN = {"compact_weight": 0.0, "smooth_weight": 0.0}
GRADES = ["exact", "proxy", "within_site"]
CAUTIOUS = "allowed_kinds: [Card, Metrics, Weights, Gradient, ClassStatistic]\n"


def study_of(sync="step", *, base=runs.IMAGE, **changes):
    strategy = {"sync": sync, "min_count": 1, **changes.pop("strategy", {})}
    return runs.make_study(base, "saml", strategy=strategy, **changes)


def mldg(sync, **changes):
    strategy = {"sync": sync, "inner_lr": 0.3, "beta": 1.0}
    return runs.make_study(runs.IMAGE, "mldg", strategy=strategy, **changes)


def test_plain_meta_learning_is_mldg_bit_for_bit(tmp_path):
    study = study_of(strategy={**PLAIN, "inner_lr": 0.3})
    found = runs.run(study, tmp_path / "a")
    expected = runs.run(mldg("step"), tmp_path / "b")
    assert found.rounds[0]["exchanges"] == expected.rounds[0]["exchanges"]
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=0)


def test_plain_meta_learning_in_rounds_is_mldg(tmp_path):
    """There w' + (mean - w') is taken, here the mean: a rounding error apart."""
    found = runs.run(study_of("round", strategy=PLAIN), tmp_path / "a")
    expected = runs.run(mldg("round"), tmp_path / "b")
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=1e-5)


@pytest.mark.parametrize("term", ["compact_weight", "smooth_weight"])
@pytest.mark.parametrize("sync", ["step", "round"])
def test_each_term_moves_the_network(tmp_path, term, sync):
    found = []
    for value in (0.0, 0.05):
        changed = {**PLAIN, term: value, "ring_px": 1}
        study = study_of(sync, strategy=changed, train={"batch_size": 4})
        found.append(runs.run(study, tmp_path / str(value)).shared)
    far = max(float((t - found[1][n]).abs().max()) for n, t in found[0].items())
    assert far > 1e-5
    has_metric = [any(n.startswith("metric.") for n in f) for f in found]
    assert has_metric == [False, term == "smooth_weight"]


def test_the_compactness_of_the_meta_test_site_alone_counts():
    """One step: its part is the gradient of lambda1 L_compact at theta'."""
    after = {}
    for weight in (0.0, 0.01):
        changed = {**PLAIN, "compact_weight": weight, "inner_lr": 0.3}
        study = study_of(strategy=changed, train={**ONE_STEP, "precision": "float64"})
        ward = runs.Ward(study)
        cohort = ward.cohort()
        half = ward.strategy.run_round(ward.server, cohort)
        after[weight] = ward.finish(half).shared
    (judge,) = draw_episode(cohort, 0).meta_test.site_ids
    tasks = ward.answer(next(ward.strategy.run_round(ward.server, cohort)))
    ahead = dict(ward.server.shared)
    for name in next(iter(tasks.values())).state:
        mean = sum(reply.state[name] for reply in tasks.values()) / len(tasks)
        ahead[name] = ahead[name] - 0.3 * mean
    bench = ward.benches[judge]
    model, batch = bench.load(ahead, Private()).train(), bench.batch(1, 0)
    loss = compactness_loss(model(batch.images.double()), batch.labels)
    (0.01 * loss).backward()
    lr = ward.server.optimizer.lr
    for name, parameter in model.named_parameters():
        step = after[0.0][name] - after[0.01][name]
        torch.testing.assert_close(step, lr * parameter.grad, rtol=0, atol=1e-13)
    assert float(loss.detach()) > 0.1


@pytest.mark.parametrize(
    ("smoothness", "kind", "num_bytes"),
    [
        ("proxy", "ClassStatistic", {4 * (2 * 16 + 2)}),
        ("within_site", None, set()),
        ("exact", "Embedding", None),
    ],
)
def test_what_the_statistic_weighs(tmp_path, smoothness, kind, num_bytes):
    transport = runs.Recorder()
    study = study_of(strategy={"smoothness": smoothness}, rounds=1)
    result = runs.run(study, tmp_path, transport=transport)
    told = [m for _, m in transport.up if m.kind not in {"Card", "Metrics", "Gradient"}]
    assert {m.kind for m in told} == ({kind} if kind else set())
    if num_bytes is not None:
        assert {m.num_bytes for m in told} == num_bytes
    per_step = 2 if smoothness == "within_site" else 3
    assert result.rounds[0]["exchanges"] == 2 * per_step + 1


def test_a_cautious_policy_refuses_embeddings_and_lets_proxies_pass(tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(CAUTIOUS + "min_count: 4\n")
    sites = {"policy": str(policy)}
    exact = study_of(strategy={"smoothness": "exact"}, sites=sites)
    with pytest.raises(QuorumError, match="Embedding message may not leave"):
        runs.run(exact, tmp_path / "exact")
    proxy = study_of(strategy={"min_count": 4}, sites=sites, rounds=1)
    assert runs.run(proxy, tmp_path / "proxy").rounds


@pytest.mark.parametrize("smoothness", GRADES)
@pytest.mark.parametrize("site", ["a", "b", "c"])
def test_a_site_lost_between_the_halves_is_out_of_its_groups_mean(site, smoothness):
    study = study_of(
        strategy={"smoothness": smoothness, "smooth_weight": 0.5}, train=ONE_STEP
    )
    ward = runs.Ward(study)
    cohort = ward.cohort()
    episode = draw_episode(cohort, 0)
    half = ward.strategy.run_round(ward.server, cohort)
    tasks = ward.answer(next(half))
    request = half.send(tasks)
    if smoothness != "within_site":
        request = half.send(ward.answer(request))
    assert request.action == "meta_gradient"
    replies = ward.answer(request)
    replies.pop(site)
    with pytest.raises(StopIteration) as end:
        half.send(replies)
    after, before = end.value.value.shared, ward.server.shared
    lr = ward.server.optimizer.lr
    groups = [g.site_ids for g in (episode.meta_train, episode.meta_test)]
    if not any(s in replies for s in episode.meta_test.site_ids):
        groups = []  # without a judge's answer there is no meta step
    for name in ward.server.trainable():
        step = torch.zeros_like(before[name])
        for parts in (
            [tasks[s].state.get(name) for s in tasks],
            *([replies[s].state.get(name) for s in g if s in replies] for g in groups),
        ):
            held = [part for part in parts if part is not None]
            step += sum(held) / len(held) if held else 0.0
        torch.testing.assert_close(
            after[name], before[name] - lr * step, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("site", ["a", "b", "c"])
def test_the_engine_goes_on_without_a_site_lost_between_the_halves(tmp_path, site):
    study = study_of(tolerance={"quorum": 0.5, "retries": 0})
    transport = lost.LostAt(site=site, action="meta_gradient")
    result = runs.run(study, tmp_path, transport=transport)
    assert [record["round"] for record in result.rounds] == [1, 2]
    assert list(result.rounds[0]["failed"]) == [site]
    assert all(torch.isfinite(tensor).all() for tensor in result.shared.values())


def test_without_a_meta_test_site_the_step_is_one_on_the_meta_train_sites():
    study = study_of(train=ONE_STEP)
    ward = runs.Ward(study)
    cohort = ward.cohort()
    (judge,) = draw_episode(cohort, 0).meta_test.site_ids
    half = ward.strategy.run_round(ward.server, cohort)
    after = lost.finish_without(ward, half, judge, "statistic").shared
    tasks = ward.answer(next(ward.strategy.run_round(ward.server, cohort)))
    lr = ward.server.optimizer.lr
    for name, before in ward.server.shared.items():
        if name in next(iter(tasks.values())).state:
            mean = sum(reply.state[name] for reply in tasks.values()) / len(tasks)
            torch.testing.assert_close(
                after[name], before - lr * mean, rtol=0, atol=1e-6
            )


def test_shapes_need_a_segmentation(tmp_path):
    with pytest.raises(ConfigError, match="shapes"):
        runs.run(study_of(base=runs.TABLE), tmp_path / "a")
    plain = runs.run(study_of(base=runs.TABLE, strategy=PLAIN), tmp_path / "b")
    assert [record["round"] for record in plain.rounds] == [1, 2]


TINY = (
    f"cache={runs.CACHE}",
    "sites={dataset: tiny.hospitals, kind: image}",
    "preprocess={size: [8, 8], intensity: none}",
    "model={name: unet, base_width: 2, levels: 2, norm: batch}",
    "train.batch_size=4",
    "strategy.min_count=1",
    "strategy.inner_lr=0.1",
    "strategy.ring_px=1",
)
PROOFS = {
    "exact, instance": ("model.norm=instance", "strategy.smoothness=exact"),
    "exact, group": ("model.norm=group", "strategy.smoothness=exact"),
    "exact, batch": ("strategy.smoothness=exact", "strategy.num_meta_test=2"),
    "proxy": ("strategy.smoothness=proxy", "strategy.weighting=examples"),
    "within_site": ("strategy.smoothness=within_site",),
    "split and clipped": (
        "model.norm=instance",
        "strategy.smoothness=exact",
        "strategy.update_mode=split",
        "strategy.tensor_clip=0.05",
        "strategy.meta_lr_factor=3.0",
        "strategy.metric_lr_factor=2.0",
    ),
}


@pytest.mark.parametrize("options", PROOFS.values(), ids=PROOFS)
def test_it_equals_the_pooled_method(options):
    weights = ("strategy.smooth_weight=0.1", "strategy.compact_weight=0.01")
    found = prove("saml", steps=3, overrides=(*TINY, *weights, *options))
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3


@pytest.mark.parametrize("smoothness", GRADES)
def test_slices_without_foreground_have_no_embedding(monkeypatch, tmp_path, smoothness):
    """Some batches have none at all; a policy has nothing to refuse in them."""
    module, numbers = importlib.import_module("strategies.saml"), []

    def some(labels, **widths):
        masks = contour_masks(labels, **widths)
        kept = masks & ((labels > 0).sum(dim=(1, 2)) % 3 == 1)[:, None, None, None]
        numbers.append(int(kept.any(dim=3).any(dim=2).sum()))
        return kept

    monkeypatch.setattr(module, "contour_masks", some)
    chosen = ("strategy.smooth_weight=0.1", f"strategy.smoothness={smoothness}")
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"{CAUTIOUS[:-2]}, Embedding]\nmin_count: 1\n")
    small = ("train.batch_size=1", f"sites.policy={policy}")
    found = prove("saml", steps=4, overrides=(*TINY, *chosen, *small))
    assert found.max_abs_diff <= 1e-12, found.where
    assert min(numbers) == 0 < max(numbers)


@pytest.mark.parametrize("row", [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1)])
def test_every_row_of_the_table_equals_its_pooled_method(row):
    compact, smooth = row
    chosen = (f"strategy.compact_weight={compact}", f"strategy.smooth_weight={smooth}")
    found = prove("saml", steps=3, overrides=(*TINY, *chosen))
    assert found.max_abs_diff <= 1e-12, found.where


@pytest.mark.parametrize(
    "options",
    [
        {"inner_lr": -1.0},
        {"compact_weight": -0.1},
        {"smooth_weight": -0.1},
        {"margin": 0.0},
        {"contour_px": 0},
        {"ring_px": 0},
        {"min_count": 0},
        {"tensor_clip": -1},
        {"smoothness": "exact", "sync": "round"},
        {"update_mode": "both"},
    ],
)
def test_impossible_constants_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_strategy("saml", options)
