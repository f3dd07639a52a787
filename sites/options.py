"""Options of a dataset module: read from a study, checked, and part of a cache key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedmed.errors import ConfigError
from fedmed.spelling import nearest

Options = TypeVar("Options")


def parse_options(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """Turn what a study says into a module's frozen options dataclass.

    Args:
        kind: The dataclass; its fields are the known options, their defaults the
            working defaults, their types what is allowed.
        options: Names and plain YAML values.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: If a name is unknown (the nearest known name is given), or if a
            value does not fit.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Demo:
        ...     unlabelled: bool = False
        >>> parse_options(Demo, {"unlabelled": True})
        Demo(unlabelled=True)
        >>> parse_options(Demo, {"unlabeled": True})
        Traceback (most recent call last):
        ...
        fedmed.errors.ConfigError: unknown dataset option 'unlabeled'
        did you mean 'unlabelled'? Known: unlabelled
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"unknown dataset option {name!r}", hint=suggest(str(name), known)
            )
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "options"
        raise ConfigError(
            f"dataset option {where}: {first['msg']}", hint=f"seen: {first['input']!r}"
        ) from None


def suggest(name: str, known: list[str]) -> str:
    """Say which known name was probably meant, and list all of them.

    Args:
        name: What was written.
        known: What could have been written.

    Returns:
        A sentence for an error's hint.

    Example:
        >>> suggest("foldr", ["folder", "bids"])
        "did you mean 'folder'? Known: folder, bids"
        >>> suggest("zzz", [])
        'Known: none'
    """
    near = nearest(name, known)
    guess = f"did you mean {near!r}? " if near else ""
    return f"{guess}Known: {', '.join(known) or 'none'}"


def reader_version(version: str, options: object, *words: str) -> str:
    """Name a reader's result: its version, and a digest of what it was asked for.

    Two readers of equal files with different options give different cases, so a cache
    keyed by the files' content needs this name too.

    Args:
        version: Bumped by hand when the reader's code changes its result.
        options: The frozen options dataclass.
        words: Further facts that change the result.

    Returns:
        E.g. "1-5d41402a".
    """
    values = dataclasses.asdict(options)  # type: ignore[call-overload]
    text = json.dumps([values, words], sort_keys=True, default=_plain)
    return f"{version}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _plain(value: object) -> str:
    return value.pattern if isinstance(value, re.Pattern) else repr(value)
