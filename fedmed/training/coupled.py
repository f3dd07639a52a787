r"""Losses that couple hospitals: a small statistic out, its derivative back.

Let a loss depend on one small statistic of each hospital, $\ell(s_1, \dots, s_K)$,
with $s_k$ a function of the weights w and of hospital k's mini-batch. No hospital can
compute its gradient, and none has to:

$\nabla_w \ell = \sum_k (\partial s_k / \partial w)^\top c_k, \quad
c_k = \partial \ell / \partial s_k$.

    first half    site k:  w         -> s_k(w) on batch t        statistic_outcome
    server                              c_k = dl / ds_k          cotangents
    second half   site k:  w, c_k    -> grad(a L_k + <c_k, s_k>) cotangent_outcome
    server                              sum over k               gradient_sum

The sum is the exact gradient of $a \sum_k L_k + \ell$. Statistics and cotangents are
bytes; the price is one more exchange, and one more forward pass without gradient. Soft
confusions (UMMKD), class alignment (MASF), embeddings (SAML's smoothness) and features
before a domain discriminator are such statistics.

How to use it in a strategy:

1. Write the statistic as a function from a `Pass` (network, logits, labels, outputs of
   named layers) to a `Measured`, and wrap it: `Statistic(function, layers=...)`.
2. Ask for `statistic_outcome`; give the `state` of the replies, and the loss over all
   sites, to `cotangents`; send each site its own by `by_site=`. The loss may be over
   pairs of sites or over samples of all sites mixed. Tensors of the server's own that
   it uses (a discriminator) get their `.grad`, as from any backward pass.
3. Ask the same sites, with the same weights and number of the batch, for
   `cotangent_outcome`; `task_weight=0` leaves the task loss out (meta-test sites). Then
   `gradient_sum`, or a weighted mean where cotangents were divided by the weights.

The weights need not be `server.shared`: a meta-learner sends its theta' in both halves,
after an exchange at theta, which makes three exchanges a step.

The halves agree because both draw the same batch (a function of seed, site, round and
number), run in training mode from the same kept entries, and draw the same dropout
masks (`SiteContext.draws`). The first half leaves what the site keeps as it was, so
running statistics move once, in the second.

A site that answers the first half and is lost before the second: the cotangents of the
others stand, in which its statistic acts as a constant; its own half of the coupling,
and its task loss, are missing from this step's sum. Nothing is scaled up. A site that
is lost before it answers the first half is in no term.

Exact only with one optimiser step per exchange. With many local steps between two
exchanges the others' statistics are constants that the server remembers, see
`fedmed.training.statistic_bank`; `coupled_training` adds a loss against them to every
local step, and `trained_outcome_with` sends a fresh statistic with the weights.

Source:
    The chain rule. In a federation: split learning, Vepakomma et al., 2018,
    arXiv:1812.00564; here the loss is split, not the network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.errors import StateMismatchError
from fedmed.message import SiteId, State
from fedmed.payload import (
    CLASS_STATISTIC,
    ClassStatistic,
    Embedding,
    Weights,
    expect,
)
from fedmed.reduce import tree_sum
from fedmed.replies import states_of
from fedmed.strategy import Outcome, Replies, SiteContext
from fedmed.training.local import OPTIMIZER, gradient_outcome, trained_outcome
from fedmed.training.trainer import Trainer, TrainResult


@dataclass(frozen=True)
class Pass:
    """One forward pass of a site's batch, as a statistic sees it.

    Attributes:
        model: The network, for heads that are applied to a statistic.
        logits: (B, L, ...), differentiable.
        labels: (B, ...).
        outputs: What the layers that the statistic named gave, by name; what came into
            them is under "name/input".
    """

    model: nn.Module
    logits: Tensor
    labels: Tensor
    outputs: Mapping[str, Any] = field(default_factory=dict)


NOTHING_TOLD = 2**31 - 1
"""`min_count` of a statistic without a row: no row of it has fewer behind it."""


@dataclass(frozen=True)
class Measured:
    """What a statistic is on one batch.

    Attributes:
        values: Differentiable tensors.
        facts: Tensors that the server needs beside them: which rows are present,
            labels of embeddings. Names are not those of `values`.
        min_count: The smallest number of voxels or cases behind any row that is told.
    """

    values: State
    facts: State = field(default_factory=dict)
    min_count: int = 0


@dataclass(frozen=True)
class Statistic:
    """A small differentiable function of a batch.

    Attributes:
        compute: From a forward pass to the statistic.
        layers: Modules of the network, by their dotted names, whose outputs it needs.
    """

    compute: Callable[[Pass], Measured]
    layers: tuple[str, ...] = ()


def statistic_outcome(
    site: SiteContext,
    weights: State,
    index: int,
    statistic: Statistic,
    *,
    kind: type[ClassStatistic] | type[Embedding] = ClassStatistic,
) -> Outcome:
    """First half: answer with the statistic of one batch.

    Args:
        site: The hospital; what it keeps stays as it is.
        weights: Shared entries.
        index: Number of the batch within the round.
        statistic: What to compute.
        kind: `Embedding` for vectors of single examples, which a policy may refuse.
    """
    with torch.no_grad():
        _, measured = _measure(site, weights, index, statistic)
    told = {**measured.values, **measured.facts}
    state = {name: tensor.detach().cpu() for name, tensor in told.items()}
    return Outcome(kind(site.num_examples, state=state, min_count=measured.min_count))


def cotangents(
    statistics: Mapping[SiteId, State],
    loss: Callable[[Mapping[SiteId, State]], Tensor],
    *,
    names: Iterable[str],
) -> tuple[float, dict[SiteId, State]]:
    r"""Differentiate a loss over all sites with respect to each site's statistic.

    Args:
        statistics: By site, as they came.
        loss: From the statistics, in float64, to a scalar.
        names: The differentiable ones; the others (facts) are constants.

    Returns:
        The loss, and $\partial \ell / \partial s_k$ by site, in the statistics' dtype;
        zeros where the loss does not depend on one.

    Example:
        >>> told = {"a": {"s": torch.tensor([1.0])}, "b": {"s": torch.tensor([3.0])}}
        >>> def apart(s):
        ...     return (s["a"]["s"] - s["b"]["s"]).square().sum()
        >>> cotangents(told, apart, names=["s"])
        (4.0, {'a': {'s': tensor([-4.])}, 'b': {'s': tensor([4.])}})
    """
    wanted = tuple(names)
    leaves = {
        site: {name: _in_float64(t.detach()).clone() for name, t in state.items()}
        for site, state in sorted(statistics.items())
    }
    for state in leaves.values():
        for name in wanted:
            state[name].requires_grad_()
    with torch.enable_grad():
        value = loss(leaves)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
    found = {
        site: {
            name: _gradient_of(state[name]).to(statistics[site][name].dtype)
            for name in wanted
        }
        for site, state in leaves.items()
    }
    return float(value.detach()), found


def cotangent_outcome(
    site: SiteContext,
    weights: State,
    index: int,
    statistic: Statistic,
    cotangent: State,
    *,
    task_weight: float = 1.0,
    share: float = 1.0,
) -> Outcome:
    r"""Second half: answer with $\nabla (a L_k + \langle c_k, s_k \rangle)$.

    The shared gradient leaves; trainable entries that the site keeps take their step
    here, and running statistics move.

    Args:
        site: The hospital.
        weights: Shared entries, index and statistic as in the first half.
        index: Number of the batch within the round.
        statistic: What was computed.
        cotangent: $c_k$, names and shapes of the statistic's `values`.
        task_weight: a, the factor of the site's own loss; 0 leaves it out.
        share: Factor of the gradient of kept entries, for strategies that divide the
            cotangent by the site's weight and average on the server.

    Raises:
        StateMismatchError: If the cotangent is not one of the statistic.
    """
    passed, measured = _measure(site, weights, index, statistic)
    _check_cotangent(cotangent, measured.values)
    task = site.trainer.loss(passed.logits, passed.labels)
    loss = float(task.detach())
    site.trainer.require_finite(loss)
    objective = _inner_product(cotangent, measured.values)
    if task_weight:
        objective = task_weight * task + objective
    gradient = site.trainer.gradient_of(passed.model, objective)
    return gradient_outcome(
        site, passed.model, gradient, index=index, loss=loss, share=share
    )


def gradient_sum(replies: Replies) -> State:
    """Add up the gradients of all sites that answered, each with weight 1.

    Args:
        replies: At least one, to the second half.
    """
    states = states_of(replies, "state")
    return tree_sum([states[site] for site in sorted(states)], [1.0] * len(states))


def coupled_training(
    site: SiteContext,
    weights: State,
    coupling: Callable[[Tensor, Tensor], Tensor | None],
) -> tuple[nn.Module, TrainResult]:
    """Run the round's local steps with a second loss that sees logits and labels.

    Args:
        site: The hospital.
        weights: Shared entries.
        coupling: From logits and labels of a step to what is added to its loss; None =
            nothing. The loss of the record includes it.
    """
    task = site.trainer.loss

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        own, more = task(logits, labels), coupling(logits, labels)
        return own if more is None else own + more

    model = site.load(weights)
    result = replace(site.trainer, loss=loss).train(
        model,
        site.batches(0, site.steps),
        memory=dict(site.private.states.get(OPTIMIZER, {})),
        first_step=site.first_step,
    )
    return model, result


def trained_outcome_with(
    site: SiteContext, model: nn.Module, result: TrainResult, measured: Measured
) -> Outcome:
    """Pack trained weights and a statistic of classes into one reply.

    The site's policy checks it as both: see `fedmed.payload.kinds_in`.
    """
    told = {**measured.values, **measured.facts}
    state = {name: tensor.detach().cpu() for name, tensor in told.items()}
    outcome = trained_outcome(site, model, result, extra={CLASS_STATISTIC: state})
    payload = replace(expect(outcome.payload, Weights), min_count=measured.min_count)
    return replace(outcome, payload=payload)


TOLD_WITH = f"extra/{CLASS_STATISTIC}"
"""Section of a reply that holds a statistic which came with weights."""


def told_with(replies: Replies) -> Mapping[SiteId, State]:
    """Statistics that came with weights, by site."""
    return states_of(replies, TOLD_WITH)


def _measure(
    site: SiteContext, weights: State, index: int, statistic: Statistic
) -> tuple[Pass, Measured]:
    """Run one batch forward, with the draws that both halves share."""
    model = site.load(weights)
    (batch,) = site.batches(index, 1)
    trainer = noting_trainer(site, statistic.layers)
    with site.draws("coupled", index), captured(model, statistic.layers) as outputs:
        logits, labels = trainer.logits(model, batch)
        passed = Pass(model, logits, labels, outputs)
        return passed, statistic.compute(passed)


def noting_trainer(site: SiteContext, layers: tuple[str, ...]) -> Trainer:
    """The site's trainer, which does not run a compiled network past `captured`.

    A network that was compiled before calls no hook that came later.
    """
    return replace(site.trainer, compiled=None) if layers else site.trainer


@contextlib.contextmanager
def captured(model: nn.Module, layers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Note what some layers give, and what comes into them, during forward passes."""
    outputs: dict[str, Any] = {}

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            del module
            outputs[name] = output
            outputs[f"{name}/input"] = inputs[0] if inputs else None

        return note

    handles = [
        model.get_submodule(name).register_forward_hook(noting(name)) for name in layers
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _check_cotangent(cotangent: State, values: State) -> None:
    seen, expected = (
        {name: tuple(tensor.shape) for name, tensor in state.items()}
        for state in (cotangent, values)
    )
    if seen != expected:
        raise StateMismatchError(
            f"a cotangent of {seen} came for a statistic of {expected}",
            hint="Both halves of an exchange must use the same statistic.",
        )


def _inner_product(cotangent: State, values: State) -> Tensor:
    terms = [(cotangent[name].to(values[name]) * values[name]).sum() for name in values]
    if not terms:
        return torch.zeros(())
    return torch.stack([term.reshape(()) for term in terms]).sum()


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
