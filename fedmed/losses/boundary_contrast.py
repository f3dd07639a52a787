"""Contrast between what lies on a contour and what lies around it.

Losses of methods (FedDG's boundary-oriented learning), not of a study.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError
from fedmed.losses.contour import contour_masks
from fedmed.losses.metric import Labelled

_NOTHING = -1e9
"""Logarithm of a sum of no terms; finite, so that its derivative is 0."""


def boundary_embeddings(
    features_BF: Tensor, labels_B: Tensor, *, label: int
) -> Labelled:
    """Average features over the contour of one class, and over the ring around it.

    Args:
        features_BF: (B, F, I, J) or (B, F, I, J, K).
        labels_B: (B, I, J) or (B, I, J, K); contours are drawn slice by slice.
        label: The class; all others count as background.

    Returns:
        Vectors (N, F) with label 0 for contours and 1 for rings, N at most 2 B: an
        empty mask gives none.
    """
    is_class = (labels_B == label).to(torch.uint8)
    shapes = is_class.masked_fill(labels_B == UNKNOWN_LABEL, UNKNOWN_LABEL)
    masks_BT = _masks(shapes).to(features_BF)
    sums_BTF = torch.einsum("bft,bmt->bmf", features_BF.flatten(2), masks_BT.flatten(2))
    counts_BT = masks_BT.flatten(2).sum(dim=2)
    shown_BT = counts_BT > 0
    types_BT = torch.arange(2, device=shown_BT.device).expand_as(shown_BT)
    vectors_NF = sums_BTF[shown_BT] / counts_BT[shown_BT].unsqueeze(1)
    return Labelled(vectors_NF, types_BT[shown_BT])


def nt_xent(embeddings: Labelled, *, temperature: float) -> Tensor:
    r"""Normalised, temperature-scaled cross-entropy with labels.

    With cosine similarities $s$, for every pair (i, p) of equal labels
    $-\log \frac{e^{s_{ip} / \tau}}{e^{s_{ip} / \tau} + \sum_n e^{s_{in} / \tau}}$, n
    over the vectors of other labels than i; averaged over the pairs.

    Args:
        embeddings: The vectors.
        temperature: $\tau$ > 0.

    Returns:
        Scalar >= 0; 0 if no two labels are equal, or all are.

    Raises:
        ConfigError: If the temperature is not above 0.

    Source:
        Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss, NeurIPS 2016;
        Chen et al., SimCLR, ICML 2020, arXiv:2002.05709, eq. (1), with all pairs of
        equal labels as positives.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> nt_xent(Labelled(rows, torch.tensor([0, 0, 1])), temperature=1.0)
        tensor(0.3133)
    """
    if not temperature > 0:
        raise ConfigError(f"the temperature is {temperature}; it must be above 0")
    vectors_NF, labels_N = embeddings
    directions_NF = functional.normalize(vectors_NF, dim=1)
    scaled_NN = directions_NF @ directions_NF.T / temperature
    same_NN = labels_N.unsqueeze(1) == labels_N.unsqueeze(0)
    itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    positive_NN = same_NN & ~itself_NN
    if not positive_NN.any():
        return vectors_NF.sum() * 0.0
    negatives_N = scaled_NN.masked_fill(same_NN, _NOTHING).logsumexp(dim=1)
    terms_NN: Tensor = functional.softplus(negatives_N.unsqueeze(1) - scaled_NN)
    return terms_NN[positive_NN].mean()


def _masks(shapes_B: Tensor) -> Tensor:
    """Contour and ring of every slice: (B, I, J[, K]) to (B, 2, I, J[, K])."""
    if shapes_B.ndim == 3:
        return contour_masks(shapes_B)
    slices = shapes_B.movedim(-1, 1)
    masks = contour_masks(slices.flatten(0, 1))
    return masks.reshape(*slices.shape[:2], *masks.shape[1:]).permute(0, 2, 3, 4, 1)
