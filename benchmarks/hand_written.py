"""W2's arithmetic by hand: what is left without module, autograd and drawn batches.

Not a floor: another, smaller piece of work, shown beside W2 for scale. One process; the
batch of a site is a view of its table, the gradient of the cross-entropy is written
out, and the sum is added to in place.
"""

from __future__ import annotations

import time

import torch

from benchmarks import workload


@torch.no_grad()
def hand_written_rounds(num_rounds: int) -> list[float]:
    """Train as W2 does, and give the seconds of every round."""
    work = workload.WORKLOADS["W2"]
    torch.set_num_threads(1)
    weights = [p.detach() for p in workload.build_model("W2").parameters()]
    data = [workload.site_data("W2", site) for site in range(work.num_sites)]
    size, rate, took = work.batch_size, work.learning_rate, []
    for number in range(num_rounds):
        began = time.perf_counter()
        sites = workload.draw_sites("W2", number)
        sums = [torch.zeros_like(weight) for weight in weights]
        for site in sites:
            images, labels = data[site][0][:size], data[site][1][:size]
            _add_gradient(sums, weights, images, labels)
        # The mean of one step from the same weights is a step along the mean gradient.
        torch._foreach_add_(weights, sums, alpha=-rate / (size * len(sites)))
        took.append(time.perf_counter() - began)
    return took


def _add_gradient(
    sums: list[torch.Tensor],
    weights: list[torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    first = torch.addmm(weights[1], images, weights[0].T).relu_()
    second = torch.addmm(weights[3], first, weights[2].T).relu_()
    error = torch.addmm(weights[5], second, weights[4].T).softmax(1)
    error[torch.arange(len(labels)), labels] -= 1
    before = (error @ weights[4]).mul_(second > 0)
    earliest = (before @ weights[2]).mul_(first > 0)
    pairs = ((earliest, images), (before, first), (error, second))
    for place, (moved, inputs) in enumerate(pairs):
        sums[2 * place].addmm_(moved.T, inputs)
        sums[2 * place + 1].add_(moved.sum(0))
