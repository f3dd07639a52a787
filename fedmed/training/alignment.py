r"""What hospitals take a class for, brought together: MASF's class alignment.

Row c of a hospital is $s_c = \mathrm{softmax}(\bar z_c / \tau)$, with $\bar z_c$ the
mean logits of the voxels of class c in its batch. Rows of as few voxels as `min_count`
forbids are neither told nor compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmed.losses.distillation import class_logit_sums, soft_confusion, symmetric_kl
from fedmed.message import SiteId, State
from fedmed.training.coupled import NOTHING_TOLD, Measured
from fedmed.training.statistic_bank import PRESENT

ROWS = "rows"


@dataclass(frozen=True)
class RowTally:
    """Logits added up by class.

    Attributes:
        sums_LL: Summed logits, row c for class c.
        counts_L: Voxels of each class.
    """

    sums_LL: Tensor
    counts_L: Tensor

    @classmethod
    def of(cls, logits_BL: Tensor, labels_B: Tensor) -> RowTally:
        """Add up one batch's."""
        return cls(*class_logit_sums(logits_BL, labels_B, int(logits_BL.shape[1])))


@dataclass(frozen=True)
class Alignment:
    r"""The distance between soft labels of one method.

    Attributes:
        weight: Factor of the loss, >= 0.
        temperature: $\tau$ > 0.
        min_count: Fewest voxels behind a row.
    """

    weight: float
    temperature: float
    min_count: int

    def told(self, tally: RowTally) -> Measured:
        """Log-probabilities of the rows that may be told; nothing of the others."""
        rows_LL = soft_confusion(tally.sums_LL, tally.counts_L, self.temperature)
        present_L = tally.counts_L >= self.min_count
        return Measured(
            values={ROWS: rows_LL.masked_fill(~present_L.unsqueeze(1), 0.0)},
            facts={PRESENT: present_L.to(rows_LL)},
            min_count=min(tally.counts_L[present_L].tolist(), default=NOTHING_TOLD),
        )

    def over_pairs(
        self,
        told: Mapping[SiteId, State],
        ones: Iterable[SiteId],
        others: Iterable[SiteId],
    ) -> Tensor:
        r"""Average over all pairs of a site of one group and a site of the other.

        $\frac{1}{C} \sum_c \frac{1}{2} [KL(s_c^i \| s_c^j) + KL(s_c^j \| s_c^i)]$, over
        the classes that both show, divided by the number of all classes; times
        `weight`.

        Args:
            told: By site; at least one of each group.
            ones: Sites i; those that told nothing are passed over.
            others: Sites j.

        Source:
            MASF, eq. (3), with the mask and the divisor of its code.
        """
        terms = [
            _distance(
                told[one][ROWS],
                told[other][ROWS],
                (told[one][PRESENT] > 0.5) & (told[other][PRESENT] > 0.5),
            )
            for one, other in itertools.product(ones, others)
            if one in told and other in told
        ]
        return self.weight * torch.stack(terms).mean()


def _distance(log_p_LL: Tensor, log_q_LL: Tensor, mask_L: Tensor) -> Tensor:
    return symmetric_kl(log_p_LL, log_q_LL, mask_L, reduction="all", half=True)
