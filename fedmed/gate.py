"""The gate: what the server checks of every reply before anything is summed.

One site's bad reply (NaN, a shape that would broadcast, a weight of 1e12, an update a
billion times too large) costs that site its round, by name and with the reason; it
never costs the run. What the gate cannot see: a small, well-formed, malicious update.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedmed.errors import SiteError
from fedmed.flat import FlatTensors, Run, run_of, section_of, sum_of_squares
from fedmed.message import Message, SiteId, State
from fedmed.payload import KINDS

logger = logging.getLogger(__name__)

MODEL_KINDS = frozenset({"Weights", "Gradient"})
"""Kinds whose tensors carry the names of the network's entries."""

UsualNorms = dict[str, float]
"""Section -> the median norm of sites, the largest one of the last exchanges."""

_RAGGED_KINDS = frozenset({"Embedding", "AmplitudeStatistic"})
_LARGEST_STATISTIC = 1 << 20
"""Numbers in one `ClassStatistic` whose shapes nobody declared: it grows with classes
and features, never with voxels."""
_FADING = 0.99
"""What is left of a usual norm after one step: half of it after 69."""
_STATISTICS = "buffers"
_MEASURED_FROM = ("Weights", "state")
"""Kind and section whose numbers are values, not differences."""
_NAMED_IN_REASON = 3


@dataclass(frozen=True)
class Expectation:
    """What replies to one exchange must look like.

    Attributes:
        reference: The server's shared entries: names, shapes, dtypes, and the origin
            from which an update by weights is measured.
        registered: Training examples each site registered with.
        norm_factor: An update is refused if its L2 norm exceeds this many times both
            the median of the other sites' and what was usual so far (`screen`); None =
            not checked. One that stands alone is not, nor one beside others of norm 0.
        max_norm: The same as an absolute number; None = not checked.
        kinds: Kinds that may come.
        alike: All sites send the same names and shapes; what most of them send is
            right. False: each may send any part of what is declared.
        comparable: Sites' norms say something about each other. False: one site's may
            be next to nothing where another's is not, so that the factor is squared,
            and nothing is refused before there is something usual.
        roles: By site; only norms of sites of the same role are compared. Empty = all.
        steps: Optimisation steps between two such exchanges, after which what was
            usual is forgotten the more.
        sends: Shape by name of what a reply's "state" holds; None: the network's
            entries, for a `ClassStatistic` whatever most sites send. Weights and
            gradients are always of the network's entries.
        checks: By section of a reply: says what is wrong with it, "" if nothing is.
    """

    reference: Mapping[str, torch.Tensor]
    registered: Mapping[SiteId, int]
    norm_factor: float | None = None
    max_norm: float | None = None
    kinds: frozenset[str] = frozenset(KINDS)
    alike: bool = True
    comparable: bool = True
    roles: Mapping[SiteId, str] = dataclasses.field(default_factory=dict)
    steps: int = 1
    sends: Mapping[str, tuple[int, ...]] | None = None
    checks: Mapping[str, Callable[[State], str]] = dataclasses.field(
        default_factory=dict
    )


class _RefusedError(Exception):
    """Why a reply is not used."""


def check_reply(message: Message, expectation: Expectation, *, site_id: SiteId) -> None:
    """Check one reply by itself.

    Raises:
        SiteError: If the reply must not be used; names the site and the reason.
    """
    try:
        _check(message, expectation, site_id)
    except _RefusedError as refusal:
        raise SiteError(f"site {site_id}: {refusal}") from None


def screen(
    replies: Mapping[SiteId, Message],
    expectation: Expectation,
    usual: UsualNorms | None = None,
) -> tuple[dict[SiteId, Message], dict[SiteId, str]]:
    """Sort the replies to one exchange into usable and refused ones.

    Args:
        replies: What came, in any order; the result does not depend on it.
        expectation: What it must look like.
        usual: Norms of earlier exchanges of this kind; told of the accepted ones. A
            network that is nearly right has next to no gradient on an easy batch, so
            that a site with a hard one stands out among its neighbours, but not among
            the exchanges before. None = nothing is known of any.

    Returns:
        Accepted replies and reasons of refusal, both in sorted order of sites.
    """
    accepted: dict[SiteId, Message] = {}
    refused: dict[SiteId, str] = {}
    checked: _Checked = {}
    for site_id in sorted(replies):
        try:
            _check(replies[site_id], expectation, site_id, checked)
            accepted[site_id] = replies[site_id]
        except _RefusedError as refusal:
            refused[site_id] = str(refusal)
    if expectation.alike:
        refused |= _unlike(accepted)
    accepted = {s: m for s, m in accepted.items() if s not in refused}
    known: UsualNorms = {} if usual is None else usual
    if expectation.norm_factor is not None and expectation.alike:
        factor = expectation.norm_factor
        for role, group in _by_role(accepted, expectation.roles).items():
            refused |= _outsized(group, expectation, factor, known, role=role)
    accepted = {s: m for s, m in accepted.items() if s not in refused}
    return accepted, dict(sorted(refused.items()))


