"""Where a shape ends, and what lies around it: masks from labels, slice by slice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.case import UNKNOWN_LABEL

CONTOUR, AROUND = 0, 1
"""Number of each type in what `contour_masks` gives."""


def contour_masks(
    labels_BIJ: Tensor, *, contour_px: int = 1, ring_px: int = 5
) -> Tensor:
    r"""Mark each slice's contour, and the ring of background around it.

    With y the foreground of a slice and a cross of 3 x 3 pixels as structuring element:
    contour $y - \mathrm{erode}(y, n_c)$, ring $\mathrm{dilate}(y, n_r) - y$. What lies
    outside the slice is background.

    Args:
        labels_BIJ: (B, I, J), every label but the first is foreground, or
            `UNKNOWN_LABEL`, which is in neither mask.
        contour_px: $n_c$ >= 1, width of the contour, inside the shape.
        ring_px: $n_r$ >= 1, width of the ring, outside.

    Returns:
        bool, (B, 2, I, J): contour, ring. Both are empty where the slice shows no
        foreground.

    Source:
        Liu, Dou, Heng, SAML, MICCAI 2020, arXiv:2007.02035, the smoothness loss; the
        widths 1 and 5 are the reference code's.

    Example:
        >>> labels = torch.zeros(1, 3, 5, dtype=torch.uint8)
        >>> labels[0, 1, 1:4] = 1
        >>> contour, ring = contour_masks(labels, ring_px=1)[0]
        >>> int(contour.sum()), int(ring.sum())
        (3, 8)
    """
    known_BIJ = labels_BIJ != UNKNOWN_LABEL
    shape_BIJ = (labels_BIJ != 0) & known_BIJ
    inner_BIJ, outer_BIJ = shape_BIJ, shape_BIJ
    for _ in range(contour_px):
        # A shape shrinks where what is not it grows, and that includes the outside.
        inner_BIJ = ~_grown(~inner_BIJ, outside=True)
    for _ in range(ring_px):
        outer_BIJ = _grown(outer_BIJ, outside=False)
    ring_BIJ = outer_BIJ & ~shape_BIJ & known_BIJ
    return torch.stack((shape_BIJ & ~inner_BIJ, ring_BIJ), dim=1)


def _grown(mask_BIJ: Tensor, *, outside: bool) -> Tensor:
    """The mask and the four neighbours of each of its pixels."""
    padded = functional.pad(mask_BIJ, (1, 1, 1, 1), value=outside)
    rows = padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1]
    columns = padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]
    return mask_BIJ | rows | columns
