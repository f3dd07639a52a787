"""Distillation losses from their equations, in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmed.losses.distillation import (
    class_logit_sums,
    shared_classes,
    soft_confusion,
    softened_kl,
    symmetric_kl,
)

UNKNOWN = 255
# Sums of a few dozen float64 terms: rounding stays far below 1e-12.
EXACT = {"rtol": 0, "atol": 1e-12}


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def kl(p, q):
    return sum(p[j] * np.log(p[j] / q[j]) for j in range(len(p)))


def batch(seed, shape=(2, 3, 4), classes=3, absent=None):
    """Logits (B, L, I, J), labels (B, I, J) with one unknown voxel."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(shape[0], classes, *shape[1:]))
    labels = rng.integers(0, classes, shape)
    if absent is not None:
        labels[labels == absent] = (absent + 1) % classes
    labels.reshape(-1)[3] = UNKNOWN
    return logits, labels


def rows_of(logits, labels, temperature):
    """UMMKD: q_c = softmax(mean of logits of class c / T)."""
    flat = np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])
    found = []
    for c in range(logits.shape[1]):
        of_class = flat[labels.reshape(-1) == c]
        mean = of_class.mean(axis=0) if len(of_class) else None
        found.append(None if mean is None else softmax(mean / temperature))
    return found


def ours(logits, labels, temperature):
    sums, counts = class_logit_sums(
        torch.as_tensor(logits), torch.as_tensor(labels), logits.shape[1]
    )
    return soft_confusion(sums, counts, temperature), counts


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_confusion(temperature):
    logits, labels = batch(1)
    found, counts = ours(logits, labels, temperature)
    np.testing.assert_allclose(
        found.exp().numpy(), np.stack(rows_of(logits, labels, temperature)), **EXACT
    )
    np.testing.assert_array_equal(
        counts.numpy(), np.bincount(labels[labels != UNKNOWN], minlength=3)
    )


@pytest.mark.parametrize("half", [False, True])
def test_symmetric_kl(half):
    """UMMKD's distillation loss; its code has a factor 1/2 that its paper has not."""
    (a, ya), (b, yb) = batch(1), batch(2)
    p, q = rows_of(a, ya, 2.0), rows_of(b, yb, 2.0)
    expected = sum(kl(p[c], q[c]) + kl(q[c], p[c]) for c in range(3)) / 3
    log_p, log_q = ours(a, ya, 2.0)[0], ours(b, yb, 2.0)[0]
    found = symmetric_kl(log_p, log_q, half=half)
    np.testing.assert_allclose(found, expected * (0.5 if half else 1), **EXACT)


@pytest.mark.parametrize("reduction", ["present", "all"])
def test_an_absent_class_takes_no_part(reduction):
    (a, ya), (b, yb) = batch(1, absent=2), batch(2)
    p, q = rows_of(a, ya, 2.0), rows_of(b, yb, 2.0)
    assert p[2] is None
    expected = sum(kl(p[c], q[c]) + kl(q[c], p[c]) for c in range(2))
    expected /= 2 if reduction == "present" else 3
    logits = torch.tensor(b, requires_grad=True)
    log_p, counts_a = ours(a, ya, 2.0)
    log_q, counts_b = ours(logits, yb, 2.0)
    mask = shared_classes(counts_a, counts_b)
    assert mask.tolist() == [True, True, False]
    found = symmetric_kl(log_p, log_q, mask, reduction=reduction)
    np.testing.assert_allclose(found.item(), expected, **EXACT)
    (gradient,) = torch.autograd.grad(found, logits)
    of_absent = torch.as_tensor(yb) == 2
    assert of_absent.any()
    assert not gradient.movedim(1, -1)[of_absent].any()
    # The trap: without the mask, uniform rows pull at the class that is there.
    np.testing.assert_allclose(log_p[2].exp(), np.full(3, 1 / 3), **EXACT)
    (trap,) = torch.autograd.grad(symmetric_kl(log_p, ours(logits, yb, 2.0)[0]), logits)
    assert trap.movedim(1, -1)[of_absent].any()


def test_nothing_in_common_is_no_disagreement():
    logits, labels = batch(1)
    row, _ = ours(logits, labels, 1.0)
    nobody = torch.zeros(3, dtype=torch.bool)
    assert symmetric_kl(row, row.flip(0), nobody) == 0


def test_perfect_agreement_is_zero_and_flat():
    logits, labels = batch(4)
    a = torch.tensor(logits, requires_grad=True)
    found = symmetric_kl(ours(a, labels, 2.0)[0], ours(logits, labels, 2.0)[0])
    assert found.item() == 0
    assert not torch.autograd.grad(found, a)[0].any()
    b = torch.tensor(logits, requires_grad=True)
    same = softened_kl(b, torch.tensor(logits), temperature=3.0)
    assert abs(same.item()) < 1e-15
    assert torch.autograd.grad(same, b)[0].abs().max() < 1e-15


@pytest.mark.parametrize("scaled", [True, False])
def test_softened_kl(scaled):
    """Hinton et al., section 2: T^2 KL(softmax(t / T) || softmax(z / T))."""
    (student, labels), (teacher, _) = batch(5), batch(6)
    known = labels != UNKNOWN
    z = np.moveaxis(student, 1, -1)[known]
    t = np.moveaxis(teacher, 1, -1)[known]
    temperature = 3.0
    terms = [
        kl(softmax(t[n] / temperature), softmax(z[n] / temperature))
        for n in range(len(z))
    ]
    expected = np.mean(terms) * (temperature**2 if scaled else 1)
    found = softened_kl(
        torch.tensor(student),
        torch.tensor(teacher),
        temperature=temperature,
        known_B=torch.tensor(known),
        scaled=scaled,
    )
    np.testing.assert_allclose(found.item(), expected, **EXACT)


def test_gradients():
    """Against finite differences, in both arguments where both have one."""
    (a, ya), (b, yb) = batch(1, (1, 2, 3)), batch(2, (1, 2, 3))

    def coupled(x, y):
        log_p, n = ours(x, ya, 2.0)
        log_q, m = ours(y, yb, 2.0)
        return symmetric_kl(log_p, log_q, shared_classes(n, m))

    x, y = (torch.tensor(v, requires_grad=True) for v in (a, b))
    assert torch.autograd.gradcheck(coupled, (x, y))
    teacher = torch.tensor(b)
    assert torch.autograd.gradcheck(
        lambda z: softened_kl(z, teacher, temperature=2.0), (x,)
    )
