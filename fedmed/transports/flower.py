"""Run a study under Flower: a simulation, or a deployment on this machine.

Both start a SuperLink of their own on the loopback interface, submit a run with
`flwr run` and end every process afterwards. The run's two halves are
`fedmed.flower.apps`; flwr itself is imported only there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import fedmed.errors
from fedmed.errors import FedMedError
from fedmed.flower.credentials import Credentials, make_credentials
from fedmed.flower.processes import (
    ProcessGroup,
    free_port,
    process_group,
    wait_until_listening,
)
from fedmed.message import SiteId
from fedmed.transports.transport import HostSpec

logger = logging.getLogger(__name__)

DRIVE_STUDY = "fedmed.flower.apps:drive_study"
START_S = 60.0
LOGS = "flower-logs"
OUTCOME_FILE = "flower-outcome.json"

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No telemetry, no look for updates, nothing installed behind one's back."""

PYPROJECT = """\
[project]
name = "fedmed-launcher"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedmed"
fab-include = ["fedmed_launcher/*.py"]

[tool.flwr.app.components]
serverapp = "fedmed_launcher.server_app:app"
clientapp = "fedmed_launcher.client_app:app"

[tool.flwr.app.config]
fedmed-run = ""
driver = ""
hosts = ""
join-timeout-s = 120.0
"""
CLIENT_APP = (
    "from fedmed.flower.apps import make_client_app\n\napp = make_client_app()\n"
)
SERVER_APP = (
    "from fedmed.flower.apps import make_server_app\n\napp = make_server_app()\n"
)
FLOWER_CONFIG = """\
[superlink]
default = "fedmed"

[superlink.fedmed]
address = "127.0.0.1:{port}"
{security}
"""


@dataclass(frozen=True)
class Workplace:
    """A temporary Flower home with the app to submit and the hosts file."""

    home: Path
    port: int
    group: ProcessGroup
    credentials: Credentials | None = None

    @property
    def hosts(self) -> Path:
        """How every host of this machine is opened."""
        return self.home / "hosts.json"

    @property
    def app(self) -> Path:
        """The app that `flwr run` submits."""
        return self.home / "app"


def run_simulation(
    folder: Path,
    spec: HostSpec,
    site_ids: tuple[SiteId, ...],
    *,
    driver: str = DRIVE_STUDY,
    num_workers: int | None = None,
) -> None:
    """Run a study under Flower's own simulation: Ray actors that play all sites.

    Flower hands each message to any free actor, so that hosts are opened for every
    message and their state goes through files. `--transport ray` has none of this.

    Args:
        folder: The run folder.
        spec: How to open a host.
        site_ids: Partition k of the simulation plays the k-th of these, sorted.
        driver: The server's half, "package.module:function", called with the
            transport and the folder.
        num_workers: Ray actors; None: one per core, never more than sites.

    Raises:
        FedMedError: If Flower cannot be started, or what the driver raised.
    """
    workers = min(num_workers or os.cpu_count() or 1, len(site_ids))
    federation = {
        "num-supernodes": len(site_ids),
        "client-resources-num-cpus": 1,
        "client-resources-num-gpus": 0.0,
        "init-args-num-cpus": workers,
        "init-args-log-to-driver": False,
    }
    with workplace(folder, spec, site_ids) as place:
        start_superlink(place, "--simulation")
        submit(place, folder, driver=driver, federation=federation)
    raise_outcome(folder)


def run_deployment(
    folder: Path,
    spec: HostSpec,
    site_ids: tuple[SiteId, ...],
    *,
    driver: str = DRIVE_STUDY,
    tls: bool = False,
) -> None:
    """Run a study as a deployment whose institutions all are this machine.

    One SuperLink and one SuperNode per site, each with its own processes, as between
    institutions. Nothing leaves the loopback interface.

    Args:
        folder: The run folder.
        spec: How to open a host.
        site_ids: The sites.
        driver: As in `run_simulation`.
        tls: Encrypt, and let in only nodes whose keys were registered, with
            credentials that live as long as the run.

    Raises:
        FedMedError: If Flower cannot be started, or what the driver raised.
    """
    with workplace(folder, spec, site_ids, tls=tls) as place:
        start_superlink(place, *(["--enable-supernode-auth"] if tls else []))
        register_nodes(place)
        for site_id in sorted(site_ids):
            start_supernode(place, site_id)
        submit(place, folder, driver=driver, federation={})
    raise_outcome(folder)


@contextlib.contextmanager
def workplace(
    folder: Path, spec: HostSpec, site_ids: tuple[SiteId, ...], *, tls: bool = False
) -> Iterator[Workplace]:
    """Prepare a temporary Flower home; end its processes and remove it afterwards."""
    home = Path(tempfile.mkdtemp(prefix="fedmed-flower-"))
    logs = folder / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME_FILE).unlink(missing_ok=True)
    threads = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
        str(spec.threads),
    )
    try:
        environment = {**QUIET, **threads, "FLWR_HOME": str(home)}
        with process_group(environment, logs) as group:
            credentials = make_credentials(home / "keys", site_ids) if tls else None
            place = Workplace(home, free_port(), group, credentials)
            write_workplace(place, spec, site_ids)
            yield place
    finally:
        shutil.rmtree(home, ignore_errors=True)


