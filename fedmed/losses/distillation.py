r"""Distillation: how far two predictions disagree, as pure functions.

Hard pseudo-labels (MS-Net), class-wise soft confusion (UMMKD, MASF) and softened
logits of single voxels (FedMD, FedDF). None of them is a loss of a study by itself:
methods add them to one.

Source:
    Liu, Dou, Yu, Heng, MS-Net, IEEE TMI 39(9), 2020, arXiv:2002.03366; Dou, Liu, Heng,
    Glocker, UMMKD, IEEE TMI 39(7), 2020, arXiv:2001.03111; Hinton, Vinyals, Dean,
    Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError, DataError
from fedmed.losses.known_voxels import (
    at_least_float32,
    check_shapes,
    one_hot_of_known,
)

Reduction = Literal["present", "all"]


def hard_labels(logits_BL: Tensor, labels_B: Tensor | None = None) -> Tensor:
    r"""Take the likeliest class of each voxel: $\hat y = \arg\max_c z_c$.

    Args:
        logits_BL: (B, L, ...), of the teacher.
        labels_B: (B, ...); where they are unknown, so is the pseudo-label. None: it is
            known everywhere.

    Returns:
        (B, ...), int64, without gradient.

    Raises:
        DataError: If the shapes do not fit.

    Example:
        >>> hard_labels(torch.tensor([[0.0, 2.0], [1.0, -1.0]]))
        tensor([1, 0])
    """
    classes_B = logits_BL.detach().argmax(dim=1)
    if labels_B is None:
        return classes_B
    check_shapes(logits_BL, labels_B)
    return classes_B.masked_fill(labels_B == UNKNOWN_LABEL, UNKNOWN_LABEL)


def class_logit_sums(
    logits_BL: Tensor, labels_B: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    r"""Add up the logits of all voxels of one class, for every class.

    $Z_c = \sum_{n: y_n = c} z_n$ and $n_c$. Sums of several batches may be added; means
    of batches may not be averaged.

    Args:
        logits_BL: (B, L, ...), or features (B, F, ...) of any number of channels.
        labels_B: (B, ...), int64 or uint8, `UNKNOWN_LABEL` = takes no part.
        num_classes: Number of rows.

    Returns:
        Sums, (num_classes, L), differentiable; and the number of voxels of each class,
        int64.

    Raises:
        DataError: If the shapes do not fit or a label is no class.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
        >>> class_logit_sums(logits, torch.tensor([0, 0, 1]), 2)
        (tensor([[4., 2.],
                [5., 5.]]), tensor([2, 1]))
    """
    check_shapes(logits_BL, labels_B)
    # Without space, each of the batch is one voxel.
    logits_BLN = at_least_float32(logits_BL).reshape(*logits_BL.shape[:2], -1)
    labels_BN = labels_B.reshape(labels_B.shape[0], -1)
    one_hot_BLN = one_hot_of_known(labels_BN, num_classes=num_classes)
    counts_L = one_hot_BLN.sum(dim=(0, 2))
    sums_BLL = one_hot_BLN.to(logits_BLN) @ logits_BLN.transpose(1, 2)
    return sums_BLL.sum(dim=0), counts_L


def soft_confusion(sums_LL: Tensor, counts_L: Tensor, temperature: float) -> Tensor:
    r"""Soften the mean logits of each class: $\log \mathrm{softmax}(\bar z_c / T)$.

    $\bar z_c = Z_c / n_c$. Row c says what the network takes class c for.

    Args:
        sums_LL: Summed logits, row c for class c.
        counts_L: Voxels behind each row.
        temperature: T > 0, 2 in UMMKD.

    Returns:
        Log-probabilities of the same shape. The row of an absent class is uniform and
        has no gradient; it says nothing, and `shared_classes` masks it.

    Raises:
        ConfigError: If the temperature is not above 0.

    Source:
        UMMKD, the class-wise soft labels.

    Differs from the source:
        The reference adds 1e-6 to each count; here counts are exact.
    """
    _check_temperature(temperature)
    counts_L1 = counts_L.clamp(min=1).to(sums_LL).unsqueeze(1)
    return torch.log_softmax(sums_LL / counts_L1 / temperature, dim=1)


def shared_classes(*counts_L: Tensor, min_count: int = 1) -> Tensor:
    """Mark the classes that every party has seen often enough.

    Args:
        counts_L: Voxels of each class, one tensor for each party.
        min_count: Fewest voxels that count as seen.

    Returns:
        bool, (L,).

    Example:
        >>> shared_classes(torch.tensor([9, 0, 4]), torch.tensor([5, 3, 2]))
        tensor([ True, False,  True])
    """
    return torch.stack([counts >= max(1, min_count) for counts in counts_L]).all(dim=0)


def symmetric_kl(
    log_p_LL: Tensor,
    log_q_LL: Tensor,
    mask_L: Tensor | None = None,
    *,
    reduction: Reduction = "present",
    half: bool = False,
) -> Tensor:
    r"""Average $KL(p_c \| q_c) + KL(q_c \| p_c)$ over the classes c.

    Gradient flows into both. The sum of both directions is
    $\sum_j (p_j - q_j)(\log p_j - \log q_j)$, whose terms are never negative.

    Args:
        log_p_LL: Log-probabilities, one row for each class.
        log_q_LL: The same of the other party.
        mask_L: Classes that take part; None = all.
        reduction: "present" divides by the number of classes that take part (1 if
            there is none), "all" by the number of classes.
        half: Halve the sum of both directions, as UMMKD's reference code and MASF do;
            UMMKD's paper does not.

    Returns:
        Scalar >= 0.

    Raises:
        DataError: If the shapes differ.

    Source:
        UMMKD, the loss of knowledge distillation.

    Differs from the source:
        Neither paper nor code of UMMKD masks absent classes, and a class that one
        side does not show then pulls the other side towards uniform rows. MASF's mask,
        with `reduction="all"`, prevents that.

    Example:
        >>> p = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
        >>> symmetric_kl(p, p)
        tensor(0.)
    """
    if log_p_LL.shape != log_q_LL.shape:
        raise DataError(
            f"Soft confusions of shapes {tuple(log_p_LL.shape)} and "
            f"{tuple(log_q_LL.shape)} cannot be compared.",
            hint="Both parties must know the same classes.",
        )
    terms_LL = (log_p_LL.exp() - log_q_LL.exp()) * (log_p_LL - log_q_LL)
    rows_L = terms_LL.sum(dim=1)
    num_rows = rows_L.new_tensor(rows_L.numel())
    if mask_L is not None:
        rows_L = rows_L.masked_fill(~mask_L, 0.0)
        if reduction == "present":
            num_rows = mask_L.sum().clamp(min=1).to(rows_L)
    total = rows_L.sum() / num_rows
    return 0.5 * total if half else total


def softened_kl(
    student_BL: Tensor,
    teacher_BL: Tensor,
    *,
    temperature: float = 1.0,
    known_B: Tensor | None = None,
    scaled: bool = True,
) -> Tensor:
    r"""Average the distance of softened predictions over voxels.

    $T^2 KL(\mathrm{softmax}(t / T) \| \mathrm{softmax}(z / T))$.

    Args:
        student_BL: Logits z, (B, L, ...).
        teacher_BL: Logits t of the same shape; a constant, no gradient flows into it.
        temperature: T > 0; 1 in FedDF.
        known_B: bool, (B, ...): the voxels that take part; None = all.
        scaled: Multiply by $T^2$, so that gradients do not shrink with T.

    Returns:
        Scalar >= 0; 0 if no voxel takes part.

    Raises:
        ConfigError: If the temperature is not above 0.
        DataError: If the shapes differ.

    Source:
        Hinton et al., section 2; Lin et al., FedDF, NeurIPS 2020, arXiv:2006.07242.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> softened_kl(logits, logits + 3).abs() < 1e-6
        tensor(True)
    """
    _check_temperature(temperature)
    if student_BL.shape != teacher_BL.shape:
        raise DataError(
            f"Logits of shapes {tuple(student_BL.shape)} and "
            f"{tuple(teacher_BL.shape)} cannot be compared."
        )
    log_p_BL = torch.log_softmax(at_least_float32(student_BL) / temperature, dim=1)
    teacher_BL = at_least_float32(teacher_BL.detach())
    log_t_BL = torch.log_softmax(teacher_BL / temperature, dim=1)
    kl_B = (log_t_BL.exp() * (log_t_BL - log_p_BL)).sum(dim=1)
    if known_B is None:
        mean = kl_B.mean()
    else:
        mean = kl_B.masked_fill(~known_B, 0.0).sum() / known_B.sum().clamp(min=1)
    return mean * temperature**2 if scaled else mean


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"the temperature is {temperature}; it must be above 0")
