"""Losses of embeddings from their equations, pair by pair, in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from fedmed.errors import ConfigError
from fedmed.losses.metric import Labelled, contrastive, triplet_semi_hard

EXACT = {"rtol": 0, "atol": 1e-12}


def draw(seed, n=9, classes=3, dims=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dims)), rng.integers(0, classes, n)


def labelled(vectors, labels):
    return Labelled(torch.as_tensor(vectors), torch.as_tensor(labels))


def triplets(a, la, o, lo, margin, *, itself):
    """max(0, d(a,p)^2 - d(a,n)^2 + margin), n nearest beyond p, else farthest."""
    terms = []
    for i in range(len(a)):
        d = [float(np.sum((a[i] - x) ** 2)) for x in o]
        negatives = [d[n] for n in range(len(o)) if lo[n] != la[i]]
        for p in range(len(o)):
            if lo[p] != la[i] or (itself and p == i) or not negatives:
                continue
            beyond = [n for n in negatives if n > d[p]]
            chosen = min(beyond) if beyond else max(negatives)
            terms.append(max(0.0, d[p] - chosen + margin))
    return np.mean(terms) if terms else 0.0


def pairs(a, la, o, lo, margin, *, itself):
    """d^2 for equal labels, max(0, margin - d)^2 otherwise."""
    terms = []
    for i in range(len(a)):
        for j in range(len(o)):
            if itself and i == j:
                continue
            d = np.sqrt(np.sum((a[i] - o[j]) ** 2))
            terms.append(d**2 if la[i] == lo[j] else max(0.0, margin - d) ** 2)
    return np.mean(terms) if terms else 0.0


LOSSES = [(triplet_semi_hard, triplets), (contrastive, pairs)]
every_loss = pytest.mark.parametrize(("loss", "golden"), LOSSES)


@every_loss
@pytest.mark.parametrize("margin", [0.3, 2.0, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_among_themselves(loss, golden, margin, seed):
    v, y = draw(seed)
    found = loss(labelled(v, y), margin=margin)
    np.testing.assert_allclose(found, golden(v, y, v, y, margin, itself=True), **EXACT)


@every_loss
@pytest.mark.parametrize("seed", range(4))
def test_against_others(loss, golden, seed):
    (v, y), (o, z) = draw(seed), draw(seed + 10, n=5)
    found = loss(labelled(v, y), labelled(o, z), margin=2.0)
    np.testing.assert_allclose(found, golden(v, y, o, z, 2.0, itself=False), **EXACT)


@every_loss
@pytest.mark.parametrize("against_others", [False, True])
def test_derivatives(loss, golden, against_others):
    del golden
    v, y = draw(1)
    o, z = draw(2, n=5)
    vectors = torch.tensor(v, requires_grad=True)
    others = labelled(o, z) if against_others else None

    def value(x):
        return loss(Labelled(x, torch.as_tensor(y)), others, margin=3.0)

    assert gradcheck(value, vectors)


@every_loss
@pytest.mark.parametrize("labels", [[], [0], [0, 0, 0], [0, 1, 2]])
def test_too_few_of_a_kind_give_finite_numbers(loss, golden, labels):
    v, y = draw(3)[0][: len(labels)], np.array(labels, dtype=np.int64)
    vectors = torch.tensor(v, requires_grad=True)
    found = loss(Labelled(vectors, torch.as_tensor(y)), margin=1.0)
    expected = golden(v, y, v, y, 1.0, itself=True)
    np.testing.assert_allclose(found.detach(), expected, **EXACT)
    found.backward()
    assert torch.isfinite(vectors.grad).all()


@every_loss
def test_vectors_that_coincide_have_a_finite_gradient(loss, golden):
    del golden
    vectors = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    found = loss(Labelled(vectors, torch.tensor([0, 0, 1, 1])), margin=2.0)
    found.backward()
    assert torch.isfinite(vectors.grad).all()
    assert float(found.detach()) > 0


@every_loss
@pytest.mark.parametrize("margin", [0.0, -1.0])
def test_a_margin_must_be_positive(loss, golden, margin):
    del golden
    with pytest.raises(ConfigError, match="margin"):
        loss(labelled(*draw(0)), margin=margin)


def test_a_positive_beyond_all_negatives_meets_the_farthest():
    """Anchor 0, positive 3, negatives 1 and 2: 9 - 4 + margin; of 3: 9 - 4 + margin."""
    rows, labels = [[0.0], [3.0], [1.0], [2.0]], [0, 0, 1, 2]
    found = triplet_semi_hard(labelled(np.array(rows), np.array(labels)), margin=1.0)
    assert float(found) == pytest.approx(6.0)
