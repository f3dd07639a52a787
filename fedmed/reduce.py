r"""Sums over sites that do not depend on who answered first.

A sum of floating-point numbers depends on its grouping. Here the grouping is fixed: a
pairwise tree over the sorted sites, in float64. Level by level neighbours are added,
((0 + 1) + (2 + 3)) + ((4 + 5) + 6), so that an aligned block of $2^n$ sites is a whole
subtree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedmed.errors import SiteError, StateMismatchError
from fedmed.flat import CHUNK, FlatTensors, Section
from fedmed.message import SiteId, State
from fedmed.partition import Entry, shorten
from fedmed.replies import SiteStates


def tree_sum(values: Sequence[State], weights: Sequence[float | int]) -> State:
    r"""Add states, $\sum_s w_s x_s$, along a tree of fixed shape.

    Args:
        values: One state per site, in sorted order of the sites.
        weights: One finite factor per state; they need not add up to 1.

    Returns:
        Names and dtypes of the states; floating point added in float64 and cast back.
        Integers are never added: the largest of all, whatever the weights.

    Raises:
        StateMismatchError: If names, shapes or dtypes differ between the states.

    Example:
        >>> ones = {"a": torch.ones(2)}
        >>> tree_sum([ones, ones, ones], [1.0, 2.0, 0.5])
        {'a': tensor([3.5000, 3.5000])}
    """
    assert len(values) == len(weights)
    assert values
    _check_alike({str(position): value for position, value in enumerate(values)})
    return {
        name: _combine([value[name] for value in values], weights) for name in values[0]
    }


def weighted_mean(
    states: Mapping[SiteId, State], weights: Mapping[SiteId, float | int]
) -> State:
    r"""Average states over sites, $\sum_s w_s x_s / \sum_s w_s$.

    A site of weight 0 does not take part: the result is, bit for bit, that of leaving
    it out.

    Args:
        states: One state per site; the mapping's order does not matter.
        weights: One weight per site, e.g. its number of examples.

    Returns:
        As `tree_sum`; integers are the largest over the sites that take part.

    Raises:
        SiteError: If a weight is negative or not finite, if all are zero, or if
            weights and states are of different sites.
        StateMismatchError: If names, shapes or dtypes differ between sites.

    Source:
        McMahan et al., Communication-Efficient Learning of Deep Networks from
        Decentralized Data, AISTATS 2017, arXiv:1602.05629, algorithm 1.
    """
    packed = states.rows() if isinstance(states, SiteStates) else None
    if packed is not None:
        return _mean(*packed, _shares(states, weights))
    shares = normalised_weights(states, weights)
    return tree_sum([states[site] for site in shares], list(shares.values()))


def merge_norm_statistics(
    states: Mapping[SiteId, State],
    weights: Mapping[SiteId, float | int],
    entries: Iterable[Entry],
    *,
    passes: Mapping[str, int] | None = None,
) -> State:
    r"""Merge running statistics by the law of total variance.

    $\mu = \sum_s w_s \mu_s$ and
    $\sigma^2 = \sum_s w_s (\sigma_s^2 + f (\mu_s - \mu)^2)$ with $\sum_s w_s = 1$:
    unlike the mean of the variances it holds what differs between the sites.

    f is 1 where the sites' statistics are their own. After k passes from common ones,
    $\mu_s = (1 - b) \mu_0 + b m_s$ with $b = 1 - (1 - a)^k$ for batches of mean $m_s$
    and a momentum a: the squares shrink by $b^2$, but the pooled batches' variance
    between the sites has to come in by b, so f is 1 / b.

    Args:
        states: One state per site; other tensors in it are passed over.
        weights: One weight per site.
        entries: What the state consists of.
        passes: By name of a running variance: how many passes all sites made from the
            same statistics. None: their statistics are their own.

    Returns:
        The normalisation statistics, and the largest of each counter.

    Raises:
        SiteError: As `weighted_mean`.
        StateMismatchError: As `weighted_mean`, or a variance came without its mean.

    Differs from the source:
        Torch's running variance is the unbiased one of each batch; it is taken as it
        is.
    """
    entries = tuple(entries)
    roles = {entry.name: entry.role for entry in entries}
    shares = normalised_weights(states, weights)
    first = states[next(iter(shares))]
    names = [n for n in first if roles.get(n) in ("norm_statistic", "counter")]
    parts = [
        {n: t for n, t in states[site].items() if n in set(names)} for site in shares
    ]
    merged = tree_sum(parts, list(shares.values()))
    for name in (n for n in names if roles[n] == "norm_statistic"):
        if not _is_variance(name):
            continue
        mean_name = _mean_of_variance(name, merged)
        merged[name] = _total_variance(
            [part[mean_name] for part in parts],
            [part[name] for part in parts],
            list(shares.values()),
            between=_between(entries, passes).get(name, 1.0),
        )
    return {name: merged[name] for name in names}


def _between(
    entries: Iterable[Entry], passes: Mapping[str, int] | None
) -> dict[str, float]:
    """What the variance between sites is multiplied by, by name of a variance."""
    return {
        entry.name: 1 / (1 - (1 - entry.momentum) ** passes[entry.name])
        for entry in entries
        if passes and entry.momentum and passes.get(entry.name)
    }


def merge_states(
    states: Mapping[SiteId, State],
    weights: Mapping[SiteId, float | int],
    entries: Iterable[Entry],
    *,
    passes: Mapping[str, int] | None = None,
) -> State:
    """Merge the sites' states, each tensor by its role.

    Weights and affine parts are averaged, normalisation statistics merged by the law
    of total variance, counters are the largest.

    Args:
        states: One state per site: the whole state or the shared part of it.
        weights: One weight per site.
        entries: What the whole state consists of; names the states lack do not
            matter.
        passes: As of `merge_norm_statistics`.

    Returns:
        A state with the names, order and dtypes of the first site's.

    Raises:
        SiteError: As `weighted_mean`.
        StateMismatchError: As `weighted_mean`, or if a state holds a name that
            `entries` does not know.
    """
    entries = tuple(entries)
    known = {entry.name for entry in entries}
    packed = states.rows() if isinstance(states, SiteStates) else None
    if packed is not None and known.issuperset(packed[0].slots):
        shares = _shares(states, weights)
        return _merge_rows(*packed, shares, entries, passes=passes)
    averaged = {e.name for e in entries if e.role in ("weight", "norm_affine")}
    for site in sorted(states):
        unknown = [name for name in states[site] if name not in known]
        if unknown:
            raise StateMismatchError(
                f"site {site!r} sent names the model does not have: {shorten(unknown)}"
            )
    means = weighted_mean(
        {s: {n: t for n, t in x.items() if n in averaged} for s, x in states.items()},
        weights,
    )
    merged = means | merge_norm_statistics(states, weights, entries, passes=passes)
    return {name: merged[name] for name in states[min(states)]}


def _merge_rows(
    section: Section,
    rows: Mapping[SiteId, FlatTensors],
    shares: Mapping[SiteId, float],
    entries: tuple[Entry, ...],
    *,
    passes: Mapping[str, int] | None,
) -> State:
    """Do what `merge_states` does with replies that are laid out alike."""
    merged = _mean(section, rows, shares)
    statistics = [e.name for e in entries if e.role == "norm_statistic"]
    held = [name for name in statistics if name in merged]
    first = next(iter(rows.values()))
    if held and first.adder:
        names = tuple(section.slots[name].name for name in held)
        first.adder.bring([rows[site] for site in shares], names)
    factors = _between(entries, passes)
    alike: dict[tuple[torch.dtype, float], list[str]] = {}
    for name in filter(_is_variance, held):
        key = (merged[name].dtype, factors.get(name, 1.0))
        alike.setdefault(key, []).append(name)
    for (_, between), names_of_one in alike.items():
        _merge_variances(merged, names_of_one, section, rows, shares, between=between)
    return merged


def _merge_variances(
    merged: State,
    names: Sequence[str],
    section: Section,
    rows: Mapping[SiteId, FlatTensors],
    shares: Mapping[SiteId, float],
    *,
    between: float,
) -> None:
    """Merge the variances of all layers at once: a layer's are few numbers."""
    mean_names = [_mean_of_variance(name, merged) for name in names]
    means, variances = (
        [rows[s].joined([section.slots[n].name for n in wanted]) for s in shares]
        for wanted in (mean_names, names)
    )
    weights = list(shares.values())
    found = _total_variance(means, variances, weights, between=between)
    sizes = [merged[name].numel() for name in names]
    for name, part in zip(names, torch.split(found, sizes), strict=True):
        merged[name].copy_(part.view(merged[name].shape))


