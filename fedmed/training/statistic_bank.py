"""What a server remembers of the sites' statistics, for losses that use old ones.

With many local steps between two exchanges a site cannot have the others' statistics of
the same step. It trains against what they last told, blended over rounds; what was
exact with `fedmed.training.coupled` becomes a pull towards where the others were.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmed.message import SiteId, State

PRESENT = "present"
"""Name of the tensor that marks the rows which hold something by 1, others by 0."""

_SLOT = "|"


def updated_bank(
    bank: State, told: Mapping[SiteId, State], *, momentum: float
) -> State:
    r"""Blend new statistics into the server's bank, row by row.

    $\bar s_{kc} \leftarrow \mu \bar s_{kc} + (1 - \mu) s_{kc}$ for each row c that is
    present; the first time, $\bar s_{kc} \leftarrow s_{kc}$. Other rows, and sites that
    did not answer, stay as they were.

    Args:
        bank: What the server remembers; {} at the start.
        told: By site: tensors whose first axis are rows, and "present", one number for
            each row.
        momentum: $\mu$ in [0, 1); 0 keeps the latest.

    Returns:
        The new bank, entries "site|name"; a value for `Server.remember`.
    """
    found = dict(bank)
    for site, state in sorted(told.items()):
        was = banked(bank, site).get(PRESENT, torch.zeros_like(state[PRESENT]))
        is_new = state[PRESENT] > 0.5
        for name, new in state.items():
            if name == PRESENT:
                blend = (is_new | (was > 0.5)).to(new)
            else:
                old = banked(bank, site).get(name, torch.zeros_like(new))
                weight = _per_row(torch.where(was > 0.5, momentum, 0.0), like=new)
                blend = weight * old + (1 - weight) * new
                blend = torch.where(_per_row(is_new, like=new), blend, old)
            found[f"{site}{_SLOT}{name}"] = blend
    return found


def banked(bank: State, site: SiteId) -> State:
    """What a bank holds of one site; {} if nothing."""
    start = f"{site}{_SLOT}"
    return {
        key.removeprefix(start): tensor
        for key, tensor in bank.items()
        if key.rpartition(_SLOT)[0] == site
    }


def banked_sites(bank: State) -> tuple[SiteId, ...]:
    """Sites of which a bank holds something, sorted."""
    return tuple(sorted({key.rpartition(_SLOT)[0] for key in bank}))


def _per_row(values: Tensor, *, like: Tensor) -> Tensor:
    shaped = values.reshape(-1, *[1] * (like.ndim - 1))
    return shaped if shaped.dtype == torch.bool else shaped.to(like)
