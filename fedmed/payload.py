"""Payloads: the declared kinds of what may leave a site.

A site's policy allows or refuses by kind, and a strategy's docstring lists the kinds
under **Leaves the site**. A payload is plain data; `to_message` and `from_message`
turn it into the flat form that travels and back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fedmed.errors import WireError
from fedmed.message import Message, State

CLASS_STATISTIC = "class_statistic"
"""Name in `extra` of a `ClassStatistic` that travels with weights."""
AMPLITUDE_STATISTIC = "amplitude_statistic"
"""The same of an `AmplitudeStatistic`."""

_SEPARATOR = "/"


@dataclass(frozen=True)
class Payload:
    """What every reply says, whatever its kind.

    Attributes:
        num_examples: Training examples behind the reply, >= 0.
        values: JSON facts for the record: losses, times. Never per-patient.
    """

    num_examples: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights(Payload):
    """Weights after local training; `extra` holds states the method adds to them.

    Attributes:
        state: Shared entries only.
        extra: Named further states, e.g. SCAFFOLD's change of control variate. What is
            named `CLASS_STATISTIC` is one (`AMPLITUDE_STATISTIC` likewise): a policy
            checks the reply as both kinds.
        min_count: As of the statistic in `extra`.
    """

    state: State = field(default_factory=dict)
    extra: Mapping[str, State] = field(default_factory=dict)
    min_count: int = 0


@dataclass(frozen=True)
class Gradient(Payload):
    """Gradient of the site's mean loss on one batch.

    Attributes:
        state: Gradient of every trainable shared entry.
        buffers: Shared normalisation statistics after the forward pass.
    """

    state: State = field(default_factory=dict)
    buffers: State = field(default_factory=dict)


@dataclass(frozen=True)
class ClassStatistic(Payload):
    """One small array per class: soft confusion rows, prototypes, counts.

    Attributes:
        state: Named arrays; their size depends on classes, never on voxels.
        min_count: The smallest number of voxels or cases behind a present class, for
            the hospital's policy; outside it only says that there is one.
    """

    state: State = field(default_factory=dict)
    min_count: int = 0


@dataclass(frozen=True)
class Embedding(Payload):
    """Feature vectors of single examples: the most revealing kind.

    Attributes:
        state: Named arrays.
        min_count: Above 0, a `ClassStatistic` is among them, and this is its own: a
            policy checks the reply as both kinds.
    """

    state: State = field(default_factory=dict)
    min_count: int = 0


@dataclass(frozen=True)
class AmplitudeStatistic(Payload):
    """Low-frequency amplitude statistics of a site's images.

    Attributes:
        state: Named arrays; their size depends on the number of frequencies.
        min_count: The smallest number of images behind one of the numbers; outside the
            hospital it only says that there is one.
    """

    state: State = field(default_factory=dict)
    min_count: int = 0


@dataclass(frozen=True)
class PublicLogits(Payload):
    """Predictions of public images, none of a patient of the site.

    Attributes:
        state: By number of the batch, logits or probabilities (B, L, ...). Their size
            follows the public images and the classes, not the site's own voxels.
    """

    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class Normalisation(Payload):
    """What a site keeps of normalisation layers and adapters, for one it never met.

    Sent once, after the last round, and only if the study names a rule for unseen
    hospitals that needs it; see `fedmed.unseen`.

    Attributes:
        state: Kept entries of normalisation layers and adapters that prediction uses.
    """

    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics(Payload):
    """Numbers about cases, never images or masks.

    Attributes:
        rows: One mapping per case and class.
    """

    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Card(Payload):
    """What a site says about itself when it joins: `values` holds card and counts."""


KINDS: Mapping[str, type[Payload]] = {
    kind.__name__: kind
    for kind in (
        Weights,
        Gradient,
        ClassStatistic,
        Embedding,
        AmplitudeStatistic,
        PublicLogits,
        Normalisation,
        Metrics,
        Card,
    )
}
"""Every kind of payload by its name; a policy names them."""


_CARRIED = {
    CLASS_STATISTIC: "ClassStatistic",
    AMPLITUDE_STATISTIC: "AmplitudeStatistic",
}


def kinds_in(message: Message) -> tuple[str, ...]:
    """Name every kind of payload that a message carries, its own first.

    Example:
        >>> told = {CLASS_STATISTIC: {"rows": torch.ones(2, 2)}}
        >>> kinds_in(to_message(Weights(extra=told)))
        ('Weights', 'ClassStatistic')
    """
    carried = [
        kind
        for extra, kind in _CARRIED.items()
        if any(name.startswith(f"extra/{extra}/") for name in message.tensors)
    ]
    if message.kind == Embedding.__name__ and message.header.get("min_count"):
        carried.append(ClassStatistic.__name__)
    return (message.kind, *carried)


def _flatten(prefix: str, value: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for name, item in value.items():
        path = f"{prefix}{_SEPARATOR}{name}"
        if isinstance(item, Mapping):
            flat.update(_flatten(path, item))
        else:
            flat[path] = item
    return flat


_NESTED = frozenset({"extra"})
_STATES = frozenset({"state", "buffers"})
_TENSORS = _NESTED | _STATES


@functools.cache
def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(kind))


def to_message(payload: Payload, **facts: Any) -> Message:
    """Flatten a payload: its states become tensors, the rest becomes the header.

    Args:
        payload: What a strategy wants to send.
        facts: Put into the header too.
    """
    header: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    kind: Any = type(payload)
    for name in _fields(kind):
        value = getattr(payload, name)
        if name in _TENSORS:
            tensors.update(_flatten(name, value))
        elif name == "rows":
            header["rows"] = [dict(row) for row in value]
        else:
            header[name] = value
    return Message(kind.__name__, header | facts, tensors)


def from_message(message: Message) -> Payload:
    """Rebuild the payload that `to_message` flattened.

    Raises:
        WireError: If the kind is unknown or holds a tensor it does not declare.
    """
    kind = KINDS.get(message.kind)
    if kind is None:
        raise WireError(f"a reply of unknown kind {message.kind!r} arrived")
    fields: dict[str, Any] = {
        "num_examples": message.header.get("num_examples", 0),
        "values": message.header.get("values", {}),
    }
    known = {item.name for item in dataclasses.fields(kind)}
    if "rows" in known:
        fields["rows"] = tuple(message.header.get("rows", ()))
    if "min_count" in known:
        fields["min_count"] = message.header.get("min_count", 0)
    for path, tensor in message.tensors.items():
        name, *rest = path.split(_SEPARATOR)
        depth = 2 if name in _NESTED else 1
        if name not in known & _TENSORS or len(rest) < depth:
            raise WireError(f"a {message.kind} reply holds an undeclared {name!r}")
        target = fields.setdefault(name, {})
        if name in _NESTED:
            target = target.setdefault(rest[0], {})
            rest = rest[1:]
        target[_SEPARATOR.join(rest)] = tensor
    return kind(**fields)


P = TypeVar("P", bound=Payload)


def expect(payload: Payload, kind: type[P]) -> P:
    """Narrow a payload to the kind a strategy asked for.

    Raises:
        WireError: If the reply is of another kind.
    """
    if not isinstance(payload, kind):
        raise WireError(
            f"a {kind.__name__} reply was expected, a {type(payload).__name__} came"
        )
    return payload
