"""Flower's simulation and a loopback deployment: the same bits, and a clean end."""

import contextlib
import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from fedmed.errors import FedMedError, PolicyError
from fedmed.flower.processes import MARK
from fedmed.message import State
from fedmed.transports import flower
from fedmed.transports.inprocess import InProcessTransport
from fedmed.transports.transport import HostSpec

sys.path.insert(0, str(Path(__file__).parent))
toy = importlib.import_module("toy_federation")
TEST = "FEDMED_TEST"
pytestmark = pytest.mark.timeout(180)

SITES: tuple[str, ...] = toy.sites(2)
DRIVER = "toy_federation:drive"
MANY = 40_000_000
FACTORY = "toy_federation:open_host"


def prepare(folder: Path, **plan: Any) -> HostSpec:
    (folder / "hosts").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"sites": SITES, **plan}))
    return HostSpec(FACTORY, {"folder": str(folder / "hosts")})


def reference(rounds: int) -> State:
    with InProcessTransport() as transport:
        transport.open(HostSpec(FACTORY, {}), SITES)
        result: State = toy.run_rounds(transport, SITES, rounds=rounds)
        return result


@pytest.fixture(autouse=True)
def _own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell this test's processes from those of tests that run beside it."""
    monkeypatch.setenv(TEST, secrets.token_hex(8))


def marked() -> list[psutil.Process]:
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found = process.environ()
            if MARK in found and found.get(TEST) == os.environ[TEST]:
                left.append(process)
    return left


def assert_nothing_left() -> None:
    assert marked() == []


def test_simulation_equals_in_process(tmp_path: Path) -> None:
    spec = prepare(tmp_path, rounds=3, echo_bytes=MANY, misbehave={"site1": "foreign"})
    flower.run_simulation(tmp_path, spec, SITES, driver=DRIVER, num_workers=2)
    assert_nothing_left()
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    toy.assert_bitwise_equal(result, reference(3))
    assert json.loads((tmp_path / "reasons.json").read_text()) == {
        "site0": ["ok", ""],
        "site1": ["raised", "the site raised FileNotFoundError"],
    }
    logs = "".join(p.read_text() for p in (tmp_path / "flower-logs").iterdir())
    assert "DOE_JANE" not in logs


@pytest.mark.parametrize("tls", [False, True])
def test_deployment_equals_in_process(tmp_path: Path, tls: bool) -> None:
    spec = prepare(tmp_path, rounds=2, echo_bytes=0 if tls else MANY)
    flower.run_deployment(tmp_path, spec, SITES, driver=DRIVER, tls=tls)
    assert_nothing_left()
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    toy.assert_bitwise_equal(result, reference(2))


def test_error_of_the_server_half_comes_back(tmp_path: Path) -> None:
    spec = prepare(tmp_path, rounds=1, **{"raise": True})
    with pytest.raises(PolicyError, match="the plan says so") as caught:
        flower.run_simulation(tmp_path, spec, SITES, driver=DRIVER, num_workers=1)
    assert caught.value.hint == "write another plan"
    assert_nothing_left()


@pytest.mark.slow
def test_dead_client_costs_its_site_the_exchange(tmp_path: Path) -> None:
    """Flower reports no death of a client app; its site answers the next message."""
    lethal = {"site1": "exit"}
    spec = prepare(tmp_path, rounds=0, misbehave=lethal, timeout_s=25.0, go_on=True)
    flower.run_deployment(tmp_path, spec, SITES, driver=DRIVER)
    assert json.loads((tmp_path / "reasons.json").read_text()) == {
        "site0": ["ok", ""],
        "site1": ["timeout", "no answer in time"],
    }
    assert_nothing_left()


def test_dead_actor_breaks_the_simulation_loudly(tmp_path: Path) -> None:
    """Flower's pool keeps dead actors, and innocent sites would fail for ever."""
    spec = prepare(tmp_path, rounds=0, misbehave={"site1": "exit"}, go_on=True)
    with pytest.raises(FedMedError, match="its pool cannot replace it") as caught:
        flower.run_simulation(tmp_path, spec, SITES, driver=DRIVER, num_workers=2)
    assert "--resume" in caught.value.hint
    assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_launcher_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    spec = prepare(tmp_path, rounds=100)
    script = (
        "import sys; from pathlib import Path; from fedmed.transports import flower\n"
        "from fedmed.transports.transport import HostSpec\n"
        f"spec = HostSpec({FACTORY!r}, {dict(spec.options)!r})\n"
        f"flower.run_deployment(Path({str(tmp_path)!r}), spec, {SITES!r},"
        f" driver={DRIVER!r})\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    wait_for(lambda: "Started task" in log_of(tmp_path, "superlink"), within_s=60)
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) != 0
    wait_for(lambda: not marked(), within_s=30)


def log_of(folder: Path, name: str) -> str:
    file = folder / "flower-logs" / f"{name}.log"
    return file.read_text() if file.exists() else ""


def wait_for(claim: Callable[[], bool], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert claim()
