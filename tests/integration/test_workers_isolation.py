"""What workers share, and what they must not: memory, deaths, descriptors, signals."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from fedmed.errors import FedMedError, WireError
from fedmed.message import Message, SiteFailure, State
from fedmed.reduce import weighted_mean
from fedmed.replies import Replies, section
from fedmed.transports.inprocess import InProcessTransport
from fedmed.transports.placement import PROBATION
from fedmed.transports.transport import HostSpec, Transport
from fedmed.transports.workers import WorkersTransport

pytestmark = pytest.mark.timeout(60)
sys.path.insert(0, str(Path(__file__).parent))
toy = importlib.import_module("toy_federation")

SITES: tuple[str, ...] = toy.sites(5)
EIGHT: tuple[str, ...] = toy.sites(8)
TRAINING = HostSpec("toy_federation:open_host", {})
SHARING = HostSpec("toy_workers:open_host", {})
NUM_WEIGHTS = 40_000


@contextlib.contextmanager
def opened(
    num_workers: int = 2, spec: HostSpec = SHARING, sites: tuple[str, ...] = SITES
) -> Iterator[WorkersTransport]:
    with WorkersTransport(num_workers=num_workers) as transport:
        transport.open(spec, sites)
        yield transport


@pytest.fixture(params=["inprocess", "workers"])
def sharing(request: pytest.FixtureRequest) -> Iterator[Transport]:
    """Either transport, with hosts that write to and keep what they get."""
    if request.param == "workers":
        with opened() as transport:
            yield transport
        return
    with InProcessTransport() as reference:
        reference.open(SHARING, SITES)
        yield reference


def train(**misbehave: str) -> Message:
    header = {"round": 1, "misbehave": misbehave}
    return Message("train", header, {"weights": torch.ones(40, 30)})


def say(kind: str, value: float = 0.0, **header: Any) -> Message:
    return Message(kind, header, {"w": torch.full((100,), value)})


def to_all(message: Message, sites: tuple[str, ...] = SITES) -> dict[str, Message]:
    return dict.fromkeys(sites, message)


def replies_to(
    transport: Transport, message: Message, sites: tuple[str, ...] = SITES
) -> dict[str, Message]:
    answers = transport.exchange(to_all(message, sites))
    return {site: toy.expect_reply(answer) for site, answer in answers.items()}


def lost(
    transport: Transport, message: Message, timeout_s: float | None = None
) -> dict[str, str]:
    """Sites that did not answer, and why."""
    answers = transport.exchange(to_all(message), timeout_s=timeout_s)
    return {s: a.reason for s, a in answers.items() if isinstance(a, SiteFailure)}


def children() -> set[int]:
    found = psutil.Process().children(recursive=True)
    return {child.pid for child in found if is_ours(child)}


def is_ours(child: psutil.Process) -> bool:
    """Neither Python's tracker nor what an earlier test left unreaped."""
    try:
        return "resource_tracker" not in " ".join(child.cmdline())
    except psutil.Error:
        return False


