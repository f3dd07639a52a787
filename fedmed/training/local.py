"""The plain train step and train round that most federated methods share.

Strategies share code by calling these functions, not by inheriting from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fedmed.message import SiteId, State
from fedmed.optimizer import clip, memory_like, step_in_place
from fedmed.payload import Gradient, Weights
from fedmed.reduce import weighted_mean
from fedmed.replies import states_of
from fedmed.strategy import Outcome, Replies, Server, SiteContext

if TYPE_CHECKING:
    from fedmed.training.trainer import TrainResult

OPTIMIZER = "optimizer"
"""Name of a site's optimiser memory in its private value."""


def local_gradient(
    site: SiteContext, weights: State, index: int, share: float = 1.0
) -> Outcome:
    """Answer with the gradient of the site's loss on one batch.

    Trainable entries that the site keeps are moved here, by the study's optimiser,
    with the gradient of `share` times the loss: their part of the pooled step.

    Args:
        site: The hospital.
        weights: Shared entries.
        index: Number of the batch within the round.
        share: Weight of this site in the pooled loss; matters for kept entries only.
    """
    model = site.load(weights)
    (batch,) = site.batches(index, 1)
    gradient, loss = site.trainer.gradient(model, batch)
    return gradient_outcome(site, model, gradient, loss=loss, share=share)


def gradient_outcome(
    site: SiteContext,
    model: nn.Module,
    gradient: State,
    *,
    loss: float | None = None,
    share: float = 1.0,
) -> Outcome:
    """Let the shared gradient leave, and step with the rest of it here.

    Args:
        site: The hospital.
        model: The live network that the gradient is of.
        gradient: By name; of shared and of kept trainable entries.
        loss: The site's own training loss, for the record.
        share: Factor of the gradient of kept entries.
    """
    shared = set(site.partition.shared)
    own = {name: share * g for name, g in gradient.items() if name not in shared}
    # By their own norm: the norm over all entries of all sites is nobody's here, so
    # with a clip_norm that binds, `sync: step` is close to the pooled step, not equal.
    own = clip(own, site.trainer.clip_norm)
    memory: State = {}
    if own:
        memory = _descend_in_place(site, model, own)
    payload = Gradient(
        num_examples=site.num_examples,
        values={} if loss is None else {"loss": loss},
        state={name: g for name, g in gradient.items() if name in shared},
        buffers=_shared_buffers(site, model),
    )
    return Outcome(payload, site.keep(model, **({OPTIMIZER: memory} if memory else {})))


def _descend_in_place(site: SiteContext, model: nn.Module, gradient: State) -> State:
    named = dict(model.named_parameters())
    memory = memory_like(site.private.states.get(OPTIMIZER, {}), named)
    step_in_place(named, gradient, site.trainer.optimizer, memory)
    return memory


def _shared_buffers(site: SiteContext, model: nn.Module) -> State:
    buffers = {name for name, _ in model.named_buffers()}
    return {n: t for n, t in site.shared_of(model).items() if n in buffers}


def train_here(
    site: SiteContext,
    weights: State,
    *,
    first: int = 0,
    count: int | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    correction: State | None = None,
) -> tuple[nn.Module, TrainResult]:
    """Run local steps and give the trained network.

    Args:
        site: The hospital.
        weights: Shared entries; what the site keeps is added by it.
        first: Number of the first batch within the round.
        count: Number of steps; None = the round's.
        penalty: Added to every step's loss.
        correction: Added to every step's gradient.
    """
    model = site.load(weights)
    result = site.trainer.train(
        model,
        site.batches(first, site.steps if count is None else count),
        memory=dict(site.private.states.get(OPTIMIZER, {})),
        penalty=penalty,
        correction=correction,
    )
    return model, result


def trained_outcome(
    site: SiteContext,
    model: nn.Module,
    result: TrainResult,
    *,
    extra: Mapping[str, State] | None = None,
    keep: Mapping[str, State] | None = None,
) -> Outcome:
    """Pack trained weights into the reply, and the rest into the private value."""
    kept = dict(keep or {})
    if site.keeps_optimizer:
        kept[OPTIMIZER] = result.memory
    payload = Weights(
        num_examples=site.num_examples,
        values={"loss": result.loss, "steps": result.steps},
        state=site.shared_of(model),
        extra=extra or {},
    )
    return Outcome(payload, site.keep(model, **kept))


def local_training(
    site: SiteContext,
    weights: State,
    *,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> Outcome:
    """Answer with the shared weights after the round's local steps."""
    model, result = train_here(site, weights, penalty=penalty)
    return trained_outcome(site, model, result)


def share_of(weights: Mapping[SiteId, float]) -> dict[SiteId, dict[str, float]]:
    """Each site's normalised weight, as per-site content of an exchange."""
    total = sum(weights[site] for site in sorted(weights))
    return {site: {"share": weights[site] / total} for site in weights}


def present(weights: Mapping[SiteId, float], replies: Replies) -> dict[SiteId, float]:
    """Weights of the sites that answered."""
    return {site: weights[site] for site in replies}


def stepped(
    server: Server, replies: Replies, weights: Mapping[SiteId, float]
) -> Server:
    """Average gradients, take the server's optimiser step, merge statistics."""
    weights = present(weights, replies)
    gradient = weighted_mean(states_of(replies, "state"), weights)
    server = server.descend(gradient)
    return server.with_shared(server.merge(states_of(replies, "buffers"), weights))


def merged(server: Server, replies: Replies, weights: Mapping[SiteId, float]) -> Server:
    """Average weights by role: parameters by mean, statistics by total variance."""
    states = states_of(replies, "state")
    return server.with_shared(server.merge(states, present(weights, replies)))
