"""One Flower client node inside a worker process.

It keeps the node's `Context`, hands messages to an unmodified `ClientApp` and gives
its replies back; see `fedmed.flower.worker_grid` for the other end.
"""

from __future__ import annotations

import importlib
import multiprocessing
import random
import traceback
import weakref
from collections.abc import Mapping
from typing import Any

import flwr.app
import numpy as np
import torch
from flwr.app import Context, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedmed.errors import UsageError
from fedmed.flower.records import (
    arrays_in,
    form_of,
    tensors_of,
    to_records,
    unpickled_once,
)
from fedmed.flower.shared_array import SharedArray
from fedmed.message import Message, SiteId
from fedmed.seeds import derive

FACTORY = "fedmed.flower.client_host:open_node"

ASK = "flower.ask"
REPLY = "flower.reply"
ERROR = "flower.error"
"""Kinds of messages: down, up, and up if the app failed."""

RAISED = 2
"""Flower's code for a client app that raised."""

FIRST_NODE_ID = 1001
"""Of the node that has partition 0; Flower's own server is node 1."""

METADATA = (
    "run_id",
    "message_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "created_at",
    "ttl",
    "message_type",
    "src_task_id",
    "dst_task_id",
)
"""What travels of a message's metadata, as Flower names it."""


class ClientNode:
    """One node: its context stays here between messages.

    Args:
        partition: Its number, from 0.
        options: `client_app`, `run_id`, `run_config`, `node_configs` (by partition)
            and `seed`; `common` holds the app, loaded once per process.
    """

    def __init__(self, partition: int, options: Mapping[str, Any]) -> None:
        common = options["common"]
        if "client_app" not in common:
            common["client_app"] = load_client_app(options["client_app"])
        self._app: ClientApp = common["client_app"]
        self._seed: int = options["seed"]
        self._is_new = True
        self.context = Context(
            run_id=options["run_id"],
            node_id=FIRST_NODE_ID + partition,
            node_config=dict(options["node_configs"][partition]),
            state=RecordDict(),
            run_config=dict(options["run_config"]),
        )

    def handle(self, message: Message) -> Message:
        """Let the client app answer; what it raises becomes an error reply."""
        lost = self._is_new and bool(message.header["had_state"])
        self._is_new = False
        arrays: list[weakref.ref[SharedArray]] = []
        kind, header, tensors = self._answer(message, arrays)
        # The memory that arrays came in will hold others in the next round.
        for reference in arrays:
            array = reference()
            if array is not None:
                array.own()
        has_state = bool(self.context.state)
        header |= {"keeps": has_state, "lost_state": lost}
        return Message(kind, header, tensors)

    def _answer(
        self, message: Message, arrays: list[weakref.ref[SharedArray]]
    ) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
        before = copied(self.context.state)
        try:
            incoming = _incoming(message)
            for record in arrays_in(incoming.content):
                arrays += [
                    weakref.ref(array)
                    for array in record.values()
                    if isinstance(array, SharedArray)
                ]
            self._prepare(message)
            return _outgoing(self._app(incoming, self.context))
        except (Exception, SystemExit) as error:
            self.context.state = before
            return ERROR, {"code": RAISED, "reason": described(error)}, {}

    def _prepare(self, message: Message) -> None:
        """Seed what apps draw from, alike in whichever process this node is."""
        TaskIdentity.run_id = self.context.run_id
        TaskIdentity.node_id = self.context.node_id
        purpose = "client app", self.context.node_id, int(message.header["number"])
        seed = derive(self._seed, *purpose)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        # `torch.manual_seed` writes down a stack for each kind of device that is not in
        # use: a tenth of a millisecond per message.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)

    def close(self) -> None:
        """Nothing to release."""


def open_node(site_id: SiteId, options: Mapping[str, Any]) -> ClientNode:
    """Open a node; its site id is its partition."""
    # Apps load their data with processes of their own, which Python forbids to those
    # that it would end by itself; a worker ends when its pipe does.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return ClientNode(int(site_id), options)


def load_client_app(name: str) -> ClientApp:
    """Import a client app.

    Args:
        name: "package.module:app", as in the `[tool.flwr.app.components]` of an app.

    Raises:
        UsageError: If there is no such app.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UsageError(
            f"client_app is {name!r}",
            hint='expected "package.module:app", as in pyproject.toml',
        )
    try:
        app = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot load the client app {name!r}: {error}") from error
    if not isinstance(app, ClientApp):
        raise UsageError(f"{name!r} is a {type(app).__name__}, expected a ClientApp")
    return app


def copied(state: RecordDict) -> RecordDict:
    """Copy the records of a state and the lists in them, but not the arrays."""
    copy = RecordDict()
    for name, record in state.items():
        copy[name] = record.copy()
        for key, value in record.items():
            if isinstance(value, list):
                copy[name][key] = value[:]
    return copy


def described(error: BaseException) -> str:
    """Say what was raised and where. Nothing of it leaves this machine.

    Example:
        >>> described(ValueError("no data"))
        'ValueError: no data'
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _incoming(message: Message) -> flwr.app.Message:
    facts = dict(zip(METADATA, message.header["metadata"], strict=True))
    content = to_records(unpickled_once(message.header["form"]), message.tensors)
    return make_message(Metadata(**facts), content=content)


def _outgoing(reply: Any) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    if not isinstance(reply, flwr.app.Message):
        raise TypeError(f"the client app returned {type(reply).__name__}, no Message")
    if reply.has_error():
        reason = reply.error.reason or ""
        return ERROR, {"code": int(reply.error.code), "reason": reason}, {}
    slots, tensors = tensors_of(arrays_in(reply.content))
    header = {
        "form": form_of(reply.content, slots),
        "created_at": reply.metadata.created_at,
        "ttl": reply.metadata.ttl,
    }
    return REPLY, header, tensors
