"""Flower's grid over worker processes of one machine.

A `ServerApp`'s strategy and a `ClientApp` run as they are. Arrays lie in shared
memory: the weights are written once and read by all nodes, replies are read in place.
Nothing is polled, and nothing is serialised unless an app asks for bytes.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import flwr.app
from flwr.app import Error, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedmed.errors import FedMedError, UsageError
from fedmed.flower.client_host import (
    ASK,
    ERROR,
    FACTORY,
    FIRST_NODE_ID,
    METADATA,
    load_client_app,
)
from fedmed.flower.records import (
    ArraySlots,
    arrays_in,
    form_of,
    tensors_of,
    to_records,
    unpickled,
)
from fedmed.message import Answer, Message, SiteFailure, SiteId
from fedmed.transports.transport import HostSpec
from fedmed.transports.workers import WorkersTransport

logger = logging.getLogger(__name__)

Config = Mapping[str, bool | int | float | str]
"""Values of a node or a run, as Flower has them."""

CODES = {
    "died": ErrorCode.CLIENT_APP_CRASHED,
    "timeout": ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    "unreachable": ErrorCode.NODE_UNAVAILABLE,
}
"""Flower's error codes; of other failures: the client app raised."""

NO_NODE = SiteFailure("unreachable", "there is no such node")
EXPIRED = SiteFailure("timeout", "the message expired before it was delivered")


@dataclass(frozen=True)
class Question:
    """A message that was pushed, as it was then.

    Attributes:
        metadata: Of the message.
        form: Its records, but for the numbers of their arrays.
        tensors: These numbers; one object for all messages with equal arrays.
        number: Of the messages to this node, from 0.
    """

    metadata: Metadata
    form: str
    tensors: Mapping[str, Tensor]
    number: int

    @property
    def node_id(self) -> int:
        """The node that it is for."""
        return int(self.metadata.dst_node_id)

    @property
    def left_s(self) -> float:
        """How long it is still valid."""
        expires = self.metadata.created_at + self.metadata.ttl
        return float(expires) - time.time()


