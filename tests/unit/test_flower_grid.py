"""The Flower transport over a grid whose post is late, doubled, wrong or lost."""

from collections.abc import Callable, Iterable
from typing import Any

import flwr.app
import pytest
import torch
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedmed.errors import FedMedError, SiteError
from fedmed.flower.content import (
    WHO,
    from_answer,
    from_records,
    tag_of,
    to_answer,
    to_records,
)
from fedmed.flower.grid import FlowerTransport
from fedmed.message import Message, SiteFailure
from fedmed.transports.transport import HostSpec
from fedmed.wire import WireLimits

SPEC = HostSpec("unused", {})
NODES = {11: "b", 22: "a"}


Spoil = Callable[[int, flwr.app.Message, flwr.app.Message], list[flwr.app.Message]]


def deliver(
    node: int, asked: flwr.app.Message, reply: flwr.app.Message
) -> list[flwr.app.Message]:
    return [reply]


class Post(Grid):  # type: ignore[misc]  # flwr is untyped here
    """Carries messages to nodes that answer at once, unless `spoil` meddles."""

    def __init__(self) -> None:
        self.names = dict(NODES)
        self.spoil: Spoil = deliver
        self.sent = 0
        self.waiting: list[flwr.app.Message] = []

    def get_node_ids(self) -> list[int]:
        return list(self.names)

    def push_messages(self, messages: Iterable[flwr.app.Message]) -> list[str]:
        ids = []
        for message in messages:
            self.sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self.sent}"
            ids.append(f"m{self.sent}")
            node = message.metadata.dst_node_id
            self.waiting += self.spoil(node, message, self._answer(message))
        return ids

    def _answer(self, message: flwr.app.Message) -> flwr.app.Message:
        node = message.metadata.dst_node_id
        asked = from_records(message.content, WireLimits())
        answer = Message(WHO, {"site": self.names[node]})
        if asked.kind != WHO:
            answer = Message("done", {"node": node}, {"x": asked.tensors["x"] * node})
        records = to_records(answer, tag=tag_of(message.content))
        return flwr.app.Message(records, reply_to=message)

    def pull_messages(
        self,
        message_ids: Iterable[str],  # noqa: ARG002 -- Flower names it
    ) -> list[flwr.app.Message]:
        given, self.waiting = self.waiting, []
        return given

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError


def fail_with(code: int, text: str = "/data/DOE_JANE") -> Spoil:
    def spoil(
        node: int, asked: flwr.app.Message, reply: flwr.app.Message
    ) -> list[flwr.app.Message]:
        return [flwr.app.Message(Error(code, text), reply_to=asked)]

    return spoil


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Post:
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    return Post()


@pytest.fixture
def transport(post: Post) -> FlowerTransport:
    opened = FlowerTransport(post, join_timeout_s=1.0)
    opened.open(SPEC, ("a", "b"))
    return opened


def ask(transport: FlowerTransport) -> dict[str, Message | SiteFailure]:
    message = Message("x", {}, {"x": torch.tensor([1.0])})
    return transport.exchange({"b": message, "a": message}, timeout_s=0.05)


def reason(answer: Message | SiteFailure) -> str:
    return answer.reason if isinstance(answer, SiteFailure) else "ok"


def test_answers_are_matched_by_message_and_sorted_by_site(
    transport: FlowerTransport, post: Post
) -> None:
    answers = ask(transport)
    assert list(answers) == ["a", "b"]
    nodes = [a.header["node"] for a in answers.values() if isinstance(a, Message)]
    assert nodes == [22, 11]


def test_late_and_doubled_replies_are_dropped(
    transport: FlowerTransport, post: Post
) -> None:
    late: list[flwr.app.Message] = []

    def delay(
        node: int, asked: flwr.app.Message, reply: flwr.app.Message
    ) -> list[flwr.app.Message]:
        if node != 11:
            return [reply]
        late.append(reply)
        return []

    post.spoil = delay
    answers = ask(transport)
    assert {s: reason(a) for s, a in answers.items()} == {"a": "ok", "b": "timeout"}
    post.spoil = lambda _node, _asked, reply: [*late, reply, reply]
    assert {s: reason(a) for s, a in ask(transport).items()} == {"a": "ok", "b": "ok"}


def test_reply_with_the_tag_of_another_exchange_is_refused(
    transport: FlowerTransport, post: Post
) -> None:
    old: list[flwr.app.RecordDict] = []

    def replay(
        node: int, asked: flwr.app.Message, reply: flwr.app.Message
    ) -> list[flwr.app.Message]:
        old.append(reply.content)
        return [flwr.app.Message(old[0], reply_to=asked)]

    post.spoil = replay
    first, second = ask(transport), ask(transport)
    assert reason(first["b"]) == "ok"
    assert {reason(answer) for answer in second.values()} == {"wire"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, "raised"), (2, "raised"), (4, "timeout"), (5, "unreachable"), (8, "died")],
)
def test_error_replies_name_the_reason_and_no_patient(
    transport: FlowerTransport, post: Post, code: int, expected: str
) -> None:
    post.spoil = fail_with(code)
    answers = ask(transport)
    assert {reason(a) for a in answers.values()} == {expected}
    assert "DOE_JANE" not in str(answers)


def test_dead_actor_of_the_simulation_stops_the_run(
    transport: FlowerTransport, post: Post
) -> None:
    post.spoil = fail_with(0, "<class 'ray.exceptions.ActorDiedError'>")
    assert {reason(a) for a in ask(transport).values()} == {"died"}
    with pytest.raises(FedMedError, match="cannot replace it"):
        ask(transport)


def test_damaged_bytes_are_refused(transport: FlowerTransport, post: Post) -> None:
    def damage(
        node: int, asked: flwr.app.Message, reply: flwr.app.Message
    ) -> list[flwr.app.Message]:
        array = reply.content.array_records["content"]["message"]
        array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])
        return [reply]

    post.spoil = damage
    assert {reason(a) for a in ask(transport).values()} == {"wire"}


def test_missing_sites_are_named(post: Post) -> None:
    transport = FlowerTransport(post, join_timeout_s=0.1)
    with pytest.raises(SiteError, match="not connected after 0 s: c, d"):
        transport.open(SPEC, ("a", "b", "c", "d"))


def test_two_nodes_may_not_be_one_site(post: Post) -> None:
    post.names[33] = "a"
    with pytest.raises(SiteError, match="two nodes claim to be site a"):
        FlowerTransport(post, join_timeout_s=1.0).open(SPEC, ("a", "b"))


def test_stranger_stands_aside(post: Post) -> None:
    post.names[33] = "zoo"
    transport = FlowerTransport(post, join_timeout_s=1.0)
    transport.open(SPEC, ("a", "b"))
    assert list(ask(transport)) == ["a", "b"]


def test_failure_travels_as_a_message() -> None:
    failure = SiteFailure("refused", "kind Weights is not allowed here", fatal=True)
    records = to_records(from_answer(failure), tag="t")
    assert to_answer(from_records(records, WireLimits())) == failure
