"""Workers in shared memory: the same bits, sites that fail, and a clean end."""

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from fedmed.errors import FedMedError, UsageError
from fedmed.message import Message, SiteFailure
from fedmed.reduce import weighted_mean
from fedmed.replies import Replies
from fedmed.transports import workers
from fedmed.transports.inprocess import InProcessTransport
from fedmed.transports.placement import PROBATION
from fedmed.transports.transport import HostSpec
from fedmed.transports.workers import WorkersTransport

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
sys.path.insert(0, str(Path(__file__).parent))
toy = importlib.import_module("toy_federation")

SITES: tuple[str, ...] = toy.sites(5)
SPEC = HostSpec("toy_federation:open_host", {})
CAUSES = dict.fromkeys(SITES, "ok")
"""Two workers: one plays sites 0, 1 and 2, the other 3 and 4."""


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkersTransport]:
    with WorkersTransport(num_workers=2) as opened:
        opened.open(SPEC, SITES)
        yield opened


@pytest.fixture
def transport(shared: WorkersTransport) -> WorkersTransport:
    """The shared one, with nobody under suspicion."""
    shared._placement._suspects.clear()
    return shared


def ask(**misbehave: str) -> Message:
    header = {"round": 1, "misbehave": misbehave}
    return Message("train", header, {"weights": torch.ones(40, 30)})


def reasons(
    transport: WorkersTransport, message: Message, timeout_s: float | None = None
) -> dict[str, str]:
    answers = transport.exchange(dict.fromkeys(SITES, message), timeout_s=timeout_s)
    return {
        site: answer.reason if isinstance(answer, SiteFailure) else "ok"
        for site, answer in answers.items()
    }


def in_process(spec: HostSpec = SPEC) -> dict[str, torch.Tensor]:
    with InProcessTransport() as reference:
        reference.open(spec, SITES)
        return dict(toy.run_rounds(reference, SITES))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_bitwise_equal_to_in_process(num_workers: int) -> None:
    with WorkersTransport(num_workers=num_workers) as transport:
        transport.open(SPEC, SITES)
        assert len(transport._crew) == min(num_workers, len(SITES))
        toy.assert_bitwise_equal(toy.run_rounds(transport, SITES), in_process())


def test_two_threads_start_new_processes_with_equal_results() -> None:
    spec = HostSpec("toy_federation:open_host", {}, threads=2)
    assert workers.start_method(spec) == "spawn"
    assert workers.start_method(SPEC) == "fork"
    with WorkersTransport(num_workers=2) as transport:
        transport.open(spec, SITES)
        toy.assert_bitwise_equal(toy.run_rounds(transport, SITES), in_process(spec))
        answer = transport.exchange({"site0": ask()})["site0"]
        assert toy.expect_reply(answer).header["threads"] == 2


def test_headers_arrive_as_in_process(transport: WorkersTransport) -> None:
    header = {"t": (1, 2), "b": float("nan"), "a": {"z": 1, "y": 2.5}}
    message = Message("echo", header, {"z": torch.ones(1), "a": torch.ones(1)})
    with InProcessTransport() as reference:
        reference.open(SPEC, SITES)
        expected = reference.exchange(dict.fromkeys(SITES, message))
    found = transport.exchange(dict.fromkeys(SITES, message))
    for site in SITES:
        ours, theirs = (
            toy.expect_reply(answers[site]) for answers in (found, expected)
        )
        assert repr(dict(ours.header)) == repr(dict(theirs.header))
        assert list(ours.tensors) == list(theirs.tensors)


def test_sent_and_received_tensors_are_separate(transport: WorkersTransport) -> None:
    message = ask()
    answers = transport.exchange(dict.fromkeys(SITES, message))
    replies: list[Mapping[str, torch.Tensor]] = [
        toy.expect_reply(answer).tensors for answer in answers.values()
    ]
    replies[0]["weights"].fill_(0.0)
    assert torch.equal(message.tensors["weights"], torch.ones(40, 30))
    assert all(bool(reply["weights"].any()) for reply in replies[1:])


