"""What of a model is shared and what a site keeps: by type of module and by part.

A parameter's role comes from the type of the module that owns it, its part is the
model's top-level submodule; the letters of its name decide nothing. (A batch norm
called `downsample.1` is found; a convolution called `bn_conv` is not taken for one.)
An adapter is found by its type too, whatever it consists of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fedmed.errors import ConfigError, StateMismatchError
from fedmed.message import State
from fedmed.networks.adapter import Adapter
from fedmed.spelling import nearest

Role = Literal["weight", "norm_affine", "norm_statistic", "counter"]
Scope = Literal["all", "shared", "kept"]

ROLE_WORDS: Mapping[str, frozenset[str]] = {
    "all": frozenset({"weight", "norm_affine", "norm_statistic", "counter"}),
    "none": frozenset(),
    "weight": frozenset({"weight"}),
    "norm": frozenset({"norm_affine", "norm_statistic", "counter"}),
    "norm_affine": frozenset({"norm_affine"}),
    "norm_statistics": frozenset({"norm_statistic", "counter"}),
}
"""What may follow "part:"; all but "weight" may also stand alone."""
ADAPTER_WORD = "adapter"
"""Adapters whole, normalisation inside of them included; stands as the words above."""

_Batch = nn.modules.batchnorm._NormBase
_Normalisations = (_Batch, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Entry:
    """One tensor of a model's state.

    Attributes:
        name: As in `state_dict()`.
        part: Top-level submodule, e.g. "encoder".
        role: "norm_affine" and "norm_statistic" belong to a normalisation layer;
            "counter" is any tensor of integers; all else is "weight".
        shape: Its shape.
        dtype: Its dtype.
        in_adapter: Whether it lies in an `Adapter`, next to its role.
        momentum: Of running statistics: the share of the batch in what one forward
            pass makes of them; None = of anything else, and of cumulative averages.
    """

    name: str
    part: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    in_adapter: bool = False
    momentum: float | None = None


@dataclass(frozen=True)
class StatePartition:
    """The names that travel and the names that stay; together the whole state.

    Attributes:
        shared: Names of the shared tensors, in the model's order.
        kept: Names of the tensors a site keeps, in the model's order.
        entries: The whole state, in the model's order.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> StatePartition.of(model, ["norm_affine"]).kept
        ('1.weight', '1.bias')
    """

    shared: tuple[str, ...]
    kept: tuple[str, ...]
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, model: nn.Module, keep: Iterable[str]) -> StatePartition:
        """Divide a model's state by the words of a study.

        Args:
            model: The model.
            keep: Words, each adding to what is kept: "none"; "all"; "norm"
                (normalisation layers whole: FedBN); "norm_statistics" (running
                statistics and counters: SiloBN); "norm_affine"; "adapter" (adapters
                whole); the name of a part, e.g. "head", or the path of any module in
                it, e.g. "encoder.levels.0"; or both as "part:word", where the word
                may also be "weight".

        Returns:
            The partition.

        Raises:
            ConfigError: Unknown word; the hint names the nearest known.
        """
        entries = describe_state(model)
        kept = set(select(entries, keep))
        return cls(
            shared=tuple(e.name for e in entries if e.name not in kept),
            kept=tuple(e.name for e in entries if e.name in kept),
            entries=entries,
        )

    def split(self, state: State) -> tuple[State, State]:
        """Divide a whole state; the tensors are the same objects.

        Returns:
            The shared and the kept state.

        Raises:
            StateMismatchError: If `state` is not a state of this model.
        """
        self.check(state)
        shared = {name: state[name] for name in self.shared}
        return shared, {name: state[name] for name in self.kept}

    def merge(self, shared: State, kept: State) -> State:
        """Put a shared and a kept state together, in the model's order.

        Raises:
            StateMismatchError: If either is not the state it should be.
        """
        self.check(shared, scope="shared")
        self.check(kept, scope="kept")
        return {e.name: (shared | kept)[e.name] for e in self.entries}

    def check(self, state: State, *, scope: Scope = "all") -> None:
        """Compare a state with the model's names, shapes and dtypes.

        Args:
            state: The state.
            scope: What it should hold: "all", "shared" or "kept".

        Raises:
            StateMismatchError: Listing what is missing, unknown or of another shape
                or dtype.
        """
        names = {"all": None, "shared": self.shared, "kept": self.kept}[scope]
        chosen = None if names is None else set(names)
        wanted = [e for e in self.entries if chosen is None or e.name in chosen]
        check_state(state, wanted)


def select(entries: tuple[Entry, ...], words: Iterable[str]) -> tuple[str, ...]:
    """Name the entries that any of the words means; words as for `StatePartition.of`.

    Raises:
        ConfigError: Unknown word; the hint names the nearest known.
    """
    chosen = [words] if isinstance(words, str) else list(words)
    tests = [_test_for(word, entries) for word in chosen]
    return tuple(e.name for e in entries if any(test(e) for test in tests))


def describe_state(model: nn.Module) -> tuple[Entry, ...]:
    """List what a model's state consists of.

    Args:
        model: Any torch model.

    Returns:
        One entry for each tensor of `state_dict()`, in its order. A parameter that
        belongs to the model itself is a part of its own.

    Raises:
        ConfigError: If the state holds something that is no tensor.
    """
    owners = dict(model.named_modules(remove_duplicate=False))
    adapters = {name for name, owner in owners.items() if isinstance(owner, Adapter)}
    entries = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(
                f"the model's state holds {name!r}, a {type(tensor).__name__}; "
                "only tensors can be exchanged",
                hint="keep extra state out of get_extra_state()",
            )
        owner = owners[name.rpartition(".")[0]]
        part = name.partition(".")[0]
        role = _role(owner, name.rpartition(".")[2], tensor.dtype)
        inside = not adapters.isdisjoint(_paths(name))
        shape = tuple(tensor.shape)
        momentum = owner.momentum if isinstance(owner, _Batch) else None
        momentum = momentum if role == "norm_statistic" else None
        entries.append(Entry(name, part, role, shape, tensor.dtype, inside, momentum))
    return tuple(entries)


def check_state(state: Mapping[str, torch.Tensor], wanted: Iterable[Entry]) -> None:
    """Compare a state with a list of entries.

    Raises:
        StateMismatchError: Listing every difference in names, shapes and dtypes.
    """
    known = {entry.name: entry for entry in wanted}
    problems = [f"missing {name}" for name in known if name not in state]
    problems += [f"unknown {name}" for name in state if name not in known]
    for name, entry in known.items():
        if name in state and tuple(state[name].shape) != entry.shape:
            seen = tuple(state[name].shape)
            problems.append(f"{name} has shape {seen}, expected {entry.shape}")
        elif name in state and state[name].dtype != entry.dtype:
            seen_dtype = state[name].dtype
            problems.append(f"{name} is {seen_dtype}, expected {entry.dtype}")
    if problems:
        raise StateMismatchError(
            f"the state does not fit the model: {shorten(problems)}",
            hint="both sides must build the network with the same options",
        )


def shorten(problems: list[str], limit: int = 20) -> str:
    """Join at most `limit` problems and say how many are left out.

    Example:
        >>> shorten(["a", "b", "c"], limit=2)
        'a; b; and 1 more'
    """
    rest = len(problems) - limit
    more = [f"and {rest} more"] if rest > 0 else []
    return "; ".join(problems[:limit] + more)


def _role(owner: nn.Module, attribute: str, dtype: torch.dtype) -> Role:
    if not (dtype.is_floating_point or dtype.is_complex):
        return "counter"
    if not isinstance(owner, _Normalisations):
        return "weight"
    return "norm_affine" if attribute in owner._parameters else "norm_statistic"


def _paths(name: str) -> tuple[str, ...]:
    """Paths of the modules around an entry, the model's own "" included.

    Example:
        >>> _paths("encoder.levels.0.weight")
        ('', 'encoder', 'encoder.levels', 'encoder.levels.0')
    """
    steps = name.split(".")[:-1]
    return ("", *itertools.accumulate(steps, "{}.{}".format))


def _test_for(word: str, entries: tuple[Entry, ...]) -> Callable[[Entry], bool]:
    if word != "weight" and (by_role := _role_test(word)):
        return by_role
    parts = {entry.part for entry in entries}
    places = parts.union(*(_paths(entry.name)[1:] for entry in entries))
    if word in places:
        return lambda entry: _lies_in(entry, word)
    place, colon, what = word.partition(":")
    by_role = _role_test(what) if colon else None
    if by_role and place in places:
        return lambda entry: _lies_in(entry, place) and by_role(entry)
    raise _unknown_word(word, parts, places)


def _role_test(word: str) -> Callable[[Entry], bool] | None:
    if word == ADAPTER_WORD:
        return lambda entry: entry.in_adapter
    if word in ROLE_WORDS:
        return lambda entry: entry.role in ROLE_WORDS[word]
    return None


def _lies_in(entry: Entry, place: str) -> bool:
    return entry.part == place or place in _paths(entry.name)


def _unknown_word(word: str, parts: set[str], places: set[str]) -> ConfigError:
    roles = [*ROLE_WORDS, ADAPTER_WORD]
    known = [role for role in roles if role != "weight"] + sorted(places)
    if ":" in word:
        known += [f"{place}:{role}" for place in sorted(places) for role in roles]
    return ConfigError(
        f"unknown word {word!r} for what a site keeps",
        hint=f"nearest is {nearest(word, known, cutoff=0.0)!r}; known are "
        f"{', '.join(roles)}, the parts {', '.join(sorted(parts))}, paths of modules "
        "in them, and part:word",
    )
