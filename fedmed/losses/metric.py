"""Losses of distances between embeddings: near where labels agree, far otherwise.

They are losses of methods (MASF's clustering, SAML's smoothness), not of a study: what
they compare are vectors with labels, which may come from several hospitals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedmed.errors import ConfigError


class Labelled(NamedTuple):
    """Vectors, and what each one is.

    Attributes:
        vectors_NF: (N, F), floating point.
        labels_N: (N,), integers.
    """

    vectors_NF: Tensor
    labels_N: Tensor


def triplet_semi_hard(
    anchors: Labelled, others: Labelled | None = None, *, margin: float
) -> Tensor:
    r"""Want each positive nearer than a negative, by a margin.

    $\max(0, d(a, p)^2 - d(a, n)^2 + \xi)$, averaged over all pairs (a, p) of equal
    labels. Of the negatives of a the one is taken that is nearest beyond p (semi-hard),
    or the farthest if none lies beyond p.

    Args:
        anchors: The vectors a.
        others: Where positives and negatives are taken from, every one of them; None:
            from the anchors, each but itself.
        margin: $\xi$ > 0, in the unit of squared distances.

    Returns:
        Scalar >= 0. Anchors without a positive or without a negative take no part; 0,
        with gradient 0, if there is no other.

    Raises:
        ConfigError: If the margin is not above 0.

    Source:
        Schroff et al., FaceNet, CVPR 2015, arXiv:1503.03832, section 3.2, with the
        choice of negatives of MASF's and SAML's reference code.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [2.0]])
        >>> triplet_semi_hard(Labelled(rows, torch.tensor([0, 0, 1])), margin=1.0)
        tensor(0.5000)
    """
    _check_margin(margin)
    squares_NM, positive_NM, negative_NM = _compared(anchors, others)
    usable_NM = positive_NM & negative_NM.any(dim=1, keepdim=True)
    beyond_NMM = negative_NM.unsqueeze(1) & (
        squares_NM.unsqueeze(1) > squares_NM.unsqueeze(2)
    )
    if not squares_NM.numel():
        return squares_NM.sum()
    semi_hard_NM = (
        squares_NM.unsqueeze(1).masked_fill(~beyond_NMM, torch.inf).amin(dim=2)
    )
    farthest_N1 = squares_NM.masked_fill(~negative_NM, -torch.inf).amax(1, keepdim=True)
    chosen_NM = torch.where(beyond_NMM.any(dim=2), semi_hard_NM, farthest_N1)
    # Pairs that take no part may hold infinities; they must not reach the gradient.
    chosen_NM = torch.where(usable_NM, chosen_NM, squares_NM)
    return _mean(torch.relu(squares_NM - chosen_NM + margin), usable_NM)


def contrastive(
    anchors: Labelled, others: Labelled | None = None, *, margin: float
) -> Tensor:
    r"""Want equal labels at distance 0, others at a margin or farther.

    $d^2$ for pairs of equal labels, $\max(0, \xi - d)^2$ for the others, averaged over
    all pairs.

    Args:
        anchors: One side of the pairs.
        others: The other side; None: the anchors, each with all but itself.
        margin: $\xi$ > 0, in the unit of distances.

    Returns:
        Scalar >= 0; 0 if there is no pair.

    Raises:
        ConfigError: If the margin is not above 0.

    Source:
        Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006, eq. (4).

    Differs from the source:
        Without its factor 1/2, as in MASF; the mean of all pairs, not their sum.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [3.0]])
        >>> contrastive(Labelled(rows, torch.tensor([0, 0, 1])), margin=4.0)
        tensor(2.)
    """
    _check_margin(margin)
    squares_NM, positive_NM, negative_NM = _compared(anchors, others)
    # The root has no derivative at 0: vectors that coincide stay where they are.
    apart_NM = squares_NM > 0
    distances_NM = torch.where(apart_NM, squares_NM, 1.0).sqrt() * apart_NM
    missing_NM = torch.relu(margin - distances_NM).square()
    terms_NM = torch.where(positive_NM, squares_NM, missing_NM)
    return _mean(terms_NM, positive_NM | negative_NM)


def _compared(
    anchors: Labelled, others: Labelled | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of all pairs, which are positive, and which negative."""
    far = anchors if others is None else others
    gaps_NMF = anchors.vectors_NF.unsqueeze(1) - far.vectors_NF.unsqueeze(0)
    same_NM = anchors.labels_N.unsqueeze(1) == far.labels_N.unsqueeze(0)
    positive_NM = same_NM
    if others is None:
        itself_NN = torch.eye(len(same_NM), dtype=torch.bool, device=same_NM.device)
        positive_NM = same_NM & ~itself_NN
    return gaps_NMF.square().sum(dim=2), positive_NM, ~same_NM


def _mean(terms_NM: Tensor, counted_NM: Tensor) -> Tensor:
    total = torch.where(counted_NM, terms_NM, 0.0).sum()
    return total / counted_NM.sum().clamp(min=1)


def _check_margin(margin: float) -> None:
    if not margin > 0:
        raise ConfigError(f"the margin is {margin}; it must be above 0")
