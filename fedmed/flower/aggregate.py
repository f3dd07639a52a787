"""Any strategy of `flwr.serverapp.strategy` as the aggregator of a train round."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flwr.serverapp.strategy
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg

from fedmed.errors import ConfigError, SiteError
from fedmed.message import SiteId, State
from fedmed.spelling import nearest

logging.getLogger("flwr").setLevel(logging.WARNING)

NOT_AGGREGATORS = {
    "FedProx": "its proximal term belongs to the sites: set strategy.name: fedprox",
    "FedXgbBagging": "it adds trees, not tensors",
    "FedXgbCyclic": "it adds trees, not tensors",
}
OURS = {
    "min_train_nodes": 0,
    "min_evaluate_nodes": 0,
    "min_available_nodes": 0,
    "weighted_by_key": "num-examples",
}
"""Whom to ask and for how many to wait is the study's matter, not the strategy's."""


@dataclass(frozen=True)
class Aggregate:
    """The new model, and what the strategy must be given back next round.

    Attributes:
        state: Names, order and dtypes of the state that was aggregated.
        memory: Moments and the like, "attribute/name"; empty for strategies without
            memory (FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan,
            QFedAvg).
    """

    state: State
    memory: State = field(default_factory=dict)


@dataclass(frozen=True)
class TrainRound:
    """What a strategy aggregates.

    Attributes:
        number: The round, from 1; FedAdam's bias correction depends on it.
        initial: The state that the sites started from; FedAdam and its kin step from
            it.
        replies: Site -> its state and its weight (number of examples).
        losses: Site -> training loss; only QFedAvg asks for it.
    """

    number: int
    initial: State
    replies: Mapping[SiteId, tuple[State, float]]
    losses: Mapping[SiteId, float] | None = None


def aggregate_with_flower(
    strategy_name: str,
    options: Mapping[str, Any],
    train_round: TrainRound,
    *,
    memory: State | None = None,
) -> Aggregate:
    """Aggregate the states of a round with a strategy of Flower's.

    Replies go in sorted order of the sites. Only floating-point entries are
    aggregated; of integer entries (batch counters) the largest is taken.

    Args:
        strategy_name: A class of `flwr.serverapp.strategy`: "FedTrimmedAvg", "Krum"...
        options: Arguments of the class.
        train_round: The replies, and what they started from.
        memory: `Aggregate.memory` of the last round.

    Raises:
        ConfigError: If the class is unknown or is no aggregator, or an option is
            wrong.
        SiteError: If the strategy refuses the replies or gives nothing.

    Source:
        Flower 1.41, `flwr.serverapp.strategy`.
    """
    initial, number = train_round.initial, train_round.number
    floating = [name for name, tensor in initial.items() if tensor.is_floating_point()]
    strategy = make_strategy(strategy_name, options)
    restore(strategy, memory or {})
    start = to_arrays(initial, floating)
    list(strategy.configure_train(number, start, ConfigRecord(), NoNodes()))
    loss_key = str(options.get("train_loss_key", "train_loss"))
    try:
        replies = [
            Reply(to_records(train_round, site_id, floating, loss_key))
            for site_id in sorted(train_round.replies)
        ]
        arrays, _ = strategy.aggregate_train(number, replies)
    except (AggregationError, InconsistentMessageReplies, ArithmeticError) as error:
        raise SiteError(f"flwr:{strategy_name} refuses round {number}") from error
    if arrays is None:
        raise SiteError(f"flwr:{strategy_name} gave no model in round {number}")
    states = [state for _, (state, _) in sorted(train_round.replies.items())]
    return Aggregate(merged(initial, arrays, states), remembered(strategy))


def to_records(
    train_round: TrainRound, site_id: SiteId, names: list[str], loss_key: str
) -> RecordDict:
    """Give one site's reply as Flower's records."""
    state, weight = train_round.replies[site_id]
    for name in names:
        if name not in state or state[name].shape != train_round.initial[name].shape:
            raise SiteError(f"entry {name!r} of site {site_id} does not fit the model")
    metrics = MetricRecord({"num-examples": float(weight)})
    if train_round.losses is not None:
        metrics[loss_key] = float(train_round.losses[site_id])
    return RecordDict({"arrays": to_arrays(state, names), "metrics": metrics})


class Reply:
    """What strategies read of a reply: content, no error, and whose it is."""

    def __init__(self, content: RecordDict) -> None:
        self.content = content

    def has_error(self) -> bool:
        """Say that it is usable: the study's gate refused all others before."""
        return False