def test_replies_stay_as_they_are_while_others_come(
    transport: WorkersTransport,
) -> None:
    kept = transport.exchange(dict.fromkeys(SITES, ask()))
    before = {
        (site, name): tensor.clone()
        for site, answer in kept.items()
        for name, tensor in toy.expect_reply(answer).tensors.items()
    }
    for _ in range(20):
        transport.exchange(dict.fromkeys(SITES, ask()))
    for (site, name), tensor in before.items():
        found = toy.expect_reply(kept[site]).tensors[name]
        assert torch.equal(toy.content(found), toy.content(tensor)), (site, name)


def test_failures_are_scrubbed_and_cost_nobody_else(
    transport: WorkersTransport,
) -> None:
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
def test_dead_worker_is_replaced_and_its_killer_found(
    transport: WorkersTransport, how: str
) -> None:
    died = {"site0": "died", "site1": "died", "site2": "died"}
    assert reasons(transport, ask()) == CAUSES
    assert reasons(transport, ask(site2=how)) == CAUSES | died
    assert reasons(transport, ask()) == CAUSES
    assert reasons(transport, ask(site2=how)) == CAUSES | {"site2": "died"}
    for _ in range(PROBATION):
        assert reasons(transport, ask()) == CAUSES
    assert not transport._placement._suspects


def test_a_worker_killed_from_outside_is_replaced(transport: WorkersTransport) -> None:
    member = transport._crew[1]
    member.process.kill()
    member.process.join()
    died = {"site3": "died", "site4": "died"}
    assert reasons(transport, ask()) == CAUSES | died
    assert reasons(transport, ask()) == CAUSES


def test_hanging_site_costs_the_timeout_and_no_more(
    transport: WorkersTransport,
) -> None:
    assert reasons(transport, ask()) == CAUSES
    for found in (
        CAUSES | {"site3": "timeout", "site4": "timeout"},
        CAUSES | {"site3": "timeout"},  # alone now
    ):
        start = time.monotonic()
        assert reasons(transport, ask(site3="hang"), timeout_s=1.0) == found
        assert time.monotonic() - start < 8.0  # it would hang for a minute
    assert reasons(transport, ask(), timeout_s=5.0) == CAUSES


