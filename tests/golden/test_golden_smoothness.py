"""SAML's L_smooth from its equations, in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedmed.networks.metric_network import METRIC, MetricNetwork
from fedmed.training.clustering import LAYERS, Clustering
from fedmed.training.coupled import Pass
from strategies.saml import SAML

MARGIN = 10.0


class Holder(torch.nn.Module):
    def __init__(self, metric):
        super().__init__()
        self.add_module(METRIC, metric)


def draw(seed, slices, shape=(24, 20)):
    rng = np.random.default_rng(seed)
    y = ndimage.gaussian_filter(rng.normal(size=(slices, *shape)), (0, 3, 3)) > 0.05
    y[0] = False
    return rng.normal(size=(slices, 5, *shape)), y.astype(np.int64)


def metric_network():
    network = MetricNetwork(5, (4, 3)).double()
    rng = np.random.default_rng(9)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.as_tensor(rng.normal(size=tuple(p.shape))))
    return network


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def embeddings(features, y, network):
    """M(mean of features over contour, ring) of each slice that has them."""
    found = []
    cross = ndimage.generate_binary_structure(2, 1)
    for z, shape in zip(features, y > 0, strict=True):
        contour = shape & ~ndimage.binary_erosion(shape, cross)
        ring = ndimage.binary_dilation(shape, cross, iterations=5) & ~shape
        for kind, mask in enumerate((contour, ring)):
            if mask.any():
                e = z[:, mask].mean(axis=1)
                for layer in network.layers:
                    weight, bias = (p.detach().numpy() for p in layer.parameters())
                    e = leaky(weight @ e + bias)
                found.append((kind, e))
    return found


def loss(found):
    terms = []
    for i, (kind, a) in enumerate(found):
        far = [np.sum((a - x) ** 2) for k, x in found if k != kind]
        for j, (other, p) in enumerate(found):
            if other == kind and i != j:
                d = np.sum((a - p) ** 2)
                beyond = [n for n in far if n > d]
                chosen = min(beyond) if beyond else max(far)
                terms.append(max(0.0, d - chosen + MARGIN))
    return np.mean(terms)


def passed_of(features, y, network):
    outputs = {f"{LAYERS[0]}/input": torch.as_tensor(features)}
    labels = torch.as_tensor(y)
    logits = torch.zeros(len(y), 2, *y.shape[1:], dtype=torch.float64)
    return Pass(Holder(network), logits, labels, outputs)


def test_over_the_slices_of_three_sites():
    network = metric_network()
    parts = {site: draw(n, n + 2) for n, site in enumerate("abc")}
    expected = [e for f, y in parts.values() for e in embeddings(f, y, network)]
    embedded = {s: SAML()._embedded(passed_of(*parts[s], network)) for s in parts}
    smooth = Clustering("exact", MARGIN, 0.005, 1)
    found = smooth.pooled(embedded, dict.fromkeys(parts, 1.0))
    assert found.item() == pytest.approx(0.005 * loss(expected), rel=1e-12)
    for e, (kind, vector) in zip(
        (v for s in "abc" for v in embedded[s].vectors_NF), expected, strict=True
    ):
        np.testing.assert_allclose(e.detach(), vector, rtol=0, atol=1e-12)
        assert kind in (0, 1)


def test_a_volume_is_its_slices():
    network = metric_network()
    features, y = draw(4, 6)
    volume = passed_of(
        np.moveaxis(features.reshape(2, 3, *features.shape[1:]), 1, -1),
        np.moveaxis(y.reshape(2, 3, *y.shape[1:]), 1, -1),
        network,
    )
    one = SAML()._embedded(volume)
    other = SAML()._embedded(passed_of(features, y, network))
    torch.testing.assert_close(one.vectors_NF, other.vectors_NF, rtol=0, atol=1e-12)
    assert torch.equal(one.kinds_N, other.kinds_N)
    assert torch.equal(one.voxels_N, other.voxels_N)