def _is_variance(name: str) -> bool:
    """Whether it is a running variance: the name that torch's own layers give it."""
    return name.rpartition(".")[2] == "running_var"


def _mean_of_variance(name: str, held: Mapping[str, Tensor]) -> str:
    module = name.rpartition(".")[0]
    mean_name = f"{module}.running_mean" if module else "running_mean"
    if mean_name not in held:
        raise StateMismatchError(f"{name} came without {mean_name}")
    return mean_name


def normalised_weights(
    states: Mapping[SiteId, State], weights: Mapping[SiteId, float | int]
) -> dict[SiteId, float]:
    """Check weights and states and scale the weights to a sum of 1.

    Returns:
        The positive weights in sorted order of the sites.

    Raises:
        SiteError: As `weighted_mean`.
        StateMismatchError: As `weighted_mean`.

    Example:
        >>> normalised_weights({"b": {}, "a": {}, "c": {}}, {"a": 3, "b": 1, "c": 0})
        {'a': 0.75, 'b': 0.25}
    """
    shares = _shares(states, weights)
    _check_alike(states)
    return shares


def _shares(
    states: Mapping[SiteId, State], weights: Mapping[SiteId, float | int]
) -> dict[SiteId, float]:
    if states.keys() != weights.keys():
        odd = sorted(set(states) ^ set(weights))
        raise SiteError(f"weights and states are of different sites: {', '.join(odd)}")
    for site in sorted(weights):
        if not (math.isfinite(weights[site]) and weights[site] >= 0):
            raise SiteError(
                f"site {site!r} has weight {weights[site]}; expected a finite number "
                "of at least 0",
                hint="a weight is usually the number of examples",
            )
    total = math.fsum(weights[site] for site in sorted(weights))
    if total == 0:
        raise SiteError(
            f"no weight is positive among {len(weights)} sites",
            hint="keep the previous model: there is nothing to average",
        )
    return {s: weights[s] / total for s in sorted(weights) if weights[s] > 0}