@pytest.mark.parametrize("in_pool", [False, True])
def test_who_writes_to_what_it_received_is_refused_and_harms_nobody(
    in_pool: bool,
) -> None:
    with WorkersTransport(num_workers=2) as transport, InProcessTransport() as other:
        transport.open(SPEC, SITES)
        other.open(SPEC, SITES)
        message = ask(site0="write")
        weights = message.tensors["weights"]
        if in_pool:
            pooled = transport._pool.allocate(weights.numel() * 4)
            weights = pooled.view(torch.float32).view(40, 30).fill_(1.0)
            message = Message(message.kind, message.header, {"weights": weights})
        for _ in range(2):
            found = transport.exchange(dict.fromkeys(SITES, message))
            expected = other.exchange(dict.fromkeys(SITES, ask(site0="write")))
            assert found["site0"] == expected["site0"]
            assert isinstance(found["site0"], SiteFailure)
            assert bool((weights == 1.0).all())
            for site in SITES[1:]:
                toy.assert_bitwise_equal(
                    toy.expect_reply(found[site]).tensors,
                    toy.expect_reply(expected[site]).tensors,
                )


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_long_sums_of_all_workers_are_those_of_one_process(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    helped = []
    together = WorkersTransport._add_together

    def noted(self, *arguments) -> bool:  # type: ignore[no-untyped-def]
        helped.append(together(self, *arguments))
        return helped[-1]

    monkeypatch.setattr(WorkersTransport, "_add_together", noted)
    numel = workers.LONG_SUM // len(SITES) + 12345
    shares = {site: 0.3 + k for k, site in enumerate(SITES)}
    with WorkersTransport(num_workers=num_workers) as transport:
        transport.open(SPEC, SITES)
        for _ in range(2):
            answers = transport.exchange(
                dict.fromkeys(SITES, Message("large", {"numel": numel}))
            )
            states = Replies(answers).states("state")
            plain = {site: {"w": states[site]["w"].clone()} for site in SITES}
            mean = weighted_mean(states, shares)
            toy.assert_bitwise_equal(mean, weighted_mean(plain, shares))
            # The mean lies where the workers read it in place.
            sent = transport.exchange({"site4": Message("echo", {}, mean)})
            toy.assert_bitwise_equal(toy.expect_reply(sent["site4"]).tensors, mean)
    assert helped == ([] if num_workers == 1 else [True, True])


def test_a_worker_that_dies_before_a_sum_changes_no_bit() -> None:
    numel = workers.LONG_SUM // len(SITES) + 1
    ones = dict.fromkeys(SITES, 1.0)
    with WorkersTransport(num_workers=2) as transport:
        transport.open(SPEC, SITES)
        message = Message("large", {"numel": numel})
        states = Replies(transport.exchange(dict.fromkeys(SITES, message)))
        section = states.states("state")
        plain = {site: {"w": section[site]["w"].clone()} for site in SITES}
        transport._crew[0].process.kill()
        transport._crew[0].process.join()
        mean = weighted_mean(section, ones)
        toy.assert_bitwise_equal(mean, weighted_mean(plain, ones))
        assert reasons(transport, ask()) == CAUSES


def test_impossible_worker_count_is_refused() -> None:
    with pytest.raises(UsageError, match="num_workers is 0"):
        WorkersTransport(num_workers=0)


def test_closing_twice_and_without_opening_is_harmless() -> None:
    transport = WorkersTransport()
    transport.close()
    transport.close()
    with pytest.raises(FedMedError, match="not open"):
        transport.exchange({"site0": ask()})


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_close_leaves_no_process_and_no_descriptor() -> None:
    def use() -> list[int]:
        with WorkersTransport(num_workers=3) as transport:
            transport.open(SPEC, SITES)
            reasons(transport, ask())
            reasons(transport, ask(site0="exit"))
            toy.run_rounds(transport, SITES)
            return [member.process.pid or 0 for member in transport._crew]

    use()
    before = descriptors()
    pids = use() + use()
    assert descriptors() == before
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_replies_can_be_read_after_close() -> None:
    with WorkersTransport(num_workers=2) as transport:
        transport.open(SPEC, SITES)
        kept = transport.exchange(dict.fromkeys(SITES, ask()))
        before = toy.expect_reply(kept["site1"]).tensors["weights"].clone()
    found = toy.expect_reply(kept["site1"]).tensors["weights"]
    assert torch.equal(found, before)


SCRIPT = """
import json, sys
sys.path.insert(0, {folder!r})
import torch
from fedmed.message import Message
from fedmed.transports.transport import HostSpec
from fedmed.transports.workers import WorkersTransport

spec = HostSpec("toy_federation:open_host", {{}})
transport = WorkersTransport(num_workers=3)
transport.open(spec, ("a", "b", "c"))
header = {{"round": 1, "misbehave": {{"b": {how!r}}}}}
first = {{s: Message("echo") for s in "abc"}}
transport.exchange(first)
print(json.dumps([m.process.pid for m in transport._crew]), flush=True)
ask = Message("train", header, {{"weights": torch.ones(40, 30)}})
if {how!r}:
    transport.exchange({{s: ask for s in "abc"}})
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["", "slow"])
def test_workers_end_when_the_server_is_killed(how: str) -> None:
    script = SCRIPT.format(folder=str(Path(__file__).parent), how=how)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        members = [psutil.Process(p) for p in json.loads(process.stdout.readline())]
        assert len(members) == 3
        time.sleep(0.3)
        process.kill()
    _, alive = psutil.wait_procs(members, timeout=5)
    alive = [m for m in alive if _runs(m)]
    for member in alive:
        member.kill()
    assert not alive


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