def _by_role(
    messages: Mapping[SiteId, Message], roles: Mapping[SiteId, str]
) -> dict[str, dict[SiteId, Message]]:
    found: dict[str, dict[SiteId, Message]] = {}
    for site, message in messages.items():
        found.setdefault(roles.get(site, ""), {})[site] = message
    return found


def update_norms(message: Message, expectation: Expectation) -> dict[str, float]:
    """Measure a reply's update, one L2 norm per named state.

    Args:
        message: A reply; a `Weights` reply is measured from the reference.
        expectation: Holds the reference.

    Returns:
        Norm by section ("state", "extra/control"...); empty if the reply carries no
        update. Normalisation statistics of a `Gradient` are not part of one.
    """
    if message.kind not in MODEL_KINDS:
        return {}
    norms = message.norms
    if norms is None:
        norms = measure(message, Yardstick(expectation.reference))
    return {section: norm for section, norm in norms.items() if section != _STATISTICS}


class Yardstick:
    """What updates by weights are measured from.

    Args:
        reference: The server's shared entries.
    """

    def __init__(self, reference: Mapping[str, torch.Tensor]) -> None:
        self.reference = reference
        self._runs: dict[Run, torch.Tensor | None] = {}

    def origin(self, kind: str, run: Run) -> torch.Tensor | None:
        """What a run is measured from; None for zero, or if its names are wrong."""
        return self._run(run) if (kind, run.section) == _MEASURED_FROM else None

    def _run(self, run: Run) -> torch.Tensor | None:
        if run not in self._runs:
            names = tuple(section_of(name)[1] for name in run.names)
            fits = all(name in self.reference for name in names)
            origin = run_of(self.reference, names) if fits else None
            if origin is not None and origin.numel() != run.numel:
                origin = None
            self._runs[run] = origin
        return self._runs[run]


def measure(message: Message, yardstick: Yardstick) -> dict[str, float]:
    """Measure the floating numbers of a message, one L2 norm per section.

    Args:
        message: Any; a `Weights` message's "state" is measured from the reference.
        yardstick: Holds the reference.

    Returns:
        Norms; NaN or infinite if any number is.
    """
    if isinstance(message.tensors, FlatTensors):
        return _measure_runs(message.kind, message.tensors, yardstick)
    parts: dict[str, list[float]] = {}
    for name, tensor in message.tensors.items():
        section, entry = section_of(name)
        if not tensor.is_floating_point():
            continue
        update = tensor.double()
        if (message.kind, section) == _MEASURED_FROM:
            update = update - yardstick.reference[entry].double()
        norm = torch.linalg.vector_norm(update)
        parts.setdefault(section, []).append(float(norm))
    return {section: math.hypot(*norms) for section, norms in parts.items()}


def _measure_runs(
    kind: str, tensors: FlatTensors, yardstick: Yardstick
) -> dict[str, float]:
    squares: dict[str, float] = {}
    for run in tensors.layout.runs:
        if not run.dtype.is_floating_point:
            continue
        origin = yardstick.origin(kind, run)
        if origin is None and (kind, run.section) == _MEASURED_FROM:
            return {run.section: math.nan}  # names or shapes are wrong, see `_check`
        found = tensors.squares.get(run)
        if found is None:
            found = sum_of_squares(run.read(tensors.buffer), origin)
        squares[run.section] = squares.get(run.section, 0.0) + found
    return {section: math.sqrt(total) for section, total in squares.items()}


_Checked = dict[tuple[str, int], str | None]
"""(kind, identity of the layout) -> what is wrong with its names, shapes and dtypes."""


def _check(
    message: Message,
    expectation: Expectation,
    site_id: SiteId,
    known: _Checked | None = None,
) -> None:
    if message.kind not in expectation.kinds:
        raise _RefusedError(
            f"a reply of kind {message.kind[:40]!r}; expected "
            f"{', '.join(sorted(expectation.kinds))}"
        )
    _check_header(message, expectation, site_id)
    _check_entries(message, expectation, {} if known is None else known)
    _check_finite(message)
    for section, check in expectation.checks.items():
        if problem := check(_state_of(message, section)):
            raise _RefusedError(problem)
    if expectation.max_norm is not None:
        for section, norm in update_norms(message, expectation).items():
            if not norm <= expectation.max_norm:
                raise _RefusedError(
                    f"the update's norm ({section}) is {norm:.3g}; at most "
                    f"{expectation.max_norm:.3g} is allowed"
                )


