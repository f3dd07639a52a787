"""Flower's own strategies and client apps on worker processes."""

import importlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedmed.errors import FedMedError, UsageError
from fedmed.grid import WorkerGrid

sys.path.insert(0, str(Path(__file__).parent))
client = importlib.import_module("flower_client_app")
APP = "flower_client_app:app"
NODES = 5
LR = 0.1
pytestmark = pytest.mark.timeout(60)

State = dict[str, np.ndarray]


def open_grid(num_workers: int = 2, **more: Any) -> WorkerGrid:
    return WorkerGrid(APP, NODES, num_workers, **more)


@pytest.fixture
def grid() -> Iterator[WorkerGrid]:
    with open_grid() as opened:
        yield opened


def initial() -> ArrayRecord:
    torch.manual_seed(0)
    return ArrayRecord(client.Net().state_dict())


def ask(
    grid: WorkerGrid, kind: str, content: RecordDict | None = None, **more: Any
) -> list[Message]:
    content = RecordDict() if content is None else content
    messages = [Message(content, node, kind) for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, **more))


def plan(grid: WorkerGrid, how: str, *which: int) -> RecordDict:
    nodes = [list(grid.get_node_ids())[k] for k in which]
    return RecordDict({"config": ConfigRecord({"how": how, "nodes": nodes})})


def some_arrays(value: float) -> RecordDict:
    arrays = ArrayRecord({"a": Array(np.full(1000, value, np.float32))})
    return RecordDict({"arrays": arrays})


def local_step(state: State, partition: int) -> tuple[State, float, int]:
    """One step of gradient descent on the mean squared error, by hand."""
    x, y = (t.numpy().astype(np.float64) for t in client.load_data(partition, NODES))
    weight, bias = state["linear.weight"], state["linear.bias"]
    error = x @ weight.T + bias - y
    after = dict(state)
    after["linear.weight"] = weight - LR * 2 * error.T @ x / len(x)
    after["linear.bias"] = bias - LR * 2 * error.mean(0)
    return after, float((error**2).mean()), len(x)


def by_hand(state: State, rounds: int, adam: bool) -> tuple[State, list[float]]:
    losses = []
    m = {name: np.zeros_like(value) for name, value in state.items()}
    v = {name: np.zeros_like(value) for name, value in state.items()}
    for step in range(1, rounds + 1):
        replies = [local_step(state, k) for k in range(NODES)]
        total = sum(n for *_, n in replies)
        mean = {
            name: np.sum([s[name] * (n / total) for s, _, n in replies], axis=0)
            for name in state
        }
        losses.append(sum(loss * n / total for _, loss, n in replies))
        if adam:
            # Flower counts the steps of the bias correction from 2.
            rate = 0.1 * np.sqrt(1 - 0.99 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            for name in state:
                delta = mean[name] - state[name]
                m[name] = 0.9 * m[name] + 0.1 * delta
                v[name] = 0.99 * v[name] + 0.01 * delta**2
                mean[name] = state[name] + rate * m[name] / (np.sqrt(v[name]) + 1e-3)
        state = mean
    return state, losses


@pytest.mark.parametrize("adam", [False, True])
def test_strategies_of_flower_equal_numpy(grid: WorkerGrid, adam: bool) -> None:
    strategy = FedAdam() if adam else FedAvg()
    result = strategy.start(
        grid=grid,
        initial_arrays=initial(),
        num_rounds=3,
        train_config=ConfigRecord({"lr": LR}),
    )
    start = {name: array.numpy() * 1.0 for name, array in initial().items()}
    expected, losses = by_hand(start, 3, adam)
    for name, array in result.arrays.items():
        np.testing.assert_allclose(array.numpy(), expected[name], rtol=2e-4, atol=2e-6)
    seen = [result.train_metrics_clientapp[k]["train_loss"] for k in (1, 2, 3)]
    np.testing.assert_allclose(seen, losses, rtol=2e-4)
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}


def test_one_worker_and_many_give_the_same_bits() -> None:
    results = []
    for num_workers in (1, 3):
        with open_grid(num_workers) as grid:
            task = {"arrays": initial(), "config": ConfigRecord({"lr": LR})}
            replies = ask(grid, "train", RecordDict(task))
            weights = [
                [array.data for array in reply.content["arrays"].values()]
                for reply in replies
            ]
            draws = [
                reply.content["drawn"]["all"]
                for _ in range(2)
                for reply in ask(grid, "query.draw")
            ]
        results.append((weights, draws))
    assert results[0] == results[1]
    drawn = np.ravel(results[0][1])
    assert len(set(drawn)) == len(drawn) == 2 * NODES * 3


