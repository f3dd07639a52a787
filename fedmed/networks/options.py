"""Options of a network as a study gives them: unknown ones name the nearest known."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedmed.errors import ConfigError


def nearest(word: str, known: Iterable[str]) -> str:
    """Give the known word that looks most like `word`.

    Example:
        >>> nearest("base_with", ["levels", "base_width"])
        'base_width'
    """
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def check_options(
    target: Callable[..., object], options: Mapping[str, Any], *, name: str
) -> None:
    """Refuse options that a network does not take.

    Args:
        target: The class to be called with `options`.
        options: Names and values.
        name: How the study calls the network.

    Raises:
        ConfigError: Naming the nearest known option.
    """
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            raise ConfigError(
                f"network {name!r} has no option {option!r}",
                hint=f"nearest is {nearest(option, parameters)!r}; "
                f"known are {', '.join(parameters)}",
            )
