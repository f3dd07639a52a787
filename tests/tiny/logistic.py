"""Softmax regression on the tiny hospitals' tables, in NumPy float64.

The study's network with `widths: []` is the same function; every formula here is
written out, so that nothing of the project's own arithmetic is used.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmed.message import State

from . import hospitals

SITES = ("a", "b", "c")
MODEL: dict[str, list[int]] = {"widths": []}


def data(site: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, F) and classes (N,) of a hospital."""
    (found,) = [s for s in hospitals.open_sites(kind="table") if s.site_id == site]
    cases = [ref.read() for ref in found.cases]
    rows = np.stack([case.image for case in cases]).astype(np.float64)
    return rows, np.array([int(case.label) for case in cases])


def counts() -> np.ndarray:
    """Number of rows of each hospital."""
    return np.array([len(data(site)[1]) for site in SITES], dtype=np.float64)


def weights_of(state: State | Mapping[str, np.ndarray]) -> np.ndarray:
    """Weight matrix and bias of a state as one array (L, F + 1)."""
    matrix, bias = np.asarray(state["head.weight"]), np.asarray(state["head.bias"])
    return np.concatenate([matrix, bias[:, None]], axis=1)


def gradient(weights: np.ndarray, site: str) -> np.ndarray:
    """Gradient of a hospital's mean cross-entropy over all of its rows."""
    rows, classes = data(site)
    inputs = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    logits = inputs @ weights.T
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    excess = probabilities - np.eye(len(weights))[classes]
    mean: np.ndarray = excess.T @ inputs / len(rows)
    return mean