def test_nodes_know_who_they_are() -> None:
    with open_grid(
        node_config=lambda partition: {"site": f"s{partition}"},
        run_config={"local-epochs": 2},
    ) as grid:
        replies = ask(grid, "query.who")
        nodes = list(grid.get_node_ids())
    facts = [reply.content["who"] for reply in replies]
    assert [f["node"] for f in facts] == nodes
    assert [f["site"] for f in facts] == [f"s{k}" for k in range(NODES)]
    assert {f["epochs"] for f in facts} == {2}
    assert len({f["pid"] for f in facts}) == 2
    assert [r.metadata.src_node_id for r in replies] == nodes


def test_every_kind_of_record_travels(grid: WorkerGrid) -> None:
    arrays = ArrayRecord(
        {
            "z": Array(np.arange(6, dtype=np.int64).reshape(2, 3)),
            "scalar": Array(np.array(3.5)),
            "empty": Array(np.zeros((0, 3), np.float32)),
            "bool": Array(np.array([True, False])),
            "fortran": Array(np.asfortranarray(np.arange(6.0).reshape(2, 3))),
            "big": Array(np.arange(3, dtype=">f4")),
            "text": Array(np.array(["a", "bc"])),
            "foreign": Array("", (), "my.format", b"\x00\x01\xff"),
        }
    )
    config = ConfigRecord({"b": b"\x00\xff", "s": "ä", "l": [1.5, 2.5], "t": True})
    metrics = MetricRecord({"tenth": 0.1, "nan": float("nan"), "many": [1, 2]})
    sent = RecordDict({"c": config, "x": arrays, "m": metrics, "e": ArrayRecord()})
    for reply in ask(grid, "query.echo", sent):
        content = reply.content
        assert list(content) == list(sent)
        assert list(content["x"]) == list(arrays)
        assert content["c"] == config
        assert [repr(v) for v in content["m"].values()] == ["0.1", "nan", "[1, 2]"]
        for name, array in arrays.items():
            got = content["x"][name]
            assert (got.dtype, got.stype) == (array.dtype, array.stype)
            assert got.shape == array.shape
            if array.stype == "numpy.ndarray":
                np.testing.assert_array_equal(got.numpy(), array.numpy())
                assert got.numpy().dtype == array.numpy().dtype
        assert content["x"]["foreign"].data == b"\x00\x01\xff"
        # Flower's own loading of its own bytes.
        again = ArrayRecord(dict(content["x"].items()))
        np.testing.assert_array_equal(again["z"].numpy(), arrays["z"].numpy())


def test_state_stays_and_arrays_are_kept(grid: WorkerGrid) -> None:
    for number in range(4):
        replies = ask(grid, "query.count", some_arrays(number))
        for reply in replies:
            assert reply.content["count"]["messages"] == number + 1
            first = reply.content["first"]["a"].numpy()
            np.testing.assert_array_equal(first, np.zeros(1000, np.float32))


def test_replies_stay_as_they_were(grid: WorkerGrid) -> None:
    kept = [ask(grid, "query.echo", some_arrays(k))[1] for k in range(6)]
    for number, reply in enumerate(kept):
        array = reply.content["arrays"]["a"].numpy()
        np.testing.assert_array_equal(array, np.full(1000, number, np.float32))


def test_nodes_cannot_change_what_others_get(grid: WorkerGrid) -> None:
    content = some_arrays(1)
    content["config"] = ConfigRecord({"list": [1, 2]})
    for reply in ask(grid, "query.overwrite", content):
        np.testing.assert_array_equal(reply.content["arrays"]["a"].numpy(), 1)
        np.testing.assert_array_equal(reply.content["arrays"]["b"].numpy(), 2)
        assert reply.content["config"]["list"] == [1, 2, 7]
    assert dict(content["config"]) == {"list": [1, 2]}
    assert list(content["arrays"]) == ["a"]


