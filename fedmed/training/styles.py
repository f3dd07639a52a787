"""The looks of other hospitals' scanners: what is told of them, and images in them.

A style is one amplitude centre (see `fedmed.training.amplitude`). A site tells how the
styles of its images are spread; the others draw from that, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
from fedmed.training.amplitude import (
    CENTRES,
    COVARIANCE,
    amplitude_centre,
    drawn_centres,
    half_width,
    independent_half,
    log_distribution,
    mirrored,
    with_amplitude,
)
from fedmed.training.statistic_bank import banked, banked_sites

Bank = Literal["distribution", "examples"]

_FARTHEST = 2.0
"""Deviations of a drawn style beyond which it is cut."""


def told_styles(
    images: Iterable[Tensor], *, band: float, bank: Bank, share: float
) -> tuple[State, int]:
    """Sum up the styles of a site's images.

    Args:
        images: (C, I, J) or (C, I, J, K) each, in random order.
        band: Share of the frequencies that are a style, see `half_width`.
        bank: Mean and covariance of the logarithms, or the styles of single images.
        share: Share of the images that "examples" takes, in (0, 1]; at least one.

    Returns:
        "mean" (D,) and "covariance" (D, D), or "centres" (N, C, D / C), float32; and
        the number of images behind each number.

    Raises:
        ConfigError: If the images differ in size.
    """
    styles = []
    for image_C in images:
        width = half_width(image_C.shape[1:], band)
        styles.append(amplitude_centre(image_C[None].float(), width)[0])
    if len({style.shape for style in styles}) > 1:
        raise ConfigError(
            "the training images differ in size, so that their frequencies do",
            hint="Set preprocess.size.",
        )
    styles_NC = torch.stack(styles)
    if bank == "distribution":
        return log_distribution(styles_NC), len(styles)
    count = max(1, round(share * len(styles)))
    return {CENTRES: independent_half(styles_NC[:count])}, 1


def styles_of_others(known: Mapping[SiteId, State], site: SiteId) -> State:
    """What a site may draw from: all others' styles, numbered instead of named."""
    others = [known[other] for other in sorted(known) if other != site]
    return {
        f"{number}|{name}": tensor
        for number, state in enumerate(others)
        for name, tensor in state.items()
    }


def restyled(
    images_BC: Tensor,
    styles: State,
    *,
    interpolation: float,
    draws: AbstractContextManager[None],
) -> Tensor:
    r"""Move each image some way towards a style drawn from the others'.

    Args:
        images_BC: (B, C, I, J) or (B, C, I, J, K); computed in float32, whatever their
            dtype.
        styles: As `styles_of_others` gives them; {} changes nothing.
        interpolation: Largest $\lambda$ in [0, 1]; 0 changes nothing.
        draws: Around what is drawn from torch's global generator: for each image which
            site, how far, and the style.
    """
    sources = [banked(styles, name) for name in banked_sites(styles)]
    if not sources or not interpolation:
        return images_BC
    images = images_BC.float()
    with draws:
        chosen = torch.randint(len(sources), (len(images),)).tolist()
        shares_B = interpolation * torch.rand(len(images))
        drawn = [_drawn(sources[c], channels=images.shape[1]) for c in chosen]
    return with_amplitude(images, torch.stack(drawn), shares_B).to(images_BC.dtype)


def _drawn(source: State, *, channels: int) -> Tensor:
    """One style (C, n, n) of one site."""
    if COVARIANCE in source:
        noise = torch.randn(1, len(source[COVARIANCE]))
        noise = noise.clamp(-_FARTHEST, _FARTHEST)
        return drawn_centres(source, noise, channels=channels)[0]
    told = source[CENTRES]
    return mirrored(told[int(torch.randint(len(told), ()))])
