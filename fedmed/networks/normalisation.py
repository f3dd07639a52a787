"""Switchable normalisation, among it one full batch normalisation per site.

`"batch_per_site"` is domain-specific batch normalisation: all kernels are shared, and
an image of one site meets only that site's scale, shift and running statistics. The
site comes with each call: nothing remembers "the current site", so one network can
serve many sites, threads and checkpoints.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import Tensor, nn

from fedmed.errors import ConfigError

KINDS = ("batch", "instance", "group", "none", "batch_per_site")

_BATCH = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_ESCAPES = {"_": "__", ".": "_d", "/": "_s"}


@dataclass(frozen=True)
class Norm:
    """Which normalisation a network uses, everywhere.

    Attributes:
        kind: "batch", "instance", "group", "none" or "batch_per_site".
        eps: Added to the variance. PyTorch 1e-5; TensorFlow 1 used 1e-3.
        momentum: Weight of the newest batch in the running statistics.
        max_groups: Group normalisation takes the largest number of groups up to this
            one that divides the channels.
        affine: Learn a scale and a shift for each channel.
        site_ids: The sites of "batch_per_site".

    Raises:
        ConfigError: Unknown kind, impossible number, or no site for
            "batch_per_site".
    """

    kind: str = "batch"
    eps: float | int = 1e-5
    momentum: float | int = 0.1
    max_groups: int = 8
    affine: bool = True
    site_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown normalisation {self.kind!r}",
                hint=f"nearest is {near!r}; known are {', '.join(KINDS)}",
            )
        if not (self.eps > 0 and 0 < self.momentum <= 1 and self.max_groups >= 1):
            raise ConfigError(
                f"normalisation with eps {self.eps}, momentum {self.momentum}, "
                f"max_groups {self.max_groups}; expected eps > 0, 0 < momentum <= 1 "
                "and max_groups >= 1"
            )
        if self.kind == "batch_per_site" and not self.site_ids:
            raise ConfigError(
                "normalisation 'batch_per_site' was given no site",
                hint="name the sites when the network is built (site_ids)",
            )


class BatchNormPerSite(nn.Module):
    """One batch normalisation, affine part and running statistics, for each site.

    Source:
        Chang et al., Domain-Specific Batch Normalization, CVPR 2019.

    Example:
        >>> import torch
        >>> norm = BatchNormPerSite(4, 2, Norm("batch_per_site", site_ids=("a", "b")))
        >>> norm(torch.zeros(2, 4, 3, 3), "b").shape
        torch.Size([2, 4, 3, 3])
    """

    def __init__(self, channels: int, spatial_dims: int, norm: Norm) -> None:
        super().__init__()
        self.sites = nn.ModuleDict(
            {
                site_key(site): _batch_norm(channels, spatial_dims, norm)
                for site in sorted(norm.site_ids)
            }
        )
        self.site_ids = tuple(sorted(norm.site_ids))

    def forward(self, features: Tensor, site: str | None) -> Tensor:
        """Normalise with the set of one site.

        Args:
            features: (B, C) or (B, C, ...).
            site: The site all of these examples come from.

        Returns:
            Same shape as `features`.

        Raises:
            ConfigError: If `site` is None or has no set here.
        """
        if site is None or site not in self.site_ids:
            raise ConfigError(
                f"normalisation per site was asked for site {site!r}; "
                f"it has {', '.join(self.site_ids)}",
                hint="pass site= with each forward; an unseen site needs a set of "
                "its own, for example the merged one",
            )
        normalised: Tensor = self.sites[site_key(site)](features)
        return normalised


def site_key(site: str) -> str:
    """Spell a site's name so that it can be part of a parameter's name.

    Letters, digits and "-" stay; two names never get the same key.

    Example:
        >>> site_key("prostate/site_1.5t")
        'site-prostate_ssite__1_d5t'
    """
    return "site-" + "".join(
        c if c.isalnum() or c == "-" else _ESCAPES.get(c, f"_x{ord(c)}_") for c in site
    )


def make_norm(norm: Norm, channels: int, *, spatial_dims: int) -> nn.Module:
    """Make one normalisation layer; call it through `normalise`.

    Args:
        norm: What the network uses.
        channels: Channels of the features.
        spatial_dims: 2 or 3; 0 for features without space, (B, C).

    Returns:
        A torch layer, `nn.Identity` for "none", or a `BatchNormPerSite`.

    Raises:
        ConfigError: "instance" without space: one value has no variance.
    """
    if norm.kind == "batch":
        return _batch_norm(channels, spatial_dims, norm)
    if norm.kind == "batch_per_site":
        return BatchNormPerSite(channels, spatial_dims, norm)
    if norm.kind == "group":
        groups = largest_divisor(channels, norm.max_groups)
        return nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    if norm.kind == "none":
        return nn.Identity()
    if spatial_dims == 0:
        raise ConfigError(
            "instance normalisation of a table: each instance is a single value",
            hint="use 'group' (max_groups 1 is layer normalisation) or 'batch'",
        )
    instance = _INSTANCE[spatial_dims]
    return instance(channels, eps=norm.eps, affine=norm.affine)


def normalise(layer: nn.Module, features: Tensor, site: str | None) -> Tensor:
    """Call a layer made by `make_norm`, handing on the site where it matters."""
    if isinstance(layer, BatchNormPerSite):
        normalised: Tensor = layer(features, site)
    else:
        normalised = layer(features)
    return normalised


def largest_divisor(channels: int, limit: int) -> int:
    """Give the largest number up to `limit` that divides `channels`.

    Example:
        >>> largest_divisor(12, 8), largest_divisor(7, 4)
        (6, 1)
    """
    return next(n for n in range(min(limit, channels), 0, -1) if channels % n == 0)


def _batch_norm(channels: int, spatial_dims: int, norm: Norm) -> nn.Module:
    batch = _BATCH[spatial_dims]
    return batch(channels, eps=norm.eps, momentum=norm.momentum, affine=norm.affine)
