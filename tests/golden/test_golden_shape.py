"""SAML's shape losses from their equations, in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.autograd import gradcheck

from fedmed.case import UNKNOWN_LABEL
from fedmed.losses.compactness import (
    compactness_loss,
    in_slices,
    perimeter_quotients,
)
from fedmed.losses.contour import AROUND, CONTOUR, contour_masks

EPS = 1e-8


def quotient(p, least_area=0.0):
    """P^2 / (4 pi A), backward differences at one pixel, pixel by pixel."""
    perimeter = 0.0
    for i in range(1, p.shape[0]):
        for j in range(1, p.shape[1]):
            down, across = p[i, j] - p[i - 1, j], p[i, j] - p[i, j - 1]
            perimeter += np.sqrt(down**2 + across**2 + EPS)
    return perimeter**2 / (4 * np.pi * (p.sum() + least_area))


def disc(radius, size=384):
    i, j = np.mgrid[:size, :size]
    return ((i - size // 2) ** 2 + (j - size // 2) ** 2 < radius**2).astype(float)


def ours(p, **options):
    return float(perimeter_quotients(torch.as_tensor(p)[None], **options))


@pytest.mark.parametrize(("radius", "published"), [(20, 1.60), (40, 1.47), (60, 1.43)])
def test_a_disc_on_384_pixels(radius, published):
    found = ours(disc(radius))
    assert found == pytest.approx(published, abs=0.005)
    assert found == pytest.approx(quotient(disc(radius)), rel=1e-10)
    # The reference's factor 0.01 on P is one of 1e-4 on the quotient.
    scaled = (0.01 * np.sqrt(found)) ** 2
    assert scaled == pytest.approx(1e-4 * found, rel=1e-12)


def test_a_square_in_closed_form():
    """Side n inside the slice: 4 n - 2 straight steps and one corner of sqrt(2)."""
    n, square = 10, np.zeros((20, 20))
    square[5:15, 5:15] = 1
    expected = (4 * n - 2 + np.sqrt(2)) ** 2 / (4 * np.pi * n**2)
    assert ours(square, eps=0.0) == pytest.approx(expected, rel=1e-12)
    assert ours(square) == pytest.approx(quotient(square), rel=1e-12)


def test_of_equal_areas_the_disc_is_the_most_compact():
    side = int(np.sqrt(disc(40).sum()))
    square, ribbon = np.zeros((384, 384)), np.zeros((384, 384))
    square[100 : 100 + side, 100 : 100 + side] = 1
    ribbon[100:110, 10 : 10 + side**2 // 10] = 1
    # In pixels straight edges look shorter than round ones; a ribbon stands out.
    assert ours(ribbon) > 3 * max(ours(square), ours(disc(40)))


def test_an_empty_slice_is_finite_and_takes_no_part():
    size = 32
    least = (size - 1) ** 2 * np.sqrt(EPS)
    found = ours(np.zeros((size, size)), least_area_px2=1.0)
    assert found == pytest.approx(least**2 / (4 * np.pi), rel=1e-10)
    logits = torch.randn(2, 2, size, size, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(2, size, size, dtype=torch.uint8)
    value = compactness_loss(logits, empty)
    value.backward()
    assert float(value.detach()) == 0
    assert not logits.grad.any()


def test_the_loss_is_the_sum_over_slices_that_show_foreground():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 3, 8, 9))
    labels = rng.integers(0, 3, (3, 8, 9))
    labels[1] = 0
    labels[1, 0, 0] = UNKNOWN_LABEL
    p = 1 - np.exp(z[:, 0]) / np.exp(z).sum(axis=1)
    expected = quotient(p[0], 1.0) + quotient(p[2], 1.0)
    found = compactness_loss(torch.as_tensor(z), torch.as_tensor(labels))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_a_volume_is_its_slices():
    rng = np.random.default_rng(1)
    z, labels = torch.as_tensor(rng.normal(size=(2, 2, 5, 6, 3))), None
    labels = torch.as_tensor(rng.integers(0, 2, (2, 5, 6, 3)))
    slices = torch.cat([compactness_loss(z[..., k], labels[..., k])[None]
                        for k in range(3)])  # fmt: skip
    torch.testing.assert_close(compactness_loss(z, labels), slices.sum())
    assert torch.equal(in_slices(labels)[1], labels[0, :, :, 1])


def test_derivatives_of_the_quotient():
    rng = np.random.default_rng(2)
    p = torch.tensor(rng.uniform(size=(2, 5, 6)), requires_grad=True)
    assert gradcheck(lambda x: perimeter_quotients(x, least_area_px2=1.0), p)


@pytest.mark.parametrize(("contour_px", "ring_px"), [(1, 5), (2, 1), (3, 3)])
def test_contour_and_ring_are_scipys_erosion_and_dilation(contour_px, ring_px):
    rng = np.random.default_rng(3)
    y = ndimage.gaussian_filter(rng.normal(size=(4, 40, 37)), (0, 3, 3)) > 0.02
    cross = ndimage.generate_binary_structure(2, 1)
    found = contour_masks(
        torch.as_tensor(y.astype(np.uint8)), contour_px=contour_px, ring_px=ring_px
    )
    for b in range(len(y)):
        inner = ndimage.binary_erosion(y[b], cross, iterations=contour_px)
        outer = ndimage.binary_dilation(y[b], cross, iterations=ring_px)
        np.testing.assert_array_equal(found[b, CONTOUR].numpy(), y[b] & ~inner)
        np.testing.assert_array_equal(found[b, AROUND].numpy(), outer & ~y[b])
    assert found.any(dim=3).any(dim=2).all()


def test_unknown_pixels_are_in_neither_mask():
    labels = torch.zeros(1, 9, 9, dtype=torch.int64)
    labels[0, 3:6, 3:6] = 2
    labels[0, 3, 3] = labels[0, 2, 4] = UNKNOWN_LABEL
    masks = contour_masks(labels)
    assert not masks[:, :, 3, 3].any()
    assert not masks[:, :, 2, 4].any()
    assert not contour_masks(torch.full_like(labels, UNKNOWN_LABEL)).any()