def test_an_app_that_exits_leaves_the_state(grid: WorkerGrid) -> None:
    ask(grid, "query.count", some_arrays(0))
    replies = ask(grid, "query.misbehave", plan(grid, "exit", 1))
    assert replies[1].error.code == 2
    assert replies[1].error.reason.startswith("SystemExit: 3")
    after = ask(grid, "query.count", some_arrays(0))
    assert [r.content["count"]["messages"] for r in after] == [102, 2, 102, 102, 102]


def test_apps_may_load_data_with_processes(grid: WorkerGrid) -> None:
    node = next(iter(grid.get_node_ids()))
    (reply,) = grid.send_and_receive([Message(RecordDict(), node, "query.loader")])
    assert reply.content["m"]["total"] == 28


def test_an_error_is_a_reply_and_leaves_the_state(grid: WorkerGrid) -> None:
    ask(grid, "query.count", some_arrays(0))
    replies = ask(grid, "query.misbehave", plan(grid, "raise", 1, 3))
    assert [r.has_error() for r in replies] == [False, True, False, True, False]
    assert replies[1].error.code == 2
    assert replies[1].error.reason.startswith("ValueError: no data here (misbehave")
    assert replies[1].metadata.src_node_id == list(grid.get_node_ids())[1]
    nothing = ask(grid, "query.misbehave", plan(grid, "nothing", 0))
    assert "returned NoneType" in nothing[0].error.reason
    assert "'unknown'" in ask(grid, "query.unknown")[0].error.reason
    after = ask(grid, "query.count", some_arrays(0))
    counts = [int(r.content["count"]["messages"]) for r in after]
    assert counts == [102, 102, 202, 102, 202]
    assert after[1].content["seen"]["rounds"] == [0, 100]


def test_a_dead_process_costs_one_reply(
    grid: WorkerGrid, caplog: pytest.LogCaptureFixture
) -> None:
    ask(grid, "query.count", some_arrays(0))
    with caplog.at_level(logging.WARNING):
        replies = ask(grid, "query.misbehave", plan(grid, "die", 1))
    assert [r.has_error() for r in replies] == [False, True, False, False, False]
    assert replies[1].error.code == 8
    again = ask(grid, "query.count", some_arrays(0))
    assert not any(reply.has_error() for reply in again)
    assert "state of" in caplog.text


def test_time_is_up(grid: WorkerGrid) -> None:
    start = time.monotonic()
    replies = ask(grid, "query.misbehave", plan(grid, "hang", 0), timeout=1.0)
    assert time.monotonic() - start < 10
    assert replies[0].error.code == 4
    assert not replies[-1].has_error()
    assert not any(r.has_error() for r in ask(grid, "query.echo", some_arrays(0)))


def test_push_and_pull(grid: WorkerGrid) -> None:
    nodes = list(grid.get_node_ids())
    config = ConfigRecord({"k": 0})
    content = RecordDict({"c": config})
    messages = [
        grid.create_message(content, "query.echo", node, "g")
        for node in (nodes[0], nodes[1], nodes[0], 7)
    ]
    messages.append(Message(content, nodes[2], "query.echo", ttl=0.001))
    ids = list(grid.push_messages(messages))
    config["k"] = 1
    time.sleep(0.01)
    assert [m.metadata.message_id for m in messages] == ids
    assert len(set(ids)) == 5
    first = list(grid.pull_messages(ids[1:2]))
    rest = list(grid.pull_messages(ids))
    assert list(grid.pull_messages(ids)) == []
    assert [m.metadata.reply_to_message_id for m in first] == ids[1:2]
    assert [m.metadata.reply_to_message_id for m in rest] == [ids[0], *ids[2:]]
    assert [m.content["c"]["k"] for m in (*first, *rest[:2])] == [0, 0, 0]
    assert [m.error.code for m in rest[2:]] == [5, 4]
    assert first[0].metadata.group_id == "g"
    assert first[0].metadata.run_id == grid.run.run_id


def test_what_cannot_work_is_said_at_once() -> None:
    with pytest.raises(UsageError, match="cannot load the client app"):
        WorkerGrid("no_such_module:app", 2)
    with pytest.raises(UsageError, match="is a type, expected a ClientApp"):
        WorkerGrid("flower_client_app:Net", 2)
    with pytest.raises(UsageError, match="expected at least 1"):
        WorkerGrid(APP, 0)
    with pytest.raises(FedMedError, match="not open"):
        open_grid().push_messages([])