def descriptors(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def shared_bytes(pid: int | str = "self") -> int:
    """Bytes of our shared memory that a process has mapped."""
    found = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place = re.match(r"(\w+)-(\w+).*memfd:fedmed", line)
        if place:
            found += int(place[2], 16) - int(place[1], 16)
    return found


def test_a_host_that_writes_through_goes_on_in_another_process(tmp_path: Path) -> None:
    spec = HostSpec("toy_federation:open_host", {"folder": str(tmp_path)})
    with InProcessTransport() as reference:
        reference.open(TRAINING, SITES)
        expected = toy.run_rounds(reference, SITES)
        after = replies_to(reference, train())
    before = children()
    with WorkersTransport(num_workers=2, durable=True) as transport:
        transport.open(spec, SITES)
        toy.assert_bitwise_equal(toy.run_rounds(transport, SITES), expected)
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
        assert lost(transport, Message("echo")) == dict.fromkeys(SITES, "died")
        found = replies_to(transport, train())
    for site in SITES:
        toy.assert_bitwise_equal(dict(found[site].tensors), dict(after[site].tensors))


def test_the_gate_measures_the_same_everywhere() -> None:
    reference: State = {"w": torch.full((7,), 2.0), "b": torch.ones(3)}
    tensors = {"state/w": torch.arange(7.0), "state/b": torch.full((3,), 5.0)}
    norms = []
    with InProcessTransport() as alone, opened() as workers:
        alone.open(SHARING, SITES)
        for transport in (alone, workers):
            message = Message("echo", {}, tensors)
            answers = transport.exchange(to_all(message), reference=reference)
            norms.append({s: toy.expect_reply(a).norms for s, a in answers.items()})
    assert norms[0] == norms[1]
    assert norms[0]["site0"] is not None


def test_a_header_that_cannot_be_sent_harms_no_later_message(
    sharing: Transport,
) -> None:
    header = {"t": (1, 2), "b": float("nan"), "a": {"z": 1, "y": None}}
    with pytest.raises(WireError, match="cannot send"):
        sharing.exchange(to_all(Message("describe", {"o": object()})))
    replies = replies_to(sharing, Message("describe", header))
    expected = "{'a': {'y': None, 'z': 1}, 'b': nan, 't': [1, 2]}"
    assert {r.header["header"] for r in replies.values()} == {expected}


def test_what_one_side_does_to_its_tensors_the_other_does_not_see(
    sharing: Transport,
) -> None:
    message = say("echo", 1.0)
    replies = replies_to(sharing, message)
    replies["site0"].tensors["w"].fill_(7.0)
    message.tensors["w"].fill_(9.0)
    for site in SITES[1:]:
        assert replies[site].tensors["w"].unique().tolist() == [1.0]
    for reply in replies_to(sharing, say("echo", 2.0)).values():
        assert reply.tensors["w"].unique().tolist() == [2.0]


@pytest.mark.parametrize("vandals", [SITES[:1], SITES[1:3], SITES])
def test_a_site_that_writes_to_what_it_got_is_refused_and_harms_nobody(
    sharing: Transport, vandals: tuple[str, ...]
) -> None:
    replies = replies_to(sharing, Message("draw", {"round": 1}))
    # From the second round on, the server's weights lie where the sites read them.
    states = Replies(replies).states("state")
    weights = weighted_mean(states, dict.fromkeys(SITES, 1.0))["a"]
    before = weights.clone()
    for _ in range(2):
        message = Message("vandal", {"vandals": vandals}, {"w": weights})
        answers = sharing.exchange(to_all(message))
        assert torch.equal(weights, before)
        for site, answer in answers.items():
            if site in vandals:
                assert isinstance(answer, SiteFailure)
                assert answer.reason == "wire"
                assert "changed tensors of the message in place" in answer.detail
            else:
                assert torch.equal(toy.expect_reply(answer).tensors["w"], before)
    weights.add_(5.0)
    message = Message("vandal", {"vandals": ()}, {"w": weights})
    for reply in replies_to(sharing, message).values():
        assert torch.equal(reply.tensors["w"], before + 5.0)


def test_a_host_may_keep_what_it_got(sharing: Transport) -> None:
    sharing.exchange(to_all(say("keep", 1.0)))
    for value in range(5, 15):
        sharing.exchange(to_all(say("echo", float(value))))
    for reply in replies_to(sharing, say("kept")).values():
        assert reply.tensors["w"].unique().tolist() == [1.0]


def test_shapes_that_always_change_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedmed.transports.worker_process.KEPT_LAYOUTS", 4)
    held = []
    with opened(1) as transport:
        for number in (*range(1, 20), *range(1, 20)):
            tensors = {"w": torch.full((number,), float(number))}
            held.append(replies_to(transport, Message("echo", {}, tensors))["site0"])
        (member,) = transport._crew
        assert len(member.layouts) <= 6
    for reply, number in zip(held, (*range(1, 20), *range(1, 20)), strict=True):
        assert reply.tensors["w"].tolist() == [number] * number


def test_a_reply_stays_as_it_is_while_the_exchanges_go_on() -> None:
    held = []
    with opened(3) as transport:
        for number in range(25):
            reply = replies_to(transport, Message("draw", {"round": number}))["site3"]
            assert int(reply.tensors["state/n"]) == number + len("site3")
            if number < 3:
                held.append((reply, {n: t.clone() for n, t in reply.tensors.items()}))
            del reply
        for reply, then in held:
            toy.assert_bitwise_equal(dict(reply.tensors), then)
    for reply, then in held:  # also when the workers are gone
        toy.assert_bitwise_equal(dict(reply.tensors), then)


def test_a_worker_that_dies_while_it_adds_costs_no_number() -> None:
    weights = {site: 1.0 + 0.37 * k for k, site in enumerate(EIGHT)}
    before = children()
    with opened(3, sites=EIGHT) as transport:
        for number in range(2):
            replies = replies_to(transport, Message("draw", {"round": number}), EIGHT)
            plain = {
                site: {n: t.clone() for n, t in section(reply, "state").items()}
                for site, reply in replies.items()
            }
            expected = weighted_mean(plain, weights)
            victim = max(children() - before)
            os.kill(victim, signal.SIGSTOP)
            timer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
            timer.start()
            states = Replies(replies).states("state")
            toy.assert_bitwise_equal(weighted_mean(states, weights), expected)
            timer.join()
            assert len(children() - before) == 3
            assert victim not in children()


def test_suspects_that_answer_share_a_message_again() -> None:
    with opened(1, TRAINING) as transport:
        assert len(lost(transport, train(site2="exit"))) == len(SITES)
        for _ in range(PROBATION):
            assert lost(transport, train()) == {}
        assert len(lost(transport, train(site0="exit"))) == len(SITES)


def test_a_site_that_always_hangs_costs_the_others_one_round() -> None:
    hanging = train(site1="hang")
    with opened(1, TRAINING) as transport:
        assert len(lost(transport, hanging, timeout_s=1.0)) == len(SITES)
        for _ in range(2):
            assert lost(transport, hanging, timeout_s=1.0) == {"site1": "timeout"}
        assert lost(transport, train(), timeout_s=20.0) == {}


def test_only_the_addressed_sites_answer() -> None:
    with opened() as transport:
        answers = transport.exchange(dict.fromkeys(("site4", "site1"), say("echo")))
        assert list(answers) == ["site1", "site4"]
        assert transport.exchange({}) == {}
        with pytest.raises(FedMedError, match="zoo"):
            transport.exchange({"zoo": say("echo")})


def test_close_closes_every_host_and_opening_anew_ends_the_old_workers(
    tmp_path: Path,
) -> None:
    before = children()
    spec = HostSpec("toy_workers:open_host", {"closed": str(tmp_path)})
    with WorkersTransport(num_workers=3) as transport:
        for _ in range(2):
            transport.open(spec, SITES)
            assert lost(transport, say("echo")) == {}
            assert len(children() - before) == 3
    assert children() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == list(SITES)


def test_200_exchanges_leave_no_descriptor_and_no_memory_behind() -> None:
    gc.collect()
    at_first, before = descriptors(), children()
    held: list[tuple[int, int]] = []
    weights = torch.ones(NUM_WEIGHTS)
    with opened(2, sites=EIGHT) as transport:
        for number in range(200):
            sites = EIGHT if number % 3 else EIGHT[number % 5 :]
            message = Message("echo", {}, {"state/w": weights})
            replies = replies_to(transport, message, sites)
            states = Replies(replies).states("state")
            weights = weighted_mean(states, dict.fromkeys(sites, 1.0))["w"]
            if number in (20, 199):
                pids = ("self", *(children() - before))
                files = sum(descriptors(pid) for pid in pids)
                held.append((files, sum(shared_bytes(pid) for pid in pids)))
        assert torch.equal(weights, torch.ones(NUM_WEIGHTS))
    assert held[1][0] <= held[0][0] + 4
    assert held[1][1] <= held[0][1] * 1.1
    del states, replies, weights, message
    gc.collect()
    assert descriptors() == at_first
    assert shared_bytes() == 0


def test_replaced_workers_leave_no_descriptor_behind() -> None:
    gc.collect()
    at_first = descriptors()
    with opened(1, TRAINING, SITES[:1]) as transport:
        for _ in range(5):
            answer = transport.exchange({"site0": train(site0="exit")})["site0"]
            assert isinstance(answer, SiteFailure)
            assert isinstance(transport.exchange({"site0": train()})["site0"], Message)
    gc.collect()
    assert descriptors() == at_first


SCRIPT = """
import os, signal, sys, time
import psutil, torch
sys.path.insert(0, {folder!r})
from fedmed.message import Message
from fedmed.transports.transport import HostSpec
from fedmed.transports.workers import WorkersTransport

transport = WorkersTransport(num_workers=2)
transport.open(HostSpec("toy_federation:open_host", {{}}), ("a", "b"))
signal.signal(signal.SIGINT, lambda *_: None)  # the workers have their own

def exchange(**misbehave):
    header = {{"round": 1, "misbehave": misbehave}}
    ask = Message("train", header, {{"weights": torch.ones(40, 30)}})
    return transport.exchange(dict.fromkeys(("a", "b"), ask))

exchange()
print(*[child.pid for child in psutil.Process().children()], flush=True)
if sys.argv[1] == "busy":
    exchange(a="hang")
sys.stdin.readline()
print(*[type(answer).__name__ for answer in exchange().values()], flush=True)
transport.close()
print(len(psutil.Process().children()), flush=True)
"""


@contextlib.contextmanager
def server(tmp_path: Path, how: str) -> Iterator[tuple[Any, list[int]]]:
    """A server in a session of its own, and its two workers."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, str(script), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pids: list[int] = []
    try:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        yield process, pids
    finally:
        for pid in (process.pid, *(pid for pid in pids if alive(pid))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_within(pids: list[int], limit_s: float) -> bool:
    stop = time.monotonic() + limit_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > stop:
            return False
        time.sleep(0.02)
    return True


def test_a_worker_at_work_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    with server(tmp_path, "busy") as (process, pids):
        time.sleep(0.3)
        process.kill()
        assert end_within(pids, 3.0)


def test_ctrl_c_is_the_servers_business(tmp_path: Path) -> None:
    """A terminal sends it to all; the workers go on until the server closes them."""
    with server(tmp_path, "asked") as (process, pids):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert all(alive(pid) for pid in pids)
        out, _ = process.communicate("\n", timeout=30)
        assert out.splitlines() == ["Message Message", "0"]
        assert process.returncode == 0
        assert end_within(pids, 1.0)