def write_workplace(
    place: Workplace, spec: HostSpec, site_ids: tuple[SiteId, ...]
) -> None:
    """Write the app to submit, Flower's connection and the hosts file."""
    package = place.app / "fedmed_launcher"
    package.mkdir(parents=True)
    (place.app / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(CLIENT_APP)
    (package / "server_app.py").write_text(SERVER_APP)
    security = "insecure = true"
    if place.credentials is not None:
        authority = json.dumps(str(place.credentials.authority))
        security = f"insecure = false\nroot-certificates = {authority}"
    (place.home / "config.toml").write_text(
        FLOWER_CONFIG.format(port=place.port, security=security)
    )
    hosts = {
        "factory": spec.factory,
        "options": dict(spec.options),
        "threads": spec.threads,
        "sites": sorted(site_ids),
    }
    place.hosts.touch(mode=0o600)
    place.hosts.write_text(json.dumps(hosts))


def start_superlink(place: Workplace, *options: str) -> None:
    """Start a SuperLink that only this machine reaches, and wait until it listens."""
    command = ["flower-superlink", "--host", "127.0.0.1"]
    if (own := place.credentials) is None:
        command += ["--insecure"]
    else:
        command += ["--ssl-ca-certfile", str(own.authority)]
        command += ["--ssl-certfile", str(own.certificate)]
        command += ["--ssl-keyfile", str(own.key)]
    command += ["--port", str(place.port), "--disable-runtime-dependency-installation"]
    superlink = place.group.start("superlink", [*script(command), *options])
    wait_until_listening(place.port, superlink, timeout_s=START_S)


def register_nodes(place: Workplace) -> None:
    """Tell the SuperLink the public keys of the sites that may join.

    Raises:
        FedMedError: If it does not take one.
    """
    if place.credentials is None:
        return
    for site_id, key in sorted(place.credentials.node_keys.items()):
        public = str(key.with_suffix(".pub"))
        command = script(["flwr", "supernode", "register", public, "fedmed"])
        if place.group.start("register", command).wait(START_S) != 0:
            raise FedMedError(
                f"the SuperLink does not take the key of site {site_id}",
                hint=f"its logs lie in the folder {LOGS} of the run folder",
            )


def start_supernode(place: Workplace, site_id: SiteId) -> None:
    """Start the SuperNode of one site."""
    command = ["flower-supernode", "--superlink", f"127.0.0.1:{place.port}"]
    if (own := place.credentials) is None:
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(own.authority)]
        command += ["--auth-supernode-private-key", str(own.node_keys[site_id])]
    command += ["--host", "127.0.0.1"]
    command += ["--port", str(free_port()), "--node-config"]
    command += [toml_pairs({"site": site_id, "hosts": str(place.hosts)})]
    place.group.start(f"supernode-{site_id.replace('/', '-')}", script(command))


def submit(
    place: Workplace, folder: Path, *, driver: str, federation: Mapping[str, object]
) -> None:
    """Submit the run and wait until it has ended.

    Raises:
        FedMedError: If Flower refuses it, or if it ends without an outcome.
    """
    config = {
        "fedmed-run": str(folder.resolve()),
        "driver": driver,
        "hosts": str(place.hosts),
    }
    command = ["flwr", "run", str(place.app), "fedmed", "--stream"]
    command += ["--run-config", toml_pairs(config)]
    if federation:
        command += ["--federation-config", toml_pairs(federation)]
    run = place.group.start("run", script(command))
    while run.poll() is None and not (folder / OUTCOME_FILE).exists():
        time.sleep(0.05)
    if run.poll() not in (None, 0) or not (folder / OUTCOME_FILE).exists():
        raise FedMedError(
            "Flower did not finish the run",
            hint=f"its logs lie in the folder {LOGS} of the run folder",
        )


def script(command: list[str]) -> list[str]:
    """Name a program that was installed beside this Python."""
    beside = Path(sys.executable).parent / command[0]
    return [str(beside) if beside.exists() else command[0], *command[1:]]


def toml_pairs(values: Mapping[str, object]) -> str:
    """Write values as Flower's command line takes them: `key="text" other=1`."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def raise_outcome(folder: Path) -> None:
    """Raise what the driver raised, if it did."""
    outcome = json.loads((folder / OUTCOME_FILE).read_text())
    if not outcome:
        return
    kind = getattr(fedmed.errors, outcome["error"], FedMedError)
    raise kind(outcome["message"], hint=outcome.get("hint", ""))
