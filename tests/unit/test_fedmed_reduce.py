from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fedmed import reduce
from fedmed.errors import SiteError, StateMismatchError
from fedmed.partition import describe_state
from fedmed.reduce import (
    block_sum,
    merge_norm_statistics,
    merge_states,
    normalised_weights,
    tree_sum,
    weighted_mean,
    whole_blocks,
)

SITES = ("a", "b", "c", "d", "e")


def random_states(sites=SITES, shape=(7, 3), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        site: {
            "weight": torch.randn(shape, generator=rng) * 10 ** (i * 2.0 - 4),
            "steps": torch.tensor(3 * i % 5, dtype=torch.int64),
        }
        for i, site in enumerate(sites)
    }


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )


def test_the_mean_does_not_depend_on_the_order_of_the_mapping():
    states = random_states()
    weights = dict(zip(SITES, (3, 1.7, 11, 0.1, 5), strict=True))
    expected = weighted_mean(states, weights)
    for order in itertools.permutations(SITES):
        shuffled = {site: states[site] for site in order}
        assert equal(weighted_mean(shuffled, weights), expected)
        backwards = {site: weights[site] for site in reversed(order)}
        assert equal(weighted_mean(states, backwards), expected)


def test_the_tree_adds_neighbours_first():
    # 1 is lost beside 1e16 in float64, unless it meets -1e16's partner first.
    values = [1e16, 1.0, -1e16, 1.0, 3.0]
    states = [{"x": torch.tensor(v, dtype=torch.float64)} for v in values]
    expected = ((1e16 + 1.0) + (-1e16 + 1.0)) + 3.0
    assert expected != ((((1e16 + 1.0) + -1e16) + 1.0) + 3.0)
    assert float(tree_sum(states, [1.0] * 5)["x"]) == expected


def test_a_block_of_sites_is_a_subtree():
    states = [{"x": s["weight"].double()} for s in random_states("abcdefgh").values()]
    ones = [1.0] * 4
    halves = [tree_sum(states[:4], ones), tree_sum(states[4:], ones)]
    assert equal(tree_sum(halves, [1.0, 1.0]), tree_sum(states, [1.0] * 8))


def test_the_sum_runs_in_float64_and_keeps_the_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        states = [{"x": torch.tensor([v], dtype=dtype)} for v in (256.0, 0.5, -256.0)]
        total = tree_sum(states, [1.0, 1.0, 1.0])["x"]
        assert total.dtype == dtype
        assert float(total) == 0.5


def test_large_tensors_give_the_same_bits_as_small_ones(monkeypatch):
    states = random_states(shape=(100, 9))
    weights = dict.fromkeys(SITES, 1.0)
    whole = weighted_mean(states, weights)
    monkeypatch.setattr(reduce, "CHUNK", 64)
    assert equal(weighted_mean(states, weights), whole)
    turned = {
        s: {"weight": x["weight"].T.contiguous().T, "steps": x["steps"]}
        for s, x in states.items()
    }
    assert equal(weighted_mean(turned, weights), whole)


def test_arguments_stay_as_they_are_and_results_are_new():
    states = random_states(("a",))
    states["a"]["steps"] += 7
    before = {n: t.clone() for n, t in states["a"].items()}
    mean = weighted_mean(states, {"a": 2.0})
    assert equal(mean, before)
    for tensor in mean.values():
        tensor.zero_()
    assert equal(states["a"], before)


def test_integers_are_the_largest_and_never_averaged():
    states = random_states()
    merged = weighted_mean(states, dict.fromkeys(SITES, 1.0))
    assert int(merged["steps"]) == 4
    assert merged["steps"].dtype == torch.int64


def test_a_site_of_weight_zero_counts_as_absent_even_if_it_is_nan():
    states = random_states()
    weights = dict(zip(SITES, (3, 0, 11, 0.1, 5), strict=True))
    states["b"]["weight"] = states["b"]["weight"] * torch.nan
    states["b"]["steps"] = torch.tensor(99)
    without = {s: x for s, x in states.items() if s != "b"}
    fewer = {s: w for s, w in weights.items() if s != "b"}
    assert equal(weighted_mean(states, weights), weighted_mean(without, fewer))


@pytest.mark.parametrize("bad", [-9.0, float("nan"), float("inf"), float("-inf")])
def test_an_impossible_weight_names_its_site(bad):
    weights = dict.fromkeys(SITES, 1.0) | {"c": bad}
    with pytest.raises(SiteError, match="site 'c'"):
        weighted_mean(random_states(), weights)


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(SiteError, match="no weight is positive among 5 sites"):
        weighted_mean(random_states(), dict.fromkeys(SITES, 0))
    with pytest.raises(SiteError, match="among 0 sites"):
        weighted_mean({}, {})


def test_weights_of_other_sites_are_refused():
    with pytest.raises(SiteError, match="e, f"):
        weighted_mean(random_states(), dict.fromkeys("abcdf", 1.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(3)}, r"weight is torch.float32 \(3,\)"),
        ({"weight": torch.zeros(())}, r"weight is torch.float32 \(\)"),
        ({"weight": torch.zeros(7, 3).double()}, "float64"),
        ({"more": torch.zeros(1)}, "unknown more"),
    ],
)
def test_states_that_differ_are_refused_and_never_broadcast(change, words):
    states = random_states()
    states["c"] = {**states["c"], **change}
    with pytest.raises(StateMismatchError, match=words) as caught:
        weighted_mean(states, dict.fromkeys(SITES, 1.0))
    assert "'c'" in caught.value.message


