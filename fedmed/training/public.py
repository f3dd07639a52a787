"""Learning on public images, which come from another scanner than a hospital's own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch import nn

from fedmed.training.predict import evaluating

Statistics = Literal["own", "public"]


def learning(model: nn.Module, statistics: Statistics) -> AbstractContextManager[None]:
    """Let a network predict what it is to learn from, in a mode that fits.

    Args:
        model: In training mode; as it was afterwards.
        statistics: "own": batch normalisation uses its running statistics and leaves
            them alone, nothing is dropped out. What is learned is then the function
            that is evaluated, and the statistics stay those of the hospitals. "public":
            as in any training, the running statistics follow the public images.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with learning(layer, "own"):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    return evaluating(model) if statistics == "own" else nullcontext()
