"""Make a loss from its name in a study."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

import fedmed.losses
from fedmed.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits_BL, labels_B)`: (B, L, ...) and (B, ...) to a scalar."""


@dataclass(frozen=True)
class SumOfLosses:
    """Several losses added up; itself a loss."""

    terms: tuple[Loss, ...]

    def __call__(self, logits_BL: Tensor, labels_B: Tensor) -> Tensor:
        """Give the sum of the terms' values."""
        first, *others = [term(logits_BL, labels_B) for term in self.terms]
        return sum(others, start=first)


def build_loss(name: str, **options: Any) -> Loss:
    """Make a loss from its name and options.

    Args:
        name: The name of a module of `fedmed.losses` that holds a function of the same
            name, such as "dice_linear"; or several, joined by "+", to be added up.
        options: Keyword arguments of the losses. Each goes to every term that takes it.

    Returns:
        The loss. It can be pickled, and copied to other processes.

    Raises:
        ConfigError: If a name is no loss, comes twice, or no term takes an option.

    Example:
        >>> loss = build_loss("dice_linear+cross_entropy", smooth_numerator=1e-5)
    """
    names = [part.strip() for part in name.split("+")]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"The loss {name!r} names one term twice.", hint="Name each term once."
        )
    functions = [_find_loss(part) for part in names]
    accepted = [_options_of(function) for function in functions]
    for option in options:
        if not any(option in taken for taken in accepted):
            known = sorted(set().union(*accepted))
            raise ConfigError(
                f"The loss {name!r} has no option {option!r}.",
                hint=_suggest(option, known),
            )
    terms = tuple(
        partial(function, **{key: options[key] for key in taken if key in options})
        for function, taken in zip(functions, accepted, strict=True)
    )
    return terms[0] if len(terms) == 1 else SumOfLosses(terms)


def loss_names() -> list[str]:
    """List the losses of `fedmed.losses`, sorted."""
    modules = (info.name for info in pkgutil.iter_modules(fedmed.losses.__path__))
    return sorted(name for name in modules if _function_of(name) is not None)


def _find_loss(name: str) -> Callable[..., Tensor]:
    function = _function_of(name) if name in loss_names() else None
    if function is None:
        raise ConfigError(
            f"There is no loss {name!r}.", hint=_suggest(name, loss_names())
        )
    return function


def _function_of(module_name: str) -> Callable[..., Tensor] | None:
    """Give a module's function of the same name, None if it has none."""
    module = importlib.import_module(f"fedmed.losses.{module_name}")
    function: Callable[..., Tensor] | None = getattr(module, module_name, None)
    return function


def _options_of(function: Callable[..., Tensor]) -> set[str]:
    """Name the keyword-only parameters of a loss."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _suggest(seen: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(seen, known, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."
