r"""Low-frequency amplitudes of images: what they look like, not what they show.

With $F(u, v)$ the discrete Fourier transform of a channel of I x J pixels, its
amplitude is $A = |F| / (I J)$ and its phase $P$. The centre are the frequencies with
$|u|, |v| \le b$. Only the centre is ever computed, changed or sent: an image with the
amplitudes $A'$ there is $x + \mathrm{Re} \sum_{u,v} (A' - A) e^{i P} e_{uv}$, with
$e_{uv}$ the waves; that is the inverse transform of the whole with another centre.

Volumes (B, C, I, J, K) are transformed slice by slice in the plane of I and J.

Source:
    Liu et al., FedDG, CVPR 2021, arXiv:2103.06030, eq. (2) as corrected by its author
    (github.com/liuquande/FedDG-ELCFS, issue 2).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fedmed.errors import ConfigError
from fedmed.message import State
from fedmed.training.trainer import TrainingBatch

logger = logging.getLogger(__name__)

MEAN, COVARIANCE, CENTRES = "mean", "covariance", "centres"
"""Names of the tensors of a statistic of amplitudes."""

_LEAST_AMPLITUDE = 1e-6
"""Amplitudes below it are lifted before the logarithm, in units of the image."""
_JITTER = 1e-6


def half_width(shape: torch.Size | tuple[int, ...], band: float) -> int:
    r"""Turn the share of an image that is exchanged into a number of frequencies.

    $b = \lfloor L \min(I, J) \rfloor$, so that $(2b + 1)^2$ frequencies are exchanged;
    but at least 1 where L > 0: b = 0 is the mean intensity alone, and whoever wants
    that can say L = 0.

    Args:
        shape: I and J first.
        band: L in [0, 1/2).

    Raises:
        ConfigError: If the image is too small for so many frequencies, or is none.

    Example:
        >>> [(2 * half_width((384, 384), band) + 1) ** 2 for band in (0.003, 0.01, 0.1)]
        [9, 49, 5929]
    """
    if len(shape) < 2:
        raise ConfigError(
            "amplitudes are measured of images, and the data are a table",
            hint="Set a strategy that does not look at frequencies.",
        )
    shorter = min(shape[:2])
    found = math.floor(band * shorter)
    if band > 0 and found == 0:
        _warn_once(shorter, band)
        found = 1
    if 2 * found + 1 > shorter:
        raise ConfigError(
            f"images of {shape[0]} x {shape[1]} pixels have no {2 * found + 1} "
            "frequencies each way",
            hint="Lower the share or the number of frequencies that are exchanged.",
        )
    return found


@functools.cache
def _warn_once(shorter: int, band: float) -> None:
    logger.warning(
        "a share of %g of %d pixels is less than one frequency; the lowest one each "
        "way is exchanged, and the mean",
        band,
        shorter,
    )


def amplitude_centre(images_BC: Tensor, half_width: int) -> Tensor:
    """Measure the amplitudes of the lowest frequencies.

    Args:
        images_BC: (B, C, I, J) or (B, C, I, J, K), floating point.
        half_width: b.

    Returns:
        (B, C, 2b + 1, 2b + 1), in units of the image, frequency 0 in the middle; of a
        volume the mean over its slices.
    """
    planes = _planes(images_BC)
    amplitudes = _centre(planes, half_width).abs()
    return amplitudes if images_BC.ndim == 4 else amplitudes.mean(dim=2)


def with_amplitude(
    images_BC: Tensor, centres_BC: Tensor, shares_B: Tensor | float
) -> Tensor:
    r"""Move the low-frequency amplitudes of images towards others; phases stay.

    $A' = A (1 - M) + (1 - \lambda) A M + \lambda A_n M$, M the centre.

    Args:
        images_BC: (B, C, I, J) or (B, C, I, J, K), floating point.
        centres_BC: $A_n$, (B, C, n, n) or (C, n, n), n odd, frequency 0 in the middle.
        shares_B: $\lambda$, one for each image or one for all; 0 changes no bit.

    Returns:
        Images of the same shape and dtype. With n = 1 each channel differs from what
        it was by a constant.
    """
    planes = _planes(images_BC)
    half = centres_BC.shape[-1] // 2
    own = _centre(planes, half)
    target = centres_BC.to(planes).expand(*planes.shape[:2], *centres_BC.shape[-2:])
    share = torch.as_tensor(shares_B, dtype=planes.dtype, device=planes.device)
    if planes.ndim == 5:
        target = target.unsqueeze(2)
    share = share.reshape(-1, *[1] * (planes.ndim - 1))
    change = torch.polar(share * (target - own.abs()), own.angle())
    rows, columns = (_waves(size, half, planes) for size in planes.shape[-2:])
    waves = rows.mH @ change @ columns.conj()
    moved = planes + waves.real
    return moved if images_BC.ndim == 4 else moved.movedim(2, -1)


def every_image(
    batches: Callable[[int], Iterable[TrainingBatch]], num_examples: int
) -> Iterator[Tensor]:
    """Give each training image once.

    Args:
        batches: Gives so many batches of a round, from its first; they go through all
            examples before one comes again.
        num_examples: Of the site.
    """
    (first,) = batches(1)
    count = -(-num_examples // len(first.images))
    images = (image for batch in batches(count) for image in batch.images)
    return itertools.islice(images, num_examples)


def independent_half(centres: Tensor) -> Tensor:
    """Drop what is there twice: (..., n, n) to (..., (n^2 + 1) / 2)."""
    flat = centres.flatten(-2)
    return flat[..., flat.shape[-1] // 2 :]


def mirrored(half: Tensor) -> Tensor:
    """Undo `independent_half`.

    Example:
        >>> mirrored(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        tensor([[5., 4., 3.],
                [2., 1., 2.],
                [3., 4., 5.]])
    """
    whole = torch.cat((half[..., 1:].flip(-1), half), dim=-1)
    size = math.isqrt(whole.shape[-1])
    return whole.reshape(*whole.shape[:-1], size, size)


def log_distribution(centres_NC: Tensor) -> State:
    """Sum up many centres in a mean and a covariance of their logarithms.

    Args:
        centres_NC: (N, C, n, n), N >= 1.

    Returns:
        "mean" (D,) and "covariance" (D, D) in float32, D = C (n^2 + 1) / 2. Of one
        example the mean is that example's.
    """
    logs_ND = _logs(centres_NC)
    mean_D = logs_ND.mean(dim=0)
    off_ND = logs_ND - mean_D
    covariance_DD = off_ND.T @ off_ND / max(len(logs_ND) - 1, 1)
    return {MEAN: mean_D.float(), COVARIANCE: covariance_DD.float()}


def drawn_centres(statistic: State, noise_BD: Tensor, *, channels: int) -> Tensor:
    """Draw centres from what `log_distribution` gave.

    Args:
        statistic: "mean" and "covariance".
        noise_BD: (B, D), standard normal.
        channels: C.

    Returns:
        (B, C, n, n), float32.
    """
    root_DD = _root(statistic[COVARIANCE].double())
    logs_BD = statistic[MEAN].double() + noise_BD.double() @ root_DD.T
    return mirrored(logs_BD.exp().float().reshape(len(logs_BD), channels, -1))


def _root(covariance_DD: Tensor) -> Tensor:
    """Lower triangular root of a covariance that may be rounded, or of few examples."""
    size = len(covariance_DD)
    # Few examples span few directions; the rest gets next to nothing.
    jitter = _JITTER * abs(float(covariance_DD.trace())) / size + _JITTER**2
    identity_DD = torch.eye(size, dtype=covariance_DD.dtype)
    while True:
        lifted_DD = covariance_DD + jitter * identity_DD
        root_DD: Tensor
        root_DD, problem = torch.linalg.cholesky_ex(lifted_DD)
        if not int(problem):
            return root_DD
        # Of many frequencies, 32 bits round some direction below zero.
        jitter *= 10


def _logs(centres_NC: Tensor) -> Tensor:
    half_ND = independent_half(centres_NC.double()).flatten(1)
    return half_ND.clamp(min=_LEAST_AMPLITUDE).log()


def _planes(images_BC: Tensor) -> Tensor:
    """Bring I and J to the end: (B, C, I, J) or (B, C, K, I, J)."""
    return images_BC if images_BC.ndim == 4 else images_BC.movedim(-1, 2)


def _centre(planes: Tensor, half: int) -> Tensor:
    """The transform at frequencies up to `half` each way, divided by I J."""
    rows, columns = (_waves(size, half, planes) for size in planes.shape[-2:])
    pixels = planes.shape[-2] * planes.shape[-1]
    return rows @ planes.to(rows) @ columns.T / pixels


def _waves(size: int, half: int, like: Tensor) -> Tensor:
    """Waves exp(-2 pi i u x / size), (2 half + 1, size), complex."""
    places = torch.arange(size, dtype=torch.float64)
    frequencies = torch.arange(-half, half + 1, dtype=torch.float64)
    # Whole turns are taken off in integers, so that no precision is lost to them.
    turns = torch.outer(frequencies, places).remainder(size) / size
    waves = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
    is_double = like.dtype == torch.float64
    return waves.to(like.device, torch.complex128 if is_double else torch.complex64)
