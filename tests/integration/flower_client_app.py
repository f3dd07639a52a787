"""A client app as Flower's PyTorch quickstart writes them; it knows of no fedmed."""

import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

app = ClientApp()
started: list[int] = []
kept: list[Array] = []


class Net(torch.nn.Module):
    """A linear layer with what a real network's state has: a running mean, a count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def load_data(partition: int, num_partitions: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(partition)
    count = 4 + partition % num_partitions
    x = rng.standard_normal((count, 3)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(x.sum(1, keepdims=True) + 1)


def data_of(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    config = context.node_config
    return load_data(int(config["partition-id"]), int(config["num-partitions"]))


@app.lifespan()
def lifespan(context: Context) -> Iterator[None]:
    started.append(context.node_id)
    yield


@app.train()
def train(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = data_of(context)
    optimizer = torch.optim.SGD(model.parameters(), lr=msg.content["config"]["lr"])
    for _ in range(int(context.run_config.get("local-epochs", 1))):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord(
                {"train_loss": loss.item(), "num-examples": len(x)}
            ),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = data_of(context)
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(model(x), y).item()
    metrics = MetricRecord({"eval_loss": loss, "num-examples": len(x)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


@app.query("count")
def count(msg: Message, context: Context) -> Message:
    """Count own messages, and remember the first array as it was sent."""
    state = context.state
    if "count" not in state:
        state["count"] = MetricRecord({"messages": 0})
        state["seen"] = MetricRecord({"rounds": [0]})
        state["first"] = msg.content["arrays"]
        kept.append(msg.content["arrays"]["a"])
    state["count"]["messages"] += 1
    return Message(RecordDict(dict(state.items())), reply_to=msg)


@app.query("echo")
def echo(msg: Message, context: Context) -> Message:
    return Message(msg.content, reply_to=msg)


@app.query("draw")
def draw(msg: Message, context: Context) -> Message:
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002
    return Message(RecordDict({"drawn": MetricRecord({"all": drawn})}), reply_to=msg)


@app.query("who")
def who(msg: Message, context: Context) -> Message:
    facts = {
        "node": context.node_id,
        "pid": os.getpid(),
        "site": context.node_config["site"],
        "epochs": context.run_config["local-epochs"],
    }
    return Message(RecordDict({"who": ConfigRecord(facts)}), reply_to=msg)


@app.query("overwrite")
def overwrite(msg: Message, context: Context) -> Message:
    """Write to everything that looks like one's own."""
    array = msg.content["arrays"]["a"].numpy()
    array += 1
    msg.content["config"]["extra"] = 1
    msg.content["config"]["list"].append(7)
    msg.content["arrays"]["b"] = Array(array)
    return Message(msg.content, reply_to=msg)


@app.query("loader")
def loader(msg: Message, context: Context) -> Message:
    """Load data with processes of its own."""
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    batches = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1)
    total = sum(float(batch.sum()) for (batch,) in batches)
    return Message(RecordDict({"m": MetricRecord({"total": total})}), reply_to=msg)


@app.query("misbehave")
def misbehave(msg: Message, context: Context) -> Any:
    plan = msg.content["config"]
    if "count" in context.state:
        context.state["count"]["messages"] += 100
        context.state["seen"]["rounds"].append(100)
    if context.node_id in plan["nodes"]:
        if plan["how"] == "raise":
            raise ValueError("no data here")
        if plan["how"] == "exit":
            raise SystemExit(3)
        if plan["how"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan["how"] == "hang":
            time.sleep(60)
        return None
    return Message(RecordDict(), reply_to=msg)
