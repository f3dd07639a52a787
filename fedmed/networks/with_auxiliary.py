"""A network with a second decoder and head beside its own, on the same features."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.errors import ConfigError
from fedmed.networks.unet import pad_to_multiple

PARTS = ("encoder", "decoder", "head")


class WithAuxiliary(nn.Module):
    """One encoder, two branches: the network itself and an auxiliary decoder and head.

    The entries of the network keep their names (`encoder.*`, `decoder.*`, `head.*`), so
    that a model file fits the plain network; those of the branch are `auxiliary.*`.
    Called as a network, it is the plain network: the branch takes no part.

    Args:
        network: Has the parts encoder, decoder and head; taken apart.
        other: Another of the same kind, of which decoder and head become the branch.

    Raises:
        ConfigError: If a part is missing.

    Source:
        Liu, Dou, Yu, Heng, MS-Net, IEEE TMI 39(9), 2020, arXiv:2002.03366.

    Example:
        >>> from fedmed.networks.unet import UNet
        >>> first, other = (UNet(1, 2, base_width=2, levels=2) for _ in range(2))
        >>> network = WithAuxiliary(first, other)
        >>> [logits.shape for logits in network.both(torch.zeros(1, 1, 5, 6))]
        [torch.Size([1, 2, 5, 6]), torch.Size([1, 2, 5, 6])]
    """

    def __init__(self, network: nn.Module, other: nn.Module) -> None:
        super().__init__()
        _require_parts(network)
        self.encoder = network.get_submodule("encoder")
        self.decoder = network.get_submodule("decoder")
        self.head = network.get_submodule("head")
        self.auxiliary = nn.ModuleDict(
            {part: other.get_submodule(part) for part in ("decoder", "head")}
        )
        self.size_multiple = int(getattr(network, "size_multiple", 1))

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits of the network itself.

        Args:
            images: (B, C, I, J) or (B, C, I, J, K), any size.
            site: Whose normalisation is used, if the network has one per site.

        Returns:
            Logits (B, L, I, J) or (B, L, I, J, K), of the images' size.
        """
        features = self._features(images, site)
        logits = _decoded(self.decoder, self.head, features, site)
        return _cropped(logits, images)

    def auxiliary_logits(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits of the branch; gradient flows into the encoder too."""
        return self._branch(self._features(images, site), images, site)

    def both(self, images: Tensor, site: str | None = None) -> tuple[Tensor, Tensor]:
        """Compute the logits of the network and of the branch, of the same features.

        The branch is run in the network's mode: in training, its normalisation uses
        the batch and updates its running statistics. What it gives has no gradient.
        """
        features = self._features(images, site)
        logits = _decoded(self.decoder, self.head, features, site)
        with torch.no_grad():
            branch = self._branch(features, images, site)
        return _cropped(logits, images), branch

    def _features(self, images: Tensor, site: str | None) -> Any:
        # A tensor, or one of each level: what the network's own decoder takes.
        padded = pad_to_multiple(images, self.size_multiple)
        return self.encoder(padded, site)

    def _branch(self, features: Any, images: Tensor, site: str | None) -> Tensor:
        decoder, head = self.auxiliary["decoder"], self.auxiliary["head"]
        return _cropped(_decoded(decoder, head, features, site), images)


def _decoded(
    decoder: nn.Module, head: nn.Module, features: Any, site: str | None
) -> Tensor:
    decoded = decoder(features, site)
    logits: Tensor = head(decoded, site) if _takes_site(head) else head(decoded)
    return logits


def _takes_site(head: nn.Module) -> bool:
    """Whether a head holds normalisation, and so wants to know the site."""
    return "site" in inspect.signature(type(head).forward).parameters


def _cropped(logits: Tensor, images: Tensor) -> Tensor:
    for axis in range(2, images.ndim):
        logits = logits.narrow(axis, 0, images.shape[axis])
    return logits


def _require_parts(network: nn.Module) -> None:
    found = [name for name, _ in network.named_children()]
    missing = [part for part in PARTS if part not in found]
    if missing:
        raise ConfigError(
            f"a second branch needs a network with the parts {', '.join(PARTS)}; "
            f"{type(network).__name__} has {', '.join(found) or 'none'}",
            hint="Set model.name: unet.",
        )