class WorkerGrid(Grid):  # type: ignore[misc]
    """A `flwr.serverapp.Grid` whose nodes live in worker processes of this machine.

    Use as a context manager:

        with WorkerGrid("my_app.client_app:app", num_supernodes=1000) as grid:
            result = FedAvg(fraction_train=0.1).start(
                grid=grid, initial_arrays=ArrayRecord(model.state_dict())
            )

    Args:
        client_app: "package.module:app", as in the app's pyproject.toml.
        num_supernodes: Nodes; each has its partition-id, from 0, in its node config.
        num_workers: Processes; None: one per core.
        node_config: What else stands in the node config of every node, or a function
            that gives it for a partition.
        run_config: The run config of the client app's context.
        threads: Torch threads of each process.
        seed: Of what client apps draw from the global generators of Python, NumPy and
            torch. They are seeded for each message, so that results depend neither on
            the number of workers nor on which of them plays which node.

    A node's `context.state` stays in its process. An app that raises keeps the state
    that it had before and is answered for with an error message, as is a node that
    ends its process or whose time is up. The other nodes of such a process are asked
    again (unless time is up), but the states in it are lost, which is logged: like
    SuperNodes that were restarted, they go on with an empty one.

    Replies may be kept; the arrays in them must not be written to in place other than
    through the copies that `Array.numpy()` gives.
    """

    def __init__(
        self,
        client_app: str,
        num_supernodes: int,
        num_workers: int | None = None,
        *,
        node_config: Config | Callable[[int], Config] | None = None,
        run_config: Config | None = None,
        threads: int = 1,
        seed: int = 0,
    ) -> None:
        if num_supernodes < 1:
            raise UsageError(f"num_supernodes is {num_supernodes}, expected at least 1")
        load_client_app(client_app)
        self._run = Run.create_empty(uuid.uuid4().int >> 65)
        self._run.override_config = dict(run_config or {})
        self._node_ids = range(FIRST_NODE_ID, FIRST_NODE_ID + num_supernodes)
        self._spec = HostSpec(
            FACTORY,
            {
                "client_app": client_app,
                "run_id": self._run.run_id,
                "run_config": dict(run_config or {}),
                "node_configs": _node_configs(node_config, num_supernodes),
                "seed": seed,
            },
            threads=threads,
        )
        self._transport = WorkersTransport(num_workers=num_workers)
        self._pending: dict[str, Question] = {}
        self._counts: dict[int, int] = {}
        self._with_state: set[int] = set()
        self._identity: tuple[int | None, ...] | None = None

    def __enter__(self) -> WorkerGrid:
        """Start the worker processes."""
        self._transport.open(self._spec, tuple(map(_site, self._node_ids)))
        known = TaskIdentity
        self._identity = (known._task_id, known._run_id, known._node_id)
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = self._run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the worker processes, whatever happened."""
        self.close()

    def close(self) -> None:
        """End the worker processes; may be called twice."""
        self._transport.close()
        self._pending = {}
        if self._identity is not None:
            known = TaskIdentity
            known._task_id, known._run_id, known._node_id = self._identity
            self._identity = None

    def set_run(self, run: Run) -> None:
        """Set what `run` gives; nodes keep the run that they were opened for."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: int | float | None = None,
    ) -> flwr.app.Message:
        """Make a message for a node; see Flower's `Grid`."""
        return flwr.app.Message(
            content, dst_node_id, message_type, ttl=ttl, group_id=group_id
        )

    def get_node_ids(self) -> Iterable[int]:
        """Give the ids of all nodes, in the order of their partitions."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[flwr.app.Message]) -> Iterable[str]:
        """Note messages as they are now; nodes get them when replies are asked for.

        Returns:
            An id for each, in their order.

        Raises:
            FedMedError: If the grid is not open.
        """
        if self._identity is None:
            raise FedMedError(
                "the grid is not open", hint="use it as `with WorkerGrid(...) as grid:`"
            )
        writer = _Writer()
        pushed = []
        for message in list(messages):
            metadata = message.metadata
            node_id = metadata.dst_node_id
            number = self._counts.get(node_id, 0)
            self._counts[node_id] = number + 1
            metadata.__dict__["_run_id"] = self._run.run_id
            metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            metadata.__dict__["_message_id"] = uuid.uuid4().hex
            facts = {name: getattr(metadata, name) for name in METADATA}
            form, tensors = writer.write(message.content)
            question = Question(Metadata(**facts), form, tensors, number)
            self._pending[metadata.message_id] = question
            pushed.append(metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[flwr.app.Message]:
        """Wait for the replies to these messages, and give each of them once.

        Messages are valid for as long as their time to live says.
        """
        return self._ask(self._take(message_ids), None)

    def send_and_receive(
        self,
        messages: Iterable[flwr.app.Message],
        *,
        timeout: int | float | None = None,
    ) -> Iterable[flwr.app.Message]:
        """Send messages and wait for the replies.

        Args:
            messages: To any nodes, in any order.
            timeout: Seconds; None: as long as the messages are valid.

        Returns:
            One reply or error message per message, in the order of the messages.
        """
        return self._ask(self._take(self.push_messages(messages)), timeout)

    def _take(self, message_ids: Iterable[str]) -> list[Question]:
        found = (self._pending.pop(message_id, None) for message_id in message_ids)
        return [question for question in found if question is not None]

    def _ask(
        self, questions: Sequence[Question], timeout_s: int | float | None
    ) -> list[flwr.app.Message]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        answers: dict[str, Answer] = {}
        for batch in _one_per_node(questions):
            answers |= self._ask_once(batch, deadline)
        return [
            self._read(question, answers[question.metadata.message_id])
            for question in questions
        ]

    def _ask_once(
        self, batch: Sequence[Question], deadline: float | None
    ) -> dict[str, Answer]:
        """Ask at most one question per node; give the answers by message id."""
        answers: dict[str, Answer] = {}
        asked = {}
        for question in batch:
            if question.node_id not in self._node_ids:
                answers[question.metadata.message_id] = NO_NODE
            elif question.left_s <= 0:
                answers[question.metadata.message_id] = EXPIRED
            else:
                asked[_site(question.node_id)] = question
        found = self._exchange(asked, deadline)
        died = {s: asked[s] for s, a in found.items() if _has_died(a)}
        if len(died) > 1:
            # One ended the process of all; now each is asked alone.
            found |= self._exchange(died, deadline)
        for site_id, answer in found.items():
            answers[asked[site_id].metadata.message_id] = answer
        self._note_states({asked[site].node_id: found[site] for site in found})
        return answers

    def _exchange(
        self, asked: Mapping[SiteId, Question], deadline: float | None
    ) -> dict[SiteId, Answer]:
        if not asked:
            return {}
        left_s = max(question.left_s for question in asked.values())
        if deadline is not None:
            left_s = min(left_s, deadline - time.monotonic())
        messages = {site: self._message(asked[site]) for site in asked}
        return self._transport.exchange(messages, timeout_s=max(0.0, left_s))

    def _message(self, question: Question) -> Message:
        header = {
            "form": question.form,
            "metadata": [getattr(question.metadata, name) for name in METADATA],
            "number": question.number,
            "had_state": question.node_id in self._with_state,
        }
        return Message(ASK, header, question.tensors)

    def _note_states(self, answers: Mapping[int, Answer]) -> None:
        """Note which nodes keep something, and say if that was lost."""
        lost = []
        for node_id, answer in answers.items():
            if isinstance(answer, SiteFailure):
                continue
            if answer.header["lost_state"]:
                lost.append(node_id)
            if answer.header["keeps"]:
                self._with_state.add(node_id)
            else:
                self._with_state.discard(node_id)
        if lost:
            logger.warning(
                "the state of %d nodes was lost with their process: %s",
                len(lost),
                ", ".join(map(str, lost[:10])),
            )

    def _read(self, question: Question, answer: Answer) -> flwr.app.Message:
        """Make Flower's message of an answer."""
        asked = question.metadata
        metadata = Metadata(
            run_id=asked.run_id,
            message_id=uuid.uuid4().hex,
            src_node_id=asked.dst_node_id,
            dst_node_id=asked.src_node_id,
            reply_to_message_id=asked.message_id,
            group_id=asked.group_id,
            created_at=time.time(),
            ttl=max(0.0, question.left_s),
            message_type=asked.message_type,
            src_task_id=asked.dst_task_id,
            dst_task_id=asked.src_task_id,
        )
        if isinstance(answer, SiteFailure):
            code = CODES.get(answer.reason, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
            return make_message(metadata, error=Error(code, answer.detail))
        header = answer.header
        if answer.kind == ERROR:
            return make_message(metadata, error=Error(header["code"], header["reason"]))
        metadata.created_at = header["created_at"]
        metadata.ttl = header["ttl"]
        records = to_records(unpickled(header["form"]), answer.tensors)
        return make_message(metadata, content=records)


class _Writer:
    """Writes down what many messages share only once."""

    def __init__(self) -> None:
        self._alive: list[Any] = []
        self._forms: dict[int, tuple[str, Mapping[str, Tensor]]] = {}
        self._arrays: dict[
            tuple[int, ...], tuple[list[ArraySlots], Mapping[str, Tensor]]
        ] = {}

    def write(self, content: RecordDict) -> tuple[str, Mapping[str, Tensor]]:
        """Give the form and the tensors of some records."""
        if id(content) not in self._forms:
            records = arrays_in(content)
            self._alive += [content, *records]
            key = tuple(map(id, records))
            if key not in self._arrays:
                self._arrays[key] = tensors_of(records)
            slots, tensors = self._arrays[key]
            self._forms[id(content)] = form_of(content, slots), tensors
        return self._forms[id(content)]


def _node_configs(
    config: Config | Callable[[int], Config] | None, count: int
) -> list[dict[str, bool | int | float | str]]:
    """Give what stands in each node's config."""
    found = []
    for partition in range(count):
        own = config(partition) if callable(config) else config
        found.append(
            {**(own or {}), "partition-id": partition, "num-partitions": count}
        )
    return found


def _site(node_id: int) -> SiteId:
    """Name a node's site so that names sort in the order of partitions."""
    return f"{node_id - FIRST_NODE_ID:09d}"


def _has_died(answer: Answer) -> bool:
    return isinstance(answer, SiteFailure) and answer.reason == "died"


def _one_per_node(questions: Sequence[Question]) -> list[list[Question]]:
    """Split questions so that no node is asked twice at once; order is kept."""
    batches: list[list[Question]] = []
    counts: dict[int, int] = {}
    for question in questions:
        index = counts.get(question.node_id, 0)
        counts[question.node_id] = index + 1
        if index == len(batches):
            batches.append([])
        batches[index].append(question)
    return batches
