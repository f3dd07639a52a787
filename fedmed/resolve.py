"""Finding strategies by name, at run time.

`fedmed` never imports `sites` or `strategies`: a name in a study is a module name
there, and `package.module:Class` loads anything else. There is no registry.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedmed.errors import ConfigError, ShadowedPackageError
from fedmed.spelling import did_you_mean
from fedmed.strategy import Strategy

_NOT_A_METHOD = frozenset({"server_app"})


def require_own_packages() -> None:
    """Check that the three packages lie side by side.

    Raises:
        ShadowedPackageError: If another `sites` or `strategies` would be imported.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("sites", "strategies"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if origin != home / name:
            raise ShadowedPackageError(
                f"the package {name!r} that Python finds is not fedmed's own",
                hint=f"Rename or move the folder {name!r} that lies on your Python "
                "path (often the current folder), or reinstall fedmed.",
            )


def strategy_names() -> tuple[str, ...]:
    """Names of the built-in methods, sorted."""
    package = importlib.import_module("strategies")
    found = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return tuple(sorted(found - _NOT_A_METHOD))


def strategy_class(name: str) -> type[Strategy]:
    """Find the strategy class behind a name.

    Args:
        name: "fedavg", "flwr:FedTrimmedAvg" or "package.module:Class".

    Raises:
        ConfigError: If there is no such strategy; names the nearest known ones.
    """
    if name.startswith("flwr:"):
        return _only_strategy(importlib.import_module("strategies.flower"))
    if ":" in name:
        return _external(name)
    if name not in strategy_names():
        known = strategy_names()
        raise ConfigError(
            f"there is no strategy {name!r}{did_you_mean(name, known)}",
            hint=f"Known: {', '.join(known)}",
        )
    return _only_strategy(importlib.import_module(f"strategies.{name}"))


def _external(name: str) -> type[Strategy]:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        raise ConfigError(
            f"strategy {name!r} cannot be imported",
            hint="Write package.module:Class, importable from this Python.",
        ) from None
    if not (inspect.isclass(found) and issubclass(found, Strategy)):
        raise ConfigError(f"{name!r} is not a subclass of fedmed.strategy.Strategy")
    return found


def _only_strategy(module: ModuleType) -> type[Strategy]:
    own = [
        item
        for item in vars(module).values()
        if inspect.isclass(item)
        and issubclass(item, Strategy)
        and item.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ConfigError(f"{module.__name__} must define exactly one Strategy")
    return own[0]


def load_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """Make a strategy from its name and hyper-parameters.

    Raises:
        ConfigError: If the name or an option is unknown, or a value is impossible.
    """
    cls = strategy_class(name)
    given = dict(options)
    if name.startswith("flwr:"):
        given = {"aggregator": name.partition(":")[2], **_split_options(cls, given)}
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            asked = did_you_mean(key, fields | {"name"})
            raise ConfigError(f"unknown key 'strategy.{key}' for {name}{asked}")
    strategy = cls(**_convert(cls, given))
    if strategy.sync not in cls.syncs:
        raise ConfigError(
            f"strategy {name} has no sync: {strategy.sync}; it has "
            + " and ".join(cls.syncs)
        )
    return strategy


def _split_options(cls: type[Strategy], given: dict[str, Any]) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(cls)}
    own = {key: value for key, value in given.items() if key in fields}
    rest = {key: value for key, value in given.items() if key not in fields}
    return {**own, "options": rest}


def _convert(cls: type[Strategy], given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn YAML's strings and lists into the declared field types."""
    hints = get_type_hints(cls)
    return {key: _converted(key, hints[key], value) for key, value in given.items()}


def _converted(key: str, hint: Any, value: Any) -> Any:
    if hint is float or hint is int:
        return _number(key, hint, value)
    if get_origin(hint) is UnionType:
        return _of_union(key, get_args(hint), value)
    if get_origin(hint) is tuple:
        return _listed(key, get_args(hint)[0], value)
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ConfigError(
            f"strategy.{key} must be one of {', '.join(map(str, get_args(hint)))} "
            f"(seen: {value!r})"
        )
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(f"strategy.{key} must be true or false (seen: {value!r})")
    return value


def _of_union(key: str, hints: tuple[Any, ...], value: Any) -> Any:
    """Convert what may be one of several types: "int | None", "float | int"."""
    if value is None and NoneType in hints:
        return None
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if is_count and int in hints:
        return value
    wanted = [hint for hint in hints if hint is not NoneType]
    return _converted(key, float if float in wanted else wanted[0], value)


def _listed(key: str, hint: Any, value: Any) -> tuple[Any, ...]:
    """Convert a list; what is no list is a list of one."""
    items = value if isinstance(value, list | tuple) else [value]
    if hint is str and not all(isinstance(item, str) for item in items):
        raise ConfigError(f"strategy.{key} must be a list of names (seen: {value!r})")
    return tuple(_converted(key, hint, item) for item in items)


def _number(key: str, kind: type[int] | type[float], value: Any) -> int | float:
    """Accept 1e-3 as YAML reads it, a string; refuse yes, NaN, and 2.5 as a count."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
        if math.isnan(number) or (kind is int and not number.is_integer()):
            raise ValueError
    except (TypeError, ValueError):
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(
            f"strategy.{key} must be {wanted} (seen: {value!r})"
        ) from None
    return kind(value) if isinstance(value, int) else kind(number)