def _state_of(message: Message, section: str) -> State:
    return {
        entry: tensor
        for name, tensor in message.tensors.items()
        for own, entry in [section_of(name)]
        if own == section
    }


def _check_finite(message: Message) -> None:
    if message.norms is not None and all(map(math.isfinite, message.norms.values())):
        return
    for name, tensor in message.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _RefusedError(f"{_show(name)} holds NaN or infinity")


def _check_entries(message: Message, expectation: Expectation, known: _Checked) -> None:
    """Check names, shapes and dtypes, once for all replies of one layout."""
    key = (message.kind, id(getattr(message.tensors, "layout", message)))
    if key not in known:
        known[key] = None
        try:
            _check_sections(message)
            if expectation.sends is not None:
                _check_declared(message, expectation.sends, whole=expectation.alike)
            for name, tensor in message.tensors.items():
                if message.kind in MODEL_KINDS:
                    _check_entry(name, tensor, expectation)
            if message.kind == "ClassStatistic" and expectation.sends is None:
                _check_statistic(message)
        except _RefusedError as refusal:
            known[key] = str(refusal)
    if (problem := known[key]) is not None:
        raise _RefusedError(problem)


def _check_header(message: Message, expectation: Expectation, site_id: SiteId) -> None:
    registered = expectation.registered.get(site_id)
    if registered is None:
        raise _RefusedError("it is not registered in this study")
    count = message.header.get("num_examples", 0)
    smallest = 1 if message.kind in MODEL_KINDS else 0
    if type(count) is not int or not smallest <= count <= registered:
        raise _RefusedError(
            f"num_examples is {_show(count)}; it registered {registered} and must "
            f"state a whole number from {smallest} to {registered}"
        )
    values = message.header.get("values", {})
    if not isinstance(values, Mapping):
        raise _RefusedError("its values are no mapping")
    if "loss" in values and not _is_number(values["loss"]):
        raise _RefusedError(f"its loss is {_show(values['loss'])}, which is no number")
    for holder in (message.header, values):
        if "weight" in holder:
            _check_weight(holder["weight"], registered)
    rows = message.header.get("rows", ())
    if not isinstance(rows, list | tuple) or not all(
        isinstance(row, Mapping) for row in rows
    ):
        raise _RefusedError("its rows are no list of mappings")


def _check_weight(weight: Any, registered: int) -> None:
    # NaN compares false and is refused.
    if not _is_number(weight) or not 0 < weight <= registered:
        raise _RefusedError(
            f"weight is {_show(weight)}; it must lie in (0, {registered}], the "
            "number of examples it registered"
        )


@functools.cache
def _sections(kind: str) -> frozenset[str]:
    """Where a payload of this kind may hold tensors."""
    fields = {item.name for item in dataclasses.fields(KINDS[kind])}
    return frozenset(fields & {"state", "buffers", "extra"})


def _check_sections(message: Message) -> None:
    """Check that each tensor has a place in the payload that it will be part of."""
    known = _sections(message.kind)
    for name in message.tensors:
        section, entry = section_of(name)
        first, _, inner = section.partition("/")
        if first not in known or not entry or (first == "extra" and not inner):
            raise _RefusedError(f"{_show(name)} belongs to no declared state")


def _check_declared(
    message: Message, sends: Mapping[str, tuple[int, ...]], *, whole: bool
) -> None:
    state = {
        section_of(name)[1]: tensor
        for name, tensor in message.tensors.items()
        if section_of(name)[0] == "state"
    }
    for name, tensor in state.items():
        if name not in sends:
            raise _RefusedError(f"{_show('state/' + name)} was not asked for")
        if tuple(tensor.shape) != tuple(sends[name]):
            raise _RefusedError(
                f"{_show('state/' + name)} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(sends[name])}"
            )
    if whole and (missing := set(sends) - set(state)):
        raise _RefusedError(f"lacks {_list(missing)}, which was asked for")


def _check_statistic(message: Message) -> None:
    count = sum(tensor.numel() for tensor in message.tensors.values())
    if count > _LARGEST_STATISTIC:
        raise _RefusedError(
            f"a statistic of classes with {count} numbers; at most "
            f"{_LARGEST_STATISTIC} are allowed"
        )


