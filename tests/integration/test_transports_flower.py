"""Flower's simulation and a loopback deployment: the same bits, and a clean end."""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from fedmed.errors import PolicyError
from fedmed.flower.processes import MARK
from fedmed.message import State
from fedmed.transports import flower
from fedmed.transports.inprocess import InProcessTransport
from fedmed.transports.transport import HostSpec

sys.path.insert(0, str(Path(__file__).parent))
toy = importlib.import_module("toy_federation")
pytestmark = pytest.mark.timeout(180)

SITES: tuple[str, ...] = toy.sites(2)
DRIVER = "toy_federation:drive"
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


def assert_nothing_left() -> None:
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if MARK in process.environ():
                left.append(process)
    assert left == []


def test_simulation_equals_in_process(tmp_path: Path) -> None:
    spec = prepare(tmp_path, rounds=3, misbehave={"site1": "foreign"})
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


def test_deployment_equals_in_process(tmp_path: Path) -> None:
    spec = prepare(tmp_path, rounds=2)
    flower.run_deployment(tmp_path, spec, SITES, driver=DRIVER)
    assert_nothing_left()
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    toy.assert_bitwise_equal(result, reference(2))


def test_error_of_the_server_half_comes_back(tmp_path: Path) -> None:
    spec = prepare(tmp_path, rounds=1, **{"raise": True})
    with pytest.raises(PolicyError, match="the plan says so") as caught:
        flower.run_simulation(tmp_path, spec, SITES, driver=DRIVER, num_workers=1)
    assert caught.value.hint == "write another plan"
    assert_nothing_left()
