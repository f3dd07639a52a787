"""JSON that gives back exactly what was put in, or refuses.

Finite floats round trip bit for bit (shortest repr). NaN and infinities, which JSON
does not know, are written as `{"$float": "nan"}`, so that a metric may be undefined.
Reading is strict: no duplicate keys, no `NaN` literals, bounded depth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32
"""Deepest nesting that is written or read."""

_TAG = "$float"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_INT_LIMIT = 2**64


def dumps(value: Any) -> str:
    """Write a value as one line of JSON, equal text for equal values.

    Args:
        value: None, bool, int below 2**64 in size, float, str, and lists, tuples
            (which come back as lists) and string-keyed mappings of these.

    Raises:
        ValueError: If anything else is found; the message says where.

    Example:
        >>> dumps({"b": float("nan"), "a": 0.1})
        '{"a":0.1,"b":{"$float":"nan"}}'
    """
    return json.dumps(
        _plain(value, "value", MAX_DEPTH),
        allow_nan=False,
        ensure_ascii=False,
        separators=(",", ":"),
        sort_keys=True,
    )


def loads(text: str | bytes) -> Any:
    """Read what `dumps` wrote.

    Args:
        text: JSON; bytes must be UTF-8.

    Raises:
        ValueError: If it is not JSON, or JSON that `dumps` would not have written.

    Example:
        >>> loads('{"a": {"$float": "-inf"}}')
        {'a': -inf}
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")  # UnicodeDecodeError is a ValueError
    return _restore(loads_strict(text), MAX_DEPTH)


def loads_strict(text: str) -> Any:
    """Read JSON, refusing duplicate keys and NaN literals; no tags are resolved.

    Raises:
        ValueError: If the text is not such JSON or nests too deeply.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("JSON nests too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one JSON object")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"{where[:80]} nests deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, int, float)):
        return _plain_scalar(value, where)
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]", depth - 1) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {
            _plain_key(k, where): _plain(v, f"{where}[{k!r}]", depth - 1)
            for k, v in value.items()
        }
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _plain_scalar(value: str | int | float, where: str) -> Any:
    if isinstance(value, str):
        return _plain_text(value, where)
    if isinstance(value, int):
        if abs(value) >= _INT_LIMIT:
            raise ValueError(f"{where} is an integer of more than 64 bits")
        return int(value)
    if math.isfinite(value):
        return float(value)
    return {_TAG: str(float(value))}


def _plain_text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is a text that UTF-8 cannot hold") from None
    return value


def _plain_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where} has the key {key!r}; keys must be texts")
    if key == _TAG:
        raise ValueError(f"{where} has the reserved key {_TAG!r}")
    return _plain_text(key, f"a key of {where}")


def _restore(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"JSON nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        if _TAG in value:
            return _restore_float(value)
        return {
            _plain_text(k, "a key"): _restore(v, depth - 1) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_restore(item, depth - 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large for a float")  # "1e999"
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return _plain_scalar(value, "a value")
    return value


def _restore_float(value: dict[str, Any]) -> float:
    name = value[_TAG]
    if len(value) != 1 or not isinstance(name, str) or name not in _SPECIAL:
        raise ValueError(f"{_TAG!r} does not hold nan, inf or -inf alone")
    return _SPECIAL[name]
