"""The losses' values and gradients, from their formulas, in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmed.losses.build import build_loss

UNKNOWN = 255


def softmax(logits_NL):
    e = np.exp(logits_NL - logits_NL.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def dice_linear(p, y, *, s=0.0, s_=1e-7):
    """MS-Net: 1 - (1/L) sum_c (2 sum p y + s) / (sum p + sum y + s')."""
    terms = [
        (2 * sum(p[:, c] * y[:, c]) + s) / (sum(p[:, c]) + sum(y[:, c]) + s_)
        for c in range(p.shape[1])
    ]
    return 1 - sum(terms) / len(terms)


def dice_quadratic_neg(p, y):
    """UMMKD: -(1/L) sum_c 2 sum p y / (sum p^2 + sum y + 1e-7)."""
    terms = [
        2 * sum(p[:, c] * y[:, c]) / (sum(p[:, c] ** 2) + sum(y[:, c]) + 1e-7)
        for c in range(p.shape[1])
    ]
    return -sum(terms) / len(terms)


def cross_entropy(p, y, *, w=None):
    """UMMKD: mean over voxels of -sum_c w_c y_c log p_c."""
    w = np.ones(p.shape[1]) if w is None else np.array(w)
    return -(w * y * np.log(p)).sum() / len(p)


GOLDEN = {
    "dice_linear": (dice_linear, {}, 0.0),
    "dice_linear smooth": (
        lambda p, y: dice_linear(p, y, s=1e-5, s_=1e-5),
        {"smooth_numerator": 1e-5, "smooth_denominator": 1e-5},
        0.0,
    ),
    # Ours is the published form plus 1.
    "dice_quadratic": (dice_quadratic_neg, {}, 1.0),
    "cross_entropy": (cross_entropy, {}, 0.0),
    "cross_entropy weighted": (
        lambda p, y: cross_entropy(p, y, w=[0.2, 1.0, 3.0]),
        {"class_weights": [0.2, 1.0, 3.0]},
        0.0,
    ),
    # UMMKD: w_c = 1 - (voxels of class c) / (all voxels), anew for each batch.
    "cross_entropy_by_frequency": (
        lambda p, y: cross_entropy(p, y, w=1 - y.mean(axis=0)),
        {},
        0.0,
    ),
}


def numeric_gradient(function, logits_NL, step=1e-5):
    gradient = np.zeros_like(logits_NL)
    for index in np.ndindex(logits_NL.shape):
        shift = np.zeros_like(logits_NL)
        shift[index] = step
        gradient[index] = function(logits_NL + shift) - function(logits_NL - shift)
    return gradient / (2 * step)


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("shape", [(6,), (2, 3, 2), (2, 2, 3, 2)])
def test_value_and_gradient(case, shape):
    formula, options, offset = GOLDEN[case]
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, shape)
    labels.reshape(-1)[1] = UNKNOWN
    logits = rng.normal(size=(shape[0], 3, *shape[1:]))
    known = labels.reshape(-1) != UNKNOWN
    one_hot = np.eye(3)[labels.reshape(-1)[known]]

    def expected(logits_NL):
        return formula(softmax(logits_NL[known]), one_hot) + offset

    logits_NL = np.moveaxis(logits, 1, -1).reshape(-1, 3)
    tensor = torch.tensor(logits, requires_grad=True)
    loss = build_loss(case.split()[0], **options)(tensor, torch.tensor(labels))
    (gradient,) = torch.autograd.grad(loss, tensor)
    gradient_NL = np.moveaxis(gradient.numpy(), 1, -1).reshape(-1, 3)

    # Sums of a few dozen float64 terms: rounding stays far below 1e-12.
    np.testing.assert_allclose(loss.item(), expected(logits_NL), rtol=0, atol=1e-12)
    # A central difference with step 1e-5 is right to about 1e-10.
    np.testing.assert_allclose(
        gradient_NL, numeric_gradient(expected, logits_NL), rtol=0, atol=1e-9
    )