def mean_of_rows(
    section: Section,
    rows: Sequence[FlatTensors],
    shares: Sequence[float],
    *,
    buffer: Tensor | None = None,
    add: Callable[[Tensor, list[Tensor], list[float]], None] | None = None,
) -> FlatTensors:
    """Average replies that are laid out alike, run by run.

    Args:
        section: Which part of the replies.
        rows: In sorted order of the sites.
        shares: One weight per row, of sum 1.
        buffer: Where to; at least `section.alone.num_bytes` of uint8.
        add: What to do instead of `add_rows`, with equal results.
    """
    layout = section.alone
    if buffer is None:
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
    for target, run in zip(layout.runs, section.runs, strict=True):
        out = target.read(buffer)
        parts = [run.read(row.buffer) for row in rows]
        if run.dtype.is_floating_point:
            (add or add_rows)(out, parts, list(shares))
        else:
            out.copy_(_combine(parts, []))
    return FlatTensors(layout, buffer)


def _mean(
    section: Section, rows: Mapping[SiteId, FlatTensors], shares: Mapping[SiteId, float]
) -> State:
    taking_part = [rows[site] for site in shares]
    weights = list(shares.values())
    adder = taking_part[0].adder
    mean = adder.mean(section, taking_part, weights) if adder else None
    if mean is None:
        mean = mean_of_rows(section, taking_part, weights)
    return mean.state(section.name)


