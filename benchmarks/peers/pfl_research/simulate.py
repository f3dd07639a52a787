"""FedAvg in pfl-research's simulated backend, one process per worker.

`python -m torch.distributed.run --standalone --nproc-per-node 4 simulate.py W1`.
pfl averages parameters, not the running statistics of batch normalisation.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.context import LocalResultMetaData
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import get_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from benchmarks import workload


class WorkloadModel(PyTorchModel):
    """A pfl model whose local training is the workload's."""

    def __init__(self, name: str) -> None:
        module = workload.build_model(name)
        module.loss = module.metrics = lambda *_: {}  # pfl asks for both by name
        super().__init__(
            module,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
        )
        self.name, self.round_index = name, 0

    def do_multiple_epochs_of(
        self, user_dataset: Dataset, *_: Any, **__: Any
    ) -> LocalResultMetaData:
        site = int(user_dataset.user_id)
        workload.train(self.name, self.pytorch_model, site, self.round_index)
        return LocalResultMetaData(num_steps=1)


class Timer(TrainingProcessCallback):
    """Mark the end of each round, in the first process."""

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        del model
        self.rounds = workload.Rounds()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        del aggregate_metrics
        model.round_index = central_iteration + 1
        if get_ops().distributed.global_rank == 0:
            self.rounds.done()
        return False, Metrics()


def federated_dataset(name: str) -> FederatedDataset:
    """The workload's sites as pfl users, drawn as in the floor."""
    draws = itertools.chain.from_iterable(
        workload.draw_sites(name, index) for index in itertools.count()
    )
    return FederatedDataset(
        lambda site: Dataset(workload.site_data(name, site), user_id=str(site)),
        draws.__next__,
    )


def simulate(name: str, num_rounds: int) -> None:
    torch.set_num_threads(1)
    work = workload.WORKLOADS[name]
    model, timer = WorkloadModel(name), Timer()
    dataset = federated_dataset(name)
    train = NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=work.learning_rate,
        local_batch_size=work.batch_size,
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=num_rounds,
            evaluation_frequency=num_rounds + 1,
            train_cohort_size=work.num_sampled,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=dataset, val_data=dataset),
        model,
        train,
        NNEvalHyperParams(local_batch_size=None),
        [timer],
        send_metrics_to_platform=False,
    )
    if get_ops().distributed.global_rank == 0:
        timer.rounds.end(workload.probe_loss(name, model.pytorch_model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=workload.WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    simulate(arguments.workload, arguments.rounds)
