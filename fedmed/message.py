"""Message: what one side says to the other, in either direction.

A message is a JSON header and flat, named tensors. How it travels is the transport's
matter (`fedmed.transports`), how it looks as bytes is `fedmed.wire`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SiteId = str
"""A site's name in a study; order over sites is always the sorted order of these."""

State = dict[str, "torch.Tensor"]
"""Named tensors: a network's weights, a gradient, an optimiser's moments."""


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: Down: the action asked for ("local_training", "evaluate"). Up: the kind
            of payload that leaves the site ("Gradient", "Weights", "Metrics").
        header: JSON-serialisable facts: round, step, num_examples, losses...
        tensors: Flat, named tensors; nested states join their names with "/".
        norms: L2 norm of the floating numbers of each section, if whoever carried the
            message measured them where it was made; see `fedmed.gate.measure`. Never
            read from another machine.
    """

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    norms: Mapping[str, float] | None = field(default=None, compare=False)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of the tensors, without header and framing."""
        known = getattr(self.tensors, "content_bytes", None)
        if known is not None:
            return int(known)
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class SiteFailure:
    """Why a site gave no usable reply to one message.

    Attributes:
        reason: One of "raised", "died", "timeout", "unreachable", "refused",
            "lost_state", "wire".
        detail: One scrubbed sentence for people: no path, no patient.
        fatal: True if asking again cannot help (a wrong policy, no cases).
    """

    reason: str
    detail: str
    fatal: bool = False


Answer = Message | SiteFailure
