"""How far a predicted shape is from a disc, SAML's shape prior.

It is a part of a method's loss, not a loss of a study.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmed.case import UNKNOWN_LABEL
from fedmed.losses.known_voxels import at_least_float32, check_shapes

_LEAST_AREA_PX2 = 1.0


def perimeter_quotients(
    foreground_BIJ: Tensor, *, eps: float = 1e-8, least_area_px2: float = 0.0
) -> Tensor:
    r"""Compare the squared perimeter of each slice with the area that it encloses.

    $\frac{P^2}{4 \pi A}$ with
    $P = \sum_{i,j \geq 1} \sqrt{(p_{ij} - p_{i-1,j})^2 + (p_{ij} - p_{i,j-1})^2
    + \epsilon}$ and $A = \sum_{ij} p_{ij}$: the inverse isoperimetric quotient. A disc
    in the plane has 1, every other shape more.

    Pixels overestimate a perimeter: a disc of radius 20, 40, 60 on 384 x 384 pixels has
    1.60, 1.47, 1.43. The $\epsilon$ alone adds $\sqrt{\epsilon}$ per pixel, 14.7 px
    there.

    Args:
        foreground_BIJ: Probabilities p.
        eps: Keeps the root differentiable where p is constant.
        least_area_px2: Added to A, so that a slice of zeros has a finite value.

    Returns:
        (B,), differentiable.

    Source:
        Liu, Dou, Heng, SAML, MICCAI 2020, arXiv:2007.02035, the compactness loss, with
        the backward differences at one pixel of its reference code.

    Example:
        >>> square = torch.zeros(1, 6, 6)
        >>> square[:, 1:5, 1:5] = 1
        >>> perimeter_quotients(square, eps=0.0)  # (14 + sqrt(2))^2 / (4 pi 16)
        tensor([1.1817])
    """
    here_BIJ = foreground_BIJ[:, 1:, 1:]
    down_BIJ = here_BIJ - foreground_BIJ[:, :-1, 1:]
    across_BIJ = here_BIJ - foreground_BIJ[:, 1:, :-1]
    steps_BIJ = (down_BIJ.square() + across_BIJ.square() + eps).sqrt()
    perimeters_B = steps_BIJ.sum(dim=(1, 2))
    areas_B = foreground_BIJ.sum(dim=(1, 2)) + least_area_px2
    return perimeters_B.square() / (4 * math.pi * areas_B)


def compactness_loss(logits_BLIJ: Tensor, labels_BIJ: Tensor) -> Tensor:
    r"""Add up the quotients of a batch's slices, SAML's $L_{compact}$.

    Slices whose labels show no foreground take no part: on them the quotient would
    reward a larger area. One square pixel is added to the area of the others.

    Args:
        logits_BLIJ: (B, L, I, J) or (B, L, I, J, K), each K a slice; p is the
            probability of any class but the first.
        labels_BIJ: (B, I, J) or (B, I, J, K).

    Returns:
        Scalar; the sum over slices, 0 if none shows foreground.

    Raises:
        DataError: If the shapes do not fit.

    Differs from the source:
        The reference's code multiplies P by 0.01 before it is squared, so that its
        weight of 1.0 is one of 1e-4 on the quotient that its paper defines; here the
        quotient is the paper's. It takes slices without foreground as they come.
    """
    check_shapes(logits_BLIJ, labels_BIJ)
    log_odds_BLIJ = at_least_float32(logits_BLIJ)
    foreground_BIJ = 1 - log_odds_BLIJ.softmax(dim=1)[:, 0]
    shown_BIJ = (labels_BIJ != 0) & (labels_BIJ != UNKNOWN_LABEL)
    slices_BIJ, shown_BIJ = in_slices(foreground_BIJ), in_slices(shown_BIJ)
    quotients_B = perimeter_quotients(slices_BIJ, least_area_px2=_LEAST_AREA_PX2)
    return torch.where(shown_BIJ.any(dim=2).any(dim=1), quotients_B, 0.0).sum()


def in_slices(values_BIJ: Tensor) -> Tensor:
    """Make each K of a batch of volumes a slice: (B, I, J, K) to (BK, I, J).

    A batch of slices is given back as it is.
    """
    if values_BIJ.ndim == 3:
        return values_BIJ
    return values_BIJ.movedim(3, 1).flatten(0, 1)