@torch.no_grad()
def add_rows(out: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    r"""Form $\sum_s w_s x_s$ along the fixed tree, chunk by chunk.

    What a number becomes depends on its own column alone, so that columns may be
    shared out among processes in any way.

    Args:
        out: (N,), written.
        rows: One (N,) of its dtype per site, in sorted order of the sites.
        weights: One per row.
    """
    spare: list[Tensor] = []
    parts = zip(*(torch.split(row, CHUNK) for row in rows), strict=True)
    for place, part in zip(torch.split(out, CHUNK), parts, strict=True):
        total = _tree(part, weights, spare)
        place.copy_(total)
        spare.append(total)


def _combine(tensors: Sequence[Tensor], weights: Sequence[float | int]) -> Tensor:
    first = tensors[0]
    if not first.dtype.is_floating_point:
        largest = first
        for tensor in tensors[1:]:
            largest = torch.maximum(largest, tensor)
        return largest.clone()
    if first.numel() <= CHUNK or not all(t.is_contiguous() for t in tensors):
        return _tree(tensors, weights).to(first.dtype)
    # Same numbers, several times faster: float64 sums that fit a processor's cache.
    result = torch.empty_like(first)
    add_rows(result.view(-1), [t.detach().view(-1) for t in tensors], weights)
    return result


def _tree(
    tensors: Sequence[Tensor],
    weights: Sequence[float | int],
    spare: list[Tensor] | None = None,
) -> Tensor:
    # A binary counter: only log2(sites) partial sums are alive at a time.
    counter = Counter(spare)
    for tensor, weight in zip(tensors, weights, strict=True):
        counter.push(0, _product(tensor, weight, spare))
    return counter.total()


def _product(tensor: Tensor, weight: float | int, spare: list[Tensor] | None) -> Tensor:
    if spare and spare[-1].shape == tensor.shape:
        # What was used just now lies in the processor's own cache.
        block = spare.pop().copy_(tensor)
    else:
        block = tensor.detach().to(torch.float64, copy=True)
    return block.mul_(weight)


class Counter:
    """Adds blocks of the tree as they come, from the first site to the last.

    A block of level k is the sum over $2^k$ neighbours that starts at a multiple of
    $2^k$. Whether it was added here or elsewhere makes no difference to any bit.

    Args:
        spare: Where to put blocks that are used up; None: nowhere.
    """

    def __init__(self, spare: list[Tensor] | None = None) -> None:
        self._spare = spare
        self._pending: list[tuple[int, Tensor]] = []

    def push(self, level: int, block: Tensor) -> None:
        """Add the next block; its memory is used."""
        pending = self._pending
        pending.append((level, block))
        while len(pending) > 1 and pending[-1][0] == pending[-2][0]:
            level, right = pending.pop()
            _, left = pending.pop()
            pending.append((level + 1, left.add_(right)))
            self._put_aside(right)

    def total(self) -> Tensor:
        """Give the sum of all, float64."""
        total = self._pending.pop()[1]
        while self._pending:
            right, total = total, self._pending.pop()[1]
            total.add_(right)
            self._put_aside(right)
        return total

    def _put_aside(self, block: Tensor) -> None:
        if self._spare is not None:
            self._spare.append(block)


def whole_blocks(places: Sequence[int]) -> list[tuple[int, int]]:
    """Find the largest blocks of the tree whose sites all are at hand.

    Args:
        places: Ascending numbers of the sites at hand among all sites of the sum.

    Returns:
        (first place, level) of each block, ascending; together they are `places`.

    Example:
        >>> whole_blocks([1, 2, 3, 4, 5, 6, 7])
        [(1, 0), (2, 1), (4, 2)]
    """
    blocks: list[tuple[int, int]] = []
    at_hand = set(places)
    number = 0
    while number < len(places):
        first, level = places[number], 0
        while first % (2 << level) == 0 and all(
            place in at_hand for place in range(first, first + (2 << level))
        ):
            level += 1
        blocks.append((first, level))
        number += 1 << level
    return blocks


def block_sum(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum one whole block: $2^k$ rows (N,) of neighbours, to (N,) float64."""
    out = torch.empty(len(rows[0]), dtype=torch.float64)
    add_rows(out, rows, weights)
    return out


def _total_variance(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    shares: Sequence[float],
    *,
    between: float,
) -> Tensor:
    mean = _tree(means, shares)
    spread = [
        v.to(torch.float64) + between * (m.to(torch.float64) - mean).square()
        for m, v in zip(means, variances, strict=True)
    ]
    return _tree(spread, shares).to(variances[0].dtype)


def _check_alike(states: Mapping[str, State]) -> None:
    sites = sorted(states)
    first = states[sites[0]]
    for site in sites[1:]:
        other = states[site]
        problems = [f"missing {n}" for n in first if n not in other]
        problems += [f"unknown {n}" for n in other if n not in first]
        problems += [
            f"{n} is {_looks(other[n])}, expected {_looks(first[n])}"
            for n in first
            if n in other and _looks(other[n]) != _looks(first[n])
        ]
        if problems:
            raise StateMismatchError(
                f"state of {site!r} differs from that of {sites[0]!r}: "
                f"{shorten(problems)}"
            )


def _looks(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
