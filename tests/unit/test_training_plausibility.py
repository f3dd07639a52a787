from __future__ import annotations

import math

import pytest
import torch

from fedmed.training.clustering import CENTROIDS, KINDS, SHOWN, VECTORS, Clustering
from fedmed.training.plausibility import rows_problem


def rows(**changes):
    state = {
        "rows": torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])[:2].log(),
        "present": torch.tensor([1.0, 1.0]),
    }
    return {**state, **changes}


def test_of_noised_rows_only_the_size_is_checked():
    noised = rows(rows=torch.randn(2, 2) - 3, present=torch.tensor([1.2, -0.7]))
    assert rows_problem(noised) != ""
    assert rows_problem(noised, noised=True) == ""
    huge = {**noised, "rows": torch.full((2, 2), 1e9)}
    assert "as large as 1e+09" in rows_problem(huge, noised=True)


def test_rows_that_a_softmax_gave_pass():
    logits = 20 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32):
        told = logits.to(dtype).log_softmax(dim=1)
        assert rows_problem({"rows": told, "present": torch.ones(5)}) == ""


def test_a_row_that_is_not_told_may_hold_zeros():
    told = rows(rows=torch.tensor([[0.0, 0.0], [math.log(0.5)] * 2]))
    assert "no log-probabilities" in rows_problem(told)
    assert rows_problem({**told, "present": torch.tensor([0.0, 1.0])}) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": torch.full((2, 2), 1e5)}, "no log-probabilities"),
        ({"rows": torch.full((2, 2), -1e5)}, "no log-probabilities"),
        # It sums to 1, and its derivatives would be of the size of the poison.
        ({"rows": torch.tensor([[0.0, -1e30]] * 2)}, "no log-probabilities"),
        ({"present": torch.tensor([0.7, 1.0])}, "neither 0 nor 1"),
        ({"present": torch.ones(3)}, "do not fit together"),
        ({"rows": torch.zeros(2)}, "do not fit together"),
    ],
)
def test_rows_that_nobody_computed(changes, reason):
    assert reason in rows_problem(rows(**changes))
    assert "missing" in rows_problem({"present": torch.ones(2)})


EXACT = Clustering("exact", margin=10.0, weight=1.0, min_count=1)
PROXY = Clustering("proxy", margin=10.0, weight=1.0, min_count=1)


@pytest.mark.parametrize(
    ("vectors", "kinds", "reason"),
    [
        (torch.ones(3, 4), torch.tensor([0, 1, 1]), ""),
        (torch.ones(0, 4), torch.zeros(0, dtype=torch.int64), ""),
        (torch.ones(5, 4), torch.tensor([0, 1]), "came with 2 kinds"),
        (torch.ones(2, 3), torch.tensor([0, 1]), "expected as many rows of 4"),
        (torch.ones(2, 4), torch.tensor([0, -1]), "no classes"),
        (torch.ones(2, 4), torch.tensor([0.0, 1.0]), "no classes"),
        (torch.full((2, 4), -1e30), torch.tensor([0, 1]), "as large as 1e+30"),
    ],
)
def test_embeddings(vectors, kinds, reason):
    found = EXACT.problem({VECTORS: vectors, KINDS: kinds}, width=4)
    assert (found == "") == (reason == "")
    assert reason in found


@pytest.mark.parametrize(
    ("means", "shown", "reason"),
    [
        (torch.ones(2, 4), torch.tensor([0.0, 1.0]), ""),
        (torch.full((2, 4), 1e9), torch.tensor([0.0, 1.0]), "as large as 1e+09"),
        (torch.ones(2, 4), torch.ones(3), "do not fit together"),
        (torch.ones(2, 4), torch.tensor([0.0, 2.0]), "neither 0 nor 1"),
    ],
)
def test_mean_embeddings(means, shown, reason):
    found = PROXY.problem({CENTROIDS: means, SHOWN: shown}, width=4)
    assert (found == "") == (reason == "")
    assert reason in found


def test_of_noised_means_the_marks_may_be_anything():
    told = {CENTROIDS: torch.ones(2, 4), SHOWN: torch.tensor([0.8, -0.1])}
    assert "neither 0 nor 1" in PROXY.problem(told, width=4)
    assert PROXY.problem(told, width=4, noised=True) == ""


def test_a_small_margin_does_not_make_embeddings_implausible():
    narrow = Clustering("proxy", margin=1e-3, weight=1.0, min_count=1)
    told = {CENTROIDS: torch.full((2, 4), 50.0), SHOWN: torch.ones(2)}
    assert narrow.problem(told, width=4) == ""
