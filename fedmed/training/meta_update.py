"""How a server uses the two gradients of an episode: inner step, then the update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fedmed.message import SiteId, State
from fedmed.networks.metric_network import METRIC
from fedmed.reduce import tree_sum
from fedmed.strategy import Server

UpdateMode = Literal["joint", "split"]

META_OPTIMIZER = "meta_optimizer"
METRIC_OPTIMIZER = "metric_optimizer"
"""Names of the optimisers' memories at the server."""


@dataclass(frozen=True)
class MetaUpdate:
    """How an episode moves the network, and the metric network beside it.

    Attributes:
        mode: "joint": one step along the sum of task and meta gradient. "split": a
            step along each, both gradients being of the same weights, with a memory of
            its own for each.
        tensor_clip: Largest L2 norm of any one tensor of the inner step's gradient, and
            of the meta gradient; None = unlimited.
        meta_lr_factor: Learning rate of the meta step, in units of the study's; where
            it is a step of its own.
        metric_lr_factor: The same for the metric network, which always has an
            optimiser of its own.
    """

    mode: UpdateMode = "joint"
    tensor_clip: float | int | None = None
    meta_lr_factor: float = 1.0
    metric_lr_factor: float = 1.0

    def ahead(self, server: Server, task: State, inner_lr: float) -> Server:
        r"""Take the inner step, $\theta' = \theta - \alpha\,\mathrm{clip}(g)$."""
        step = clip_each(task, self.tensor_clip)
        return server.with_shared(along(server.shared, -inner_lr, step))

    def apply(self, server: Server, task: State, meta: State | None) -> Server:
        """Move the server's weights.

        Args:
            server: At the weights of the episode's start.
            task: Gradient there.
            meta: Gradient at the weights after the inner step, of entries of `task`
                and of the metric network; None: nobody judged.
        """
        if meta is None:
            return server.descend(task)
        if self.mode == "split":
            return self.judge(server.descend(task), meta)
        network, metric = split_metric(meta)
        network = clip_each(network, self.tensor_clip)
        return self._embed(server.descend(along(task, 1.0, network)), metric)

    def judge(self, server: Server, meta: State) -> Server:
        """Move the server's weights along a meta gradient alone."""
        network, metric = split_metric(meta)
        network = clip_each(network, self.tensor_clip)
        server = self._descend(server, network, META_OPTIMIZER, self.meta_lr_factor)
        return self._embed(server, metric)

    def _embed(self, server: Server, metric: State) -> Server:
        if not metric:
            return server
        return self._descend(server, metric, METRIC_OPTIMIZER, self.metric_lr_factor)

    def _descend(
        self, server: Server, gradient: State, memory: str, factor: float
    ) -> Server:
        spec = replace(server.optimizer, lr=factor * server.optimizer.lr)
        return server.descend(gradient, optimizer=spec, memory=memory)


def along(start: State, factor: float, direction: State) -> State:
    """`start + factor * direction` on the names of `direction`, all of them `start`'s.

    Example:
        >>> along({"a": torch.ones(1), "b": torch.ones(1)}, 2.0, {"a": torch.ones(1)})
        {'a': tensor([3.]), 'b': tensor([1.])}
    """
    if not direction:
        return start
    part = {name: start[name] for name in direction}
    return {**start, **tree_sum([part, direction], [1.0, factor])}


def clip_each(gradient: State, max_norm: float | None) -> State:
    """Scale each tensor so that its own L2 norm is at most `max_norm`.

    Example:
        >>> clip_each({"a": torch.tensor([3.0, 4.0])}, 1.0)
        {'a': tensor([0.6000, 0.8000])}
    """
    if max_norm is None:
        return gradient
    found = {}
    for name, tensor in gradient.items():
        norm = float(torch.linalg.vector_norm(tensor.double()))
        found[name] = tensor * (max_norm / norm) if norm > max_norm else tensor
    return found


def split_metric(state: State) -> tuple[State, State]:
    """Divide a state into the network's entries and the metric network's."""
    start = f"{METRIC}."
    metric = {name: t for name, t in state.items() if name.startswith(start)}
    return {name: t for name, t in state.items() if name not in metric}, metric


def weighted_states(
    states: Mapping[SiteId, State], weights: Mapping[SiteId, float]
) -> dict[SiteId, State]:
    """States of the sites that have a weight, sorted."""
    return {site: states[site] for site in sorted(states) if weights[site] > 0}


def any_weighted(sites: Iterable[SiteId], weights: Mapping[SiteId, float]) -> bool:
    """Whether a site is among them that counts."""
    return any(weights[site] > 0 for site in sites)


def sum_of_parts(states: Mapping[SiteId, State]) -> State:
    """Add up states of which each holds some of the entries.

    Example:
        >>> one = torch.ones(1)
        >>> sum_of_parts({"a": {"x": one}, "b": {"x": one, "y": one}})
        {'x': tensor([2.]), 'y': tensor([1.])}
    """
    names = dict.fromkeys(name for site in sorted(states) for name in states[site])
    found: State = {}
    for name in names:
        parts = [{name: states[s][name]} for s in sorted(states) if name in states[s]]
        found |= tree_sum(parts, [1.0] * len(parts))
    return found
