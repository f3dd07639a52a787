"""Who takes part in a round: all training sites, or a draw of them.

The draw is a pure function of the study's seed and the round, so a retried or resumed
round has the same members on every transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fedmed import seeds

T = TypeVar("T")


def draw(
    candidates: Sequence[T], count: int | None, *, seed: int, number: int
) -> tuple[T, ...]:
    """Draw without replacement; every subset is equally likely.

    Args:
        candidates: In sorted order.
        count: How many; None, or more than there are: all.
        seed: The study's seed.
        number: The round.

    Returns:
        The drawn ones, in the order of the candidates.

    Example:
        >>> draw("abcdef", 3, seed=0, number=1) == draw("abcdef", 3, seed=0, number=1)
        True
        >>> draw("abc", None, seed=0, number=1)
        ('a', 'b', 'c')
    """
    if count is None or count >= len(candidates):
        return tuple(candidates)
    rng = seeds.numpy_rng(seed, "participation", number)
    chosen = rng.choice(len(candidates), size=count, replace=False)
    return tuple(candidates[index] for index in sorted(chosen.tolist()))
