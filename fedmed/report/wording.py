"""Numbers as a reader expects them: per cent, signs, units, and a dash for nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

NO_VALUE = "\u2013"
"""Printed where there is no value."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


def percent(value: float) -> str:
    """Print a proportion as per cent with two decimals, without the sign.

    Example:
        >>> percent(0.90474)
        '90.47'
    """
    return number(100 * value)


def number(value: float, digits: int = 2) -> str:
    """Print a number, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else NO_VALUE


def signed_points(value: float) -> str:
    """Print a difference of two proportions in percentage points, with its sign.

    Example:
        >>> signed_points(0.0123)
        '+1.23'
    """
    if not math.isfinite(value):
        return NO_VALUE
    return f"{100 * value:+.2f}".replace("-", "\u2212")


def p_value(value: float) -> str:
    """Print a p-value; small ones as a bound.

    Example:
        >>> p_value(0.0317), p_value(2e-7)
        ('0.032', '< 0.001')
    """
    if not math.isfinite(value):
        return NO_VALUE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def size(size_bytes: int | float) -> str:
    """Print a number of bytes in decimal units.

    Example:
        >>> size(8_753_672)
        '8.75 MB'
    """
    if not math.isfinite(size_bytes):
        return NO_VALUE
    value, unit = float(size_bytes), _UNITS[0]
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: int | float) -> str:
    """Print a time span in the two units that matter.

    Example:
        >>> duration(12.34), duration(3725)
        ('12.3 s', '1 h 2 min')
    """
    if not math.isfinite(seconds):
        return NO_VALUE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def listing(words: Sequence[str]) -> str:
    """Join words as English does.

    Example:
        >>> listing(["a", "b", "c"])
        'a, b and c'
    """
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def count(number_of: int, noun: str) -> str:
    """Print a count with its noun, in the plural where it should be.

    Example:
        >>> count(1, "case"), count(3, "case")
        ('1 case', '3 cases')
    """
    return f"{number_of} {noun}" if number_of == 1 else f"{number_of} {noun}s"
