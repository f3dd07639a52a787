"""The Ray transport: the same bits, sites that die or hang, and a clean end."""

import gc
import importlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from fedmed.errors import FedMedError, UsageError
from fedmed.message import Message, SiteFailure
from fedmed.reduce import weighted_mean
from fedmed.replies import Replies, states_of
from fedmed.transports.inprocess import InProcessTransport
from fedmed.transports.ray import RayTransport
from fedmed.transports.transport import HostSpec

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
sys.path.insert(0, str(Path(__file__).parent))
toy = importlib.import_module("toy_federation")

SITES: tuple[str, ...] = toy.sites(5)
SPEC = HostSpec("toy_federation:open_host", {})
CAUSES = {"site0": "ok", "site1": "ok", "site2": "ok", "site3": "ok", "site4": "ok"}
"""Two actors: one plays sites 0, 1 and 2, the other 3 and 4."""


@pytest.fixture(scope="module")
def transport() -> Iterator[RayTransport]:
    with RayTransport(num_workers=2) as opened:
        opened.open(SPEC, SITES)
        yield opened


@pytest.fixture(scope="module", autouse=True)
def _reap() -> Iterator[None]:
    """Ray never waits for the processes it ended, and Python warns of that."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def ask(**misbehave: str) -> Message:
    header = {"round": 1, "misbehave": misbehave}
    return Message("train", header, {"weights": torch.ones(40, 30)})


def reasons(
    transport: RayTransport, message: Message, timeout_s: float | None = None
) -> dict[str, str]:
    answers = transport.exchange(dict.fromkeys(SITES, message), timeout_s=timeout_s)
    return {
        site: answer.reason if isinstance(answer, SiteFailure) else "ok"
        for site, answer in answers.items()
    }


def listening_addresses() -> set[str]:
    connections = [
        connection
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections(kind="inet")
    ]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_bitwise_equal_to_in_process(transport: RayTransport) -> None:
    with InProcessTransport() as reference:
        reference.open(SPEC, SITES)
        expected = toy.run_rounds(reference, SITES)
    toy.assert_bitwise_equal(toy.run_rounds(transport, SITES), expected)


@pytest.mark.parametrize("numel", [1000, 3_000_001])
def test_short_and_long_replies_add_up_to_the_same_bits(
    transport: RayTransport, numel: int
) -> None:
    """Long ones stay with their actors, which add them up."""
    sent = dict.fromkeys(SITES, Message("large", {"numel": numel}))
    weights = {site: 1.0 + position for position, site in enumerate(SITES)}
    means = []
    with InProcessTransport() as reference:
        reference.open(SPEC, SITES)
        for one in (reference, transport):
            answers = one.exchange(sent)
            messages = {s: a for s, a in answers.items() if isinstance(a, Message)}
            assert set(messages) == set(SITES)
            states = states_of(Replies(messages), "state")
            means.append(weighted_mean(states, weights)["w"])
    assert torch.equal(*means)


def test_only_this_machine_can_reach_the_cluster(transport: RayTransport) -> None:
    assert listening_addresses() <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_sent_and_received_tensors_are_separate(transport: RayTransport) -> None:
    message = ask()
    answers = transport.exchange(dict.fromkeys(SITES, message))
    replies: list[Mapping[str, torch.Tensor]] = [
        toy.expect_reply(answer).tensors for answer in answers.values()
    ]
    replies[0]["weights"].fill_(0.0)
    assert torch.equal(message.tensors["weights"], torch.ones(40, 30))
    assert all(bool(reply["weights"].any()) for reply in replies[1:])


def test_failures_are_scrubbed_and_cost_nobody_else(transport: RayTransport) -> None:
    message = ask(site0="foreign", site1="policy")
    answers = transport.exchange(dict.fromkeys(SITES, message))
    assert answers["site0"] == SiteFailure(
        "raised", "the site raised FileNotFoundError"
    )
    assert answers["site1"] == SiteFailure(
        "refused", "kind Weights is not allowed here", fatal=True
    )
    assert all(isinstance(answers[site], Message) for site in SITES[2:])


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_dead_actor_is_replaced_and_its_killer_found(
    transport: RayTransport, how: str
) -> None:
    transport._placement._suspects.clear()
    lethal = ask(site2=how)
    died = {"site0": "died", "site1": "died", "site2": "died"}
    assert reasons(transport, ask()) == CAUSES
    assert reasons(transport, lethal) == CAUSES | died
    assert reasons(transport, ask()) == CAUSES
    assert reasons(transport, lethal) == CAUSES | {"site2": "died"}
    assert reasons(transport, ask()) == CAUSES


def test_hanging_site_costs_the_timeout_and_no_more(transport: RayTransport) -> None:
    assert reasons(transport, ask()) == CAUSES
    transport._placement._suspects.clear()
    start = time.monotonic()
    hung = reasons(transport, ask(site3="hang"), timeout_s=1.0)
    assert time.monotonic() - start < 8.0  # it would hang for a minute
    assert hung == CAUSES | {"site3": "timeout", "site4": "timeout"}
    assert reasons(transport, ask()) == CAUSES


def test_unreachable_cluster_is_an_error_for_people() -> None:
    with RayTransport(address="127.0.0.1:1") as transport:
        with pytest.raises(FedMedError, match="could be reached") as caught:
            transport.open(SPEC, SITES)
        assert "ray start" in caught.value.hint


def test_impossible_worker_count_is_refused() -> None:
    with pytest.raises(UsageError, match="num_workers is 0"):
        RayTransport(num_workers=0)


def test_closing_twice_and_without_opening_is_harmless() -> None:
    transport = RayTransport()
    transport.close()
    transport.close()
    with pytest.raises(FedMedError, match="not open"):
        transport.exchange({"site0": ask()})


def test_close_ends_every_process_and_keeps_our_signal_handler(
    transport: RayTransport, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["kept", "2", "left", "0"]


SCRIPT = """
import signal, sys, time
import psutil
sys.path.insert(0, "{folder}")
from fedmed.transports.ray import RayTransport
from fedmed.transports.transport import HostSpec

def alive():
    children = psutil.Process().children(recursive=True)
    return [c for c in children if c.status() != psutil.STATUS_ZOMBIE]

handler = lambda *_: None
signal.signal(signal.SIGTERM, handler)
with RayTransport(num_workers=2) as transport:
    transport.open(HostSpec("toy_federation:open_host", {{}}), ("a", "b"))
    kept = signal.getsignal(signal.SIGTERM) is handler
    names = [child.name() for child in alive()]
    print("kept" if kept else "lost", sum("Worker" in name for name in names))
deadline = time.monotonic() + 5
while alive() and time.monotonic() < deadline:
    time.sleep(0.02)
print("left", len(alive()))
"""
