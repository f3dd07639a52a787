"""FedAvg in Flower's own simulation, the Ray backend with four actors of one CPU."""

from __future__ import annotations

import argparse
import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks import workload


def client_app(name: str) -> ClientApp:
    """A client as in Flower's PyTorch quickstart."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        model = workload.build_model(name)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        site = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"]) - 1
        loss, num_examples = workload.train(name, model, site, number)
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"loss": loss, "num-examples": num_examples}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def server_app(name: str, num_rounds: int) -> ServerApp:
    """A server as in Flower's PyTorch quickstart, with a clock at each round's end."""
    app = ServerApp()
    work = workload.WORKLOADS[name]

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        model = workload.build_model(name)
        strategy = FedAvg(
            fraction_train=work.num_sampled / work.num_sites,
            fraction_evaluate=0.0,
            min_available_nodes=work.num_sites,
        )
        clocks: list[workload.Rounds] = []
        while len(list(grid.get_node_ids())) < work.num_sites:
            time.sleep(0.05)  # a strategy draws from those that have connected

        def mark(server_round: int, arrays: ArrayRecord) -> None:
            del arrays
            if server_round == 0:
                clocks.append(workload.Rounds())
            else:
                clocks[0].done()

        result = strategy.start(
            grid, ArrayRecord(model.state_dict()), num_rounds, evaluate_fn=mark
        )
        model.load_state_dict(result.arrays.to_torch_state_dict())
        clocks[0].end(workload.probe_loss(name, model))

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=workload.WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run_simulation(
        server_app=server_app(arguments.workload, arguments.rounds),
        client_app=client_app(arguments.workload),
        num_supernodes=workload.WORKLOADS[arguments.workload].num_sites,
        backend_config={
            "init_args": {"num_cpus": workload.NUM_WORKERS},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
