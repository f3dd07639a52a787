"""What somebody who misspelt a name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Name the known word that is most like a given one.

    Args:
        word: What was written.
        known: What could have been.
        cutoff: Least likeness, in [0, 1]; 0 always finds one if there is any.

    Example:
        >>> nearest("lernrate", ["learn_rate", "momentum"])
        'learn_rate'
        >>> nearest("xyz", ["learn_rate"]) is None
        True
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Ask back after an unknown name, to be appended to a message.

    Example:
        >>> did_you_mean("rond", ["round", "step"])
        ", did you mean 'round'?"
        >>> did_you_mean("xyz", ["round", "step"])
        ''
    """
    near = nearest(word, known, cutoff=cutoff)
    return f", did you mean {near!r}?" if near else ""
