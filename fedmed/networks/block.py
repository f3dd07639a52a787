"""A stage of a network, behind which something may be added."""

from __future__ import annotations

from torch import nn


class Block(nn.Module):
    """One level of an encoder or decoder: convolutions that belong together.

    What is added to a network "after every block" finds its places by this type.

    Attributes:
        width: Channels of its output.
    """

    width: int