def _check_entry(name: str, tensor: torch.Tensor, expectation: Expectation) -> None:
    section, entry = section_of(name)
    expected = expectation.reference.get(entry)
    if expected is None:
        if section.startswith("extra"):
            return
        raise _RefusedError(f"{_show(name)} is no shared entry of the network")
    # torch would broadcast (3,) to (4, 3) in silence.
    if tensor.shape != expected.shape:
        raise _RefusedError(
            f"{_show(name)} has shape {tuple(tensor.shape)}; expected "
            f"{tuple(expected.shape)}"
        )
    if tensor.dtype != expected.dtype:
        raise _RefusedError(
            f"{_show(name)} has dtype {tensor.dtype}; expected {expected.dtype}"
        )


_Layout = frozenset[tuple[str, tuple[int, ...], str]]


def _unlike(messages: Mapping[SiteId, Message]) -> dict[SiteId, str]:
    """Find the sites whose kind, names or shapes differ from what most sites send."""
    if len(messages) < 2:
        return {}
    if (
        len({(m.kind, id(getattr(m.tensors, "layout", m))) for m in messages.values()})
        < 2
    ):
        return {}
    layouts = {site: (m.kind, _layout(m)) for site, m in messages.items()}
    votes = Counter(layouts.values())
    # Of equals the fuller layout is right: a missing entry is the likelier fault.
    usual = max(
        votes, key=lambda key: (votes[key], len(key[1]), key[0], sorted(key[1]))
    )
    return {
        site: _difference(layout, usual)
        for site, layout in layouts.items()
        if layout != usual
    }


def _layout(message: Message) -> _Layout:
    skip = 1 if message.kind in _RAGGED_KINDS else 0
    return frozenset(
        (name, tuple(tensor.shape[skip:]), str(tensor.dtype))
        for name, tensor in message.tensors.items()
    )


def _difference(own: tuple[str, _Layout], usual: tuple[str, _Layout]) -> str:
    if own[0] != usual[0]:
        return f"a {own[0]} reply where the other sites sent {usual[0]}"
    names, usual_names = ({item[0] for item in layout[1]} for layout in (own, usual))
    if usual_names - names:
        return f"lacks {_list(usual_names - names)}, which the other sites sent"
    if names - usual_names:
        return f"holds {_list(names - usual_names)}, which no other site sent"
    odd = {item[0] for item in own[1] - usual[1]}
    return f"{_list(odd)} differ in shape or dtype from what the other sites sent"


def _outsized(
    messages: Mapping[SiteId, Message],
    expectation: Expectation,
    factor: float,
    usual: UsualNorms,
    *,
    role: str,
) -> dict[SiteId, str]:
    norms = {site: update_norms(m, expectation) for site, m in messages.items()}
    factor = factor if expectation.comparable else factor**2
    refused: dict[SiteId, str] = {}
    for section in sorted({section for own in norms.values() for section in own}):
        held = {site: own[section] for site, own in norms.items() if section in own}
        ordered = sorted(held.values())
        key = f"{role}/{section}" if role else section
        before = usual.get(key, 0.0)
        for site, norm in held.items():
            median = _median_of_others(ordered, norm)
            # All others may stand still (a fully converged or frozen network).
            is_checked = median > 0 and (expectation.comparable or before > 0)
            if is_checked and not norm <= factor * max(median, before):
                refused[site] = (
                    f"the update's norm ({section}) is {norm:.3g}, "
                    f"{norm / median:.3g} times the median of the other sites"
                    + (f" and {norm / before:.3g} times the usual" if before else "")
                    + f"; at most {factor:.3g} times is allowed"
                )
        kept = [norm for site, norm in held.items() if site not in refused]
        if kept:
            # Of two sites the smaller: one alone cannot raise what is usual.
            now = statistics.median_low(kept)
            usual[key] = max(now, _FADING**expectation.steps * before)
    for site, why in refused.items():
        logger.warning("site %s: %s", site, why)
    return refused


def _median_of_others(ordered: list[float], own: float) -> float:
    """Median of sorted numbers without one of them; 0 if there are no others."""
    count = len(ordered) - 1
    if count < 1:
        return 0.0
    gap = bisect.bisect_left(ordered, own)
    middle = [(count - 1) // 2, count // 2]
    return sum(ordered[k + (k >= gap)] for k in middle) / 2


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _list(names: set[str]) -> str:
    first = ", ".join(_show(name) for name in sorted(names)[:_NAMED_IN_REASON])
    more = len(names) - _NAMED_IN_REASON
    return f"{first} and {more} more" if more > 0 else first