def test_a_missing_tensor_is_refused_also_at_weight_zero():
    states = random_states()
    del states["d"]["weight"]
    with pytest.raises(StateMismatchError, match="missing weight"):
        weighted_mean(states, dict.fromkeys(SITES, 1.0) | {"d": 0.0})


def batch_norm_states():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    states = {}
    for number, site in enumerate("abc"):
        rng = torch.Generator().manual_seed(number)
        states[site] = {
            n: (
                t + number
                if n.endswith("tracked")
                else torch.rand(t.shape, generator=rng)
            )
            for n, t in model.state_dict().items()
        }
    return model, states


def test_states_merge_by_role():
    model, states = batch_norm_states()
    weights = {"a": 1, "b": 2, "c": 5}
    merged = merge_states(states, weights, describe_state(model))
    assert list(merged) == list(states["a"])
    mean = weighted_mean(states, weights)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean"):
        assert torch.equal(merged[name], mean[name])
    assert (merged["1.running_var"] > mean["1.running_var"]).all()
    assert int(merged["1.num_batches_tracked"]) == 2
    statistics = merge_norm_statistics(states, weights, describe_state(model))
    assert set(statistics) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    assert torch.equal(statistics["1.running_var"], merged["1.running_var"])


def test_sites_that_agree_are_merged_to_what_they_agree_on():
    model, states = batch_norm_states()
    same = dict.fromkeys("abc", states["a"])
    merged = merge_states(same, {"a": 1, "b": 1, "c": 1}, describe_state(model))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, states["a"][name], rtol=1e-7, atol=0)


def test_a_part_of_the_state_can_be_merged_alone():
    model, states = batch_norm_states()
    entries = describe_state(model)
    shared = {s: {n: x[n] for n in ("0.weight",)} for s, x in states.items()}
    merged = merge_states(shared, {"a": 1, "b": 1, "c": 1}, entries)
    assert list(merged) == ["0.weight"]
    nothing = merge_states({"a": {}, "b": {}}, {"a": 1, "b": 1}, entries)
    assert nothing == {}


def test_names_the_model_does_not_have_are_refused():
    model, states = batch_norm_states()
    states["b"]["../etc"] = torch.zeros(1)
    with pytest.raises(StateMismatchError, match=r"'b'.*\.\./etc"):
        merge_states(states, {"a": 1, "b": 1, "c": 1}, describe_state(model))


def test_a_variance_without_its_mean_is_refused():
    model, states = batch_norm_states()
    alone = {s: {"1.running_var": x["1.running_var"]} for s, x in states.items()}
    with pytest.raises(StateMismatchError, match=r"without 1\.running_mean"):
        merge_states(alone, {"a": 1, "b": 1, "c": 1}, describe_state(model))


def test_weights_are_scaled_and_sorted():
    shares = normalised_weights({"b": {}, "a": {}}, {"b": 3.0, "a": 1.0})
    assert list(shares.items()) == [("a", 0.25), ("b", 0.75)]


def sequential_tree(products):
    """The tree level by level, as the module describes it."""
    level = list(products)
    while len(level) > 1:
        pairs = [level[k] + level[k + 1] for k in range(0, len(level) - 1, 2)]
        level = pairs + (level[-1:] if len(level) % 2 else [])
    return level[0]


def contiguous(count, rng):
    cuts = sorted(rng.integers(0, count + 1, size=int(rng.integers(0, 5))))
    bounds = [0, *(int(cut) for cut in cuts), count]
    return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]


def scattered(count, rng):
    owners = rng.integers(0, int(rng.integers(1, 5)), size=count)
    return [[int(p) for p in np.flatnonzero(owners == o)] for o in set(owners)]


@pytest.mark.parametrize("split", [contiguous, scattered])
def test_blocks_added_elsewhere_change_no_bit(split):
    rng = np.random.default_rng()
    for count in range(1, 71):
        scales = 10.0 ** rng.integers(-6, 7, size=(count, 1))
        rows = [*torch.from_numpy(rng.normal(size=(count, 6)) * scales).float()]
        weights = [float(w) for w in rng.random(count)]
        blocks = {}
        for part in split(count, rng):
            found = whole_blocks(part)
            covered = [p for first, n in found for p in range(first, first + 2**n)]
            assert covered == part
            for first, level in found:
                places = slice(first, first + 2**level)
                blocks[first] = level, block_sum(rows[places], weights[places])
        counter = reduce.Counter()
        for first in sorted(blocks):
            counter.push(*blocks[first])
        total = counter.total()
        products = [r.double() * w for r, w in zip(rows, weights, strict=True)]
        assert torch.equal(
            total.view(torch.int64), sequential_tree(products).view(torch.int64)
        ), f"{count} sites, {blocks.keys()}"
        out = torch.empty(6)
        reduce.add_rows(out, rows, weights)
        assert torch.equal(out, total.float())


def test_blocks_are_as_large_as_they_can_be():
    assert whole_blocks([]) == []
    assert whole_blocks(range(64)) == [(0, 6)]
    assert whole_blocks(range(7)) == [(0, 2), (4, 1), (6, 0)]
    assert whole_blocks([0, 2, 3, 5, 8, 9, 10, 11]) == [
        (0, 0),
        (2, 1),
        (5, 0),
        (8, 2),
    ]
