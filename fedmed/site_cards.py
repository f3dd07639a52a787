"""Which hospital is most like another, by what their public cards say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmed.message import SiteId


def nearest_site(
    card: Mapping[str, Any], others: Mapping[SiteId, Mapping[str, Any]]
) -> SiteId | None:
    """Find the site whose card is most like a given one.

    A site of the same modality is nearer than any of another. Among those alike in
    that, the likeness of the facts decides (vendor, field strength, scanner, coil...):
    the mean over all facts that either card names, where a number counts 1 less the
    relative difference, words count 1 if they are the same, and what one card does not
    say counts 0. Of equals the first in sorted order is taken.

    Args:
        card: "modality" and "facts", as a site says when it joins.
        others: Cards of the sites to choose from.

    Returns:
        The site; None if there is none to choose from.

    Example:
        >>> card = {"modality": "T2w MRI", "facts": {"vendor": "GE", "field_T": 3.0}}
        >>> nearest_site(card, {
        ...     "a": {"modality": "CT", "facts": {"vendor": "GE", "field_T": 3.0}},
        ...     "b": {"modality": "T2w MRI", "facts": {"vendor": "Philips"}},
        ...     "c": {"modality": "t2w mri", "facts": {"field_T": 1.5}},
        ... })
        'c'
    """
    # Rounded, so that the order of a sum cannot decide between equals.
    return max(
        sorted(others),
        key=lambda site: (
            is_same(card.get("modality"), others[site].get("modality")),
            round(likeness(card.get("facts"), others[site].get("facts")), 9),
        ),
        default=None,
    )


def likeness(
    first: Mapping[str, Any] | None, second: Mapping[str, Any] | None
) -> float:
    """Say how much two sites' facts agree, from 0 to 1; 0 if neither names any.

    Example:
        >>> likeness({"vendor": "GE", "field_T": 3.0}, {"vendor": "ge", "field_T": 1.5})
        0.75
    """
    first, second = first or {}, second or {}
    names = {*first, *second}
    if not names:
        return 0.0
    both = sorted({*first} & {*second})
    return sum(_agreement(first[name], second[name]) for name in both) / len(names)


def is_same(first: Any, second: Any) -> bool:
    """Whether two facts are the same words, whatever their case."""
    return _words(first) == _words(second)


def _agreement(first: Any, second: Any) -> float:
    if _is_number(first) and _is_number(second):
        largest = max(abs(first), abs(second))
        return max(0.0, 1 - abs(first - second) / largest) if largest else 1.0
    return float(is_same(first, second))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(value: Any) -> str:
    return str(value).strip().casefold()