def make_strategy(name: str, options: Mapping[str, Any]) -> FedAvg:
    """Make a strategy by name.

    Raises:
        ConfigError: If there is none of that name, or it does not take the options.
    """
    if name in NOT_AGGREGATORS:
        raise ConfigError(f"flwr:{name} is no aggregator: {NOT_AGGREGATORS[name]}")
    kinds = aggregators()
    if name not in kinds:
        near = nearest(name, kinds, cutoff=0.0)
        raise ConfigError(
            f"Flower has no aggregator called {name!r}; the nearest is {near!r}",
            hint="known: " + ", ".join(kinds),
        )
    known = inspect.signature(kinds[name]).parameters
    for option in options:
        if option not in known or option in OURS:
            near = nearest(option, known, cutoff=0.0)
            raise ConfigError(
                f"flwr:{name} has no option {option!r}; the nearest is {near!r}"
            )
    return kinds[name](**{**options, **OURS})


def aggregators() -> dict[str, type[FedAvg]]:
    """Find the strategies of Flower that can aggregate a round of tensors."""
    module = flwr.serverapp.strategy
    found = {name: getattr(module, name) for name in sorted(module.__all__)}
    return {
        name: kind
        for name, kind in found.items()
        if issubclass(kind, FedAvg) and name not in NOT_AGGREGATORS
    }


class NoNodes:
    """All that `configure_train` sees of a grid: it notes the current arrays."""

    def get_node_ids(self) -> list[int]:
        """Give none."""
        return []


def to_arrays(state: State, names: list[str]) -> ArrayRecord:
    """Give the named entries as Flower's arrays; half precision as float32."""
    record = ArrayRecord()
    for name in names:
        tensor = state[name].detach().cpu()
        exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        record[name] = Array(np.ascontiguousarray(exact.numpy()))
    return record


def merged(initial: State, arrays: ArrayRecord, states: list[State]) -> State:
    """Put floating-point entries from Flower and integers from the sites together."""
    result: State = {}
    for name, before in initial.items():
        if name in arrays:
            new = torch.from_numpy(arrays[name].numpy().copy())
            result[name] = new.to(before.dtype).reshape(before.shape)
        else:
            result[name] = torch.stack([state[name] for state in states]).amax(0)
    return result


def remembered(strategy: FedAvg) -> State:
    """Collect the arrays that a strategy keeps between rounds."""
    memory: State = {}
    for attribute, value in sorted(vars(strategy).items()):
        if attribute == "current_arrays":
            continue
        arrays = value
        if isinstance(value, list):
            arrays = {f"{index:06d}": array for index, array in enumerate(value)}
        if isinstance(arrays, dict):
            for name, array in arrays.items():
                memory[f"{attribute}/{name}"] = torch.from_numpy(np.array(array))
    return memory


def restore(strategy: FedAvg, memory: State) -> None:
    """Give a fresh strategy what `remembered` collected."""
    kept: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in memory.items():
        attribute, _, key = name.partition("/")
        kept.setdefault(attribute, {})[key] = tensor.numpy().copy()
    for attribute, arrays in kept.items():
        listed = attribute == "momentum_vector"
        value = [arrays[key] for key in sorted(arrays)] if listed else arrays
        setattr(strategy, attribute, value)
