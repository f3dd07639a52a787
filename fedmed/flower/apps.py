"""The two halves that Flower loads: a site's client app and the study's server app."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flwr.app
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmed.errors import ConfigError, FedMedError
from fedmed.flower.content import (
    ACTION,
    WHO,
    from_answer,
    from_records,
    tag_of,
    to_records,
)
from fedmed.flower.grid import FlowerTransport
from fedmed.message import Answer, Message, SiteId
from fedmed.transports.failure import scrubbed
from fedmed.transports.keeper import HostKeeper
from fedmed.transports.transport import HostSpec, Transport
from fedmed.wire import WireLimits

OUTCOME_FILE = "flower-outcome.json"

Driver = Callable[[Transport, Path], object]
"""Runs a study over a transport that is not open yet, in a run folder."""


def make_client_app() -> ClientApp:
    """Make the app of one site, in a simulation or inside a hospital.

    A hospital says in its node config who it is (`site`) and where the file lies that
    says how its host is opened (`hosts`). In a simulation all nodes share the file
    named by the run config, and partition k plays the k-th site in sorted order.

    Example:
        >>> app = make_client_app()
    """
    app = ClientApp()

    def answer(
        message: flwr.app.Message, context: flwr.app.Context
    ) -> flwr.app.Message:
        reply = _answer(message.content, context)
        records = to_records(reply, tag=tag_of(message.content))
        return flwr.app.Message(records, reply_to=message)

    app.query(ACTION)(answer)
    return app


def _answer(records: flwr.app.RecordDict, context: flwr.app.Context) -> Message:
    try:
        message = from_records(records, WireLimits())
        hosts, site_id = identity(context)
        if message.kind == WHO:
            return Message(WHO, {"site": site_id})
        return from_answer(_ask_host(hosts, site_id, message))
    except Exception as error:
        return from_answer(scrubbed(error))


def _ask_host(hosts: Path, site_id: SiteId, message: Message) -> Answer:
    """Open the host, let it answer, close it.

    Flower may hand a site's next message to any process, so nothing may stay in this
    one: a host kept open here would not know what the site did elsewhere meanwhile.
    """
    keeper = HostKeeper(_spec(hosts), durable=True)
    try:
        return keeper.answer(site_id, message)
    finally:
        keeper.close()


def _spec(hosts: Path) -> HostSpec:
    content = _read_hosts(hosts)
    return HostSpec(content["factory"], content["options"], content["threads"])


@functools.cache
def _read_hosts(hosts: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(hosts.read_text())
    return content


def identity(context: flwr.app.Context) -> tuple[Path, SiteId]:
    """Say which site this node is, and where its hosts file lies.

    The server's run config is believed only by simulated nodes, which have no `site`.

    Raises:
        ConfigError: If the node config does not say it.
    """
    node = context.node_config
    if "site" in node:
        if "hosts" not in node:
            raise ConfigError(
                "the node config names a site, but no hosts file",
                hint="start the SuperNode with --node-config 'site=... hosts=...'",
            )
        return Path(str(node["hosts"])), str(node["site"])
    if "partition-id" not in node:
        raise ConfigError(
            "the node config does not say which site this is",
            hint="start the SuperNode with --node-config 'site=... hosts=...'",
        )
    hosts = Path(str(context.run_config["hosts"]))
    sites = sorted(_read_hosts(hosts)["sites"])
    return hosts, str(sites[int(node["partition-id"])])


def make_server_app(main: Driver | None = None) -> ServerApp:
    """Make the app that drives a study over Flower.

    Args:
        main: Runs the study. None: the function that the run config names as `driver`
            ("package.module:function").

    The run folder is the run config's `fedmed-run`. How it ended is written there, for
    whoever submitted the run.
    """
    app = ServerApp()

    def run(grid: Grid, context: flwr.app.Context) -> None:
        config = context.run_config
        folder = Path(str(config["fedmed-run"]))
        try:
            driver = main or named_driver(str(config["driver"]))
            transport = FlowerTransport(
                grid, join_timeout_s=float(config.get("join-timeout-s", 120.0))
            )
            with transport:
                driver(transport, folder)
        except BaseException as error:
            write_outcome(folder, error)
            raise
        write_outcome(folder, None)

    app.main()(run)
    return app


def named_driver(name: str) -> Driver:
    """Import a driver."""
    module, _, function = name.partition(":")
    driver: Driver = getattr(importlib.import_module(module), function)
    return driver


def drive_study(transport: Transport, folder: Path) -> None:
    """Run the study that lies as `study.json` in a run folder."""
    from fedmed.run import STUDY_FILE, Silence, drive
    from fedmed.runfolder import RunFolder
    from fedmed.study import study_from_dict

    study = study_from_dict(json.loads((folder / STUDY_FILE).read_text()))
    run_folder = RunFolder(folder)
    drive(
        transport,
        study,
        run_folder,
        observer=Silence(),
        should_stop=run_folder.stop_file.exists,
    )


def write_outcome(folder: Path, error: BaseException | None) -> None:
    """Leave word of how a run ended."""
    outcome: dict[str, str] = {}
    if isinstance(error, FedMedError):
        outcome = {
            "error": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
        }
    elif error is not None:
        outcome = {
            "error": "FedMedError",
            "message": f"{type(error).__name__}: {error}",
        }
    (folder / OUTCOME_FILE).write_text(json.dumps(outcome))
