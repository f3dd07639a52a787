"""The plain train step and train round that most federated methods share.

Strategies share code by calling these functions, not by inheriting from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fedmed.message import SiteId, State
from fedmed.optimizer import OptimizerSpec, clip, memory_like, step_in_place
from fedmed.payload import Gradient, Weights
from fedmed.reduce import weighted_mean
from fedmed.replies import states_of
from fedmed.strategy import Outcome, Replies, Server, SiteContext
from fedmed.training.trainer import TrainResult, names_of_buffers, trainable

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
    return gradient_outcome(site, model, gradient, index=index, loss=loss, share=share)


def gradient_outcome(
    site: SiteContext,
    model: nn.Module,
    gradient: State,
    *,
    index: int,
    loss: float | None = None,
    share: float = 1.0,
    memory: str = OPTIMIZER,
) -> Outcome:
    """Let the shared gradient leave, and step with the rest of it here.

    Args:
        site: The hospital.
        model: The live network that the gradient is of.
        gradient: By name; of shared and of kept trainable entries.
        index: Number of the step within the round.
        loss: The site's own training loss, for the record.
        share: Factor of the gradient of kept entries.
        memory: Name of their optimiser's memory in the private value.
    """
    shared = set(site.partition.shared)
    own = {name: share * g for name, g in gradient.items() if name not in shared}
    # By their own norm: the norm over all entries of all sites is nobody's here, so
    # with a clip_norm that binds, `sync: step` is close to the pooled step, not equal.
    own = clip(own, site.trainer.clip_norm)
    moments: State = {}
    if own:
        named = trainable(model)
        moments = memory_like(site.private.states.get(memory, {}), named)
        step_in_place(named, own, optimizer_at(site, index), moments)
    payload = Gradient(
        num_examples=site.num_examples,
        values={} if loss is None else {"loss": loss},
        state={name: g for name, g in gradient.items() if name in shared},
        buffers=_shared_buffers(site, model),
    )
    return Outcome(payload, site.keep(model, **({memory: moments} if moments else {})))


def optimizer_at(site: SiteContext, index: int) -> OptimizerSpec:
    """Give the study's optimiser as it is at step number `index` of this round."""
    return site.trainer.optimizer.at(site.first_step + index)


def _shared_buffers(site: SiteContext, model: nn.Module) -> State:
    return site.shared_of(model, only=names_of_buffers(model))


def step_here(
    site: SiteContext,
    model: nn.Module,
    objective: Tensor,
    *,
    index: int,
    memory: State,
) -> None:
    """Take one step of the study's optimiser at the site, in place.

    Args:
        site: The hospital.
        model: The live network.
        objective: Scalar; what it does not depend on stands still.
        index: Number of the step within the round.
        memory: Of this optimiser, on the network's device; moved along.
    """
    gradient = site.trainer.gradient_of(model, objective)
    gradient = clip(gradient, site.trainer.clip_norm)
    named = dict(model.named_parameters())
    step_in_place(named, gradient, optimizer_at(site, index), memory)


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
    return model, train_on(
        site, model, first=first, count=count, penalty=penalty, correction=correction
    )


def train_on(
    site: SiteContext,
    model: nn.Module,
    *,
    first: int = 0,
    count: int | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    correction: State | None = None,
) -> TrainResult:
    """Run local steps on a network as it is; arguments as of `train_here`."""
    return site.trainer.train(
        model,
        site.batches(first, site.steps if count is None else count),
        memory=dict(site.private.states.get(OPTIMIZER, {})),
        penalty=penalty,
        correction=correction,
        first_step=site.first_step + first,
    )


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


def share_of(
    weights: Mapping[SiteId, float], *, total: bool = False
) -> dict[SiteId, dict[str, float]]:
    """Each site's part in the pooled loss, as per-site content of an exchange.

    Args:
        weights: By site.
        total: The pooled loss is the sum over the sites, not their mean: parts add up
            to the number of sites that have a weight.
    """
    count = num_weighted(weights) if total else 1
    whole = sum(weights[site] for site in sorted(weights))
    return {site: {"share": count * weights[site] / whole} for site in weights}


def num_weighted(weights: Mapping[SiteId, float]) -> int:
    """Count the sites that take part: those of weight above 0."""
    return sum(weight > 0 for weight in weights.values())


def present(weights: Mapping[SiteId, float], replies: Replies) -> dict[SiteId, float]:
    """Weights of the sites that answered."""
    return {site: weights[site] for site in replies}


def stepped(
    server: Server,
    replies: Replies,
    weights: Mapping[SiteId, float],
    *,
    total: bool = False,
    memory: str = OPTIMIZER,
) -> Server:
    """Average gradients, take the server's optimiser step, merge statistics.

    Args:
        server: The server before.
        replies: Gradients.
        weights: Of all sites asked.
        total: Add the gradients up over the sites that answered instead.
        memory: Name of the optimiser's memory; one for each phase of a method.
    """
    weights = present(weights, replies)
    gradient = weighted_mean(states_of(replies, "state"), weights)
    if total:
        count = num_weighted(weights)
        gradient = {name: count * g for name, g in gradient.items()}
    server = server.descend(gradient, memory=memory)
    statistics = server.merge_buffers(states_of(replies, "buffers"), weights)
    return server.with_shared(statistics)


def merged(server: Server, replies: Replies, weights: Mapping[SiteId, float]) -> Server:
    """Average weights by role: parameters by mean, statistics by total variance."""
    states = states_of(replies, "state")
    return server.with_shared(server.merge(states, present(weights, replies)))
