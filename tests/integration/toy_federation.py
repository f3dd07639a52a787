"""A toy hospital whose arithmetic shows any difference between transports.

Imported by name in other processes, so this folder must be on their path.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedmed.errors import PolicyError
from fedmed.message import Message, SiteFailure, State
from fedmed.seeds import torch_rng
from fedmed.transports.transport import Transport

ROUNDS = 3


class ToyHost:
    """Keeps a momentum; its reply depends on it, on the site and on the message."""

    def __init__(self, site_id: str, options: Mapping[str, Any]) -> None:
        self.site_id = site_id
        self.file = (
            Path(options["folder"]) / f"{site_id}.json" if options["durable"] else None
        )
        self.momentum = torch.zeros(40, 30)
        if self.file is not None and self.file.exists():
            self.momentum = torch.tensor(json.loads(self.file.read_text()))

    def handle(self, message: Message) -> Message:
        if message.kind == "echo":
            return message
        if message.kind == "large":
            numbers = torch.randn(
                message.header["numel"], generator=torch_rng(5, self.site_id)
            )
            return Message("Weights", {"num_examples": 1}, {"state/w": numbers})
        how = message.header.get("misbehave", {}).get(self.site_id, "")
        misbehave(how)
        weights = message.tensors["weights"]
        if how == "write":
            weights.fill_(99.0)
        noise = torch.randn(40, 30, generator=torch_rng(7, self.site_id))
        gradient = torch.tanh(weights @ noise.T) @ noise / 30
        self.momentum = self.momentum * 0.9 + gradient
        weights = weights - 0.1 * self.momentum
        if self.file is not None:
            self.file.write_text(json.dumps(self.momentum.tolist()))
        return Message(
            "Weights",
            {"site": self.site_id, "threads": torch.get_num_threads()},
            {
                "weights": weights,
                "counter": torch.tensor(int(message.header["round"])),
                "half": gradient.to(torch.bfloat16),
                "empty": torch.zeros(0, 3),
            },
        )

    def close(self) -> None:
        pass


def misbehave(how: str) -> None:
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(3600)
    if how == "slow":
        time.sleep(1.5)
    if how == "foreign":
        raise FileNotFoundError("/data/DOE_JANE/scan.nii.gz")
    if how == "policy":
        raise PolicyError("kind Weights is not allowed here")


def open_host(site_id: str, options: Mapping[str, Any]) -> ToyHost:
    return ToyHost(site_id, options)


def sites(count: int) -> tuple[str, ...]:
    return tuple(f"site{k}" for k in range(count))


def run_rounds(
    transport: Transport, site_ids: tuple[str, ...], *, rounds: int = ROUNDS
) -> State:
    """Average weights for some rounds; every answer's content goes into the result."""
    weights = torch.randn(30, 30, generator=torch_rng(3, "start"))
    weights = torch.cat([weights, weights[:10]])
    result: State = {}
    for server_round in range(1, rounds + 1):
        ask = Message("train", {"round": server_round}, {"weights": weights})
        answers = transport.exchange(dict.fromkeys(site_ids, ask))
        replies = {site: expect_reply(answer) for site, answer in answers.items()}
        assert list(replies) == sorted(site_ids)
        weights = torch.stack([r.tensors["weights"] for r in replies.values()]).mean(0)
        for site, reply in replies.items():
            for name, tensor in reply.tensors.items():
                result[f"{server_round}/{site}/{name}"] = tensor
    result["weights"] = weights
    return result


def expect_reply(answer: Message | SiteFailure) -> Message:
    assert isinstance(answer, Message), answer
    return answer


def assert_bitwise_equal(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(content(tensor), content(other[name])), name


def content(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def drive(transport: Transport, folder: Path) -> None:
    """What Flower's server app calls."""
    from fedmed.transports.transport import HostSpec

    plan = json.loads((folder / "plan.json").read_text())
    site_ids = tuple(plan["sites"])
    transport.open(HostSpec("unused", {}), site_ids)
    if plan.get("raise"):
        raise PolicyError("the plan says so", hint="write another plan")
    result = run_rounds(transport, site_ids, rounds=plan["rounds"])
    torch.save(result, folder / "result.pt")
    if plan.get("echo_bytes"):
        content = torch.arange(plan["echo_bytes"] // 8)
        echo = Message("echo", {}, {"content": content})
        start = time.monotonic()
        replies = transport.exchange(dict.fromkeys(site_ids, echo), timeout_s=120.0)
        (folder / "echo_s.txt").write_text(f"{time.monotonic() - start:.2f}")
        for reply in replies.values():
            assert torch.equal(expect_reply(reply).tensors["content"], content)
    reasons = {}
    if plan.get("misbehave"):
        header = {"round": 9, "misbehave": plan["misbehave"]}
        ask = Message("train", header, {"weights": torch.ones(40, 30)})
        timeout_s = plan.get("timeout_s", 60.0)
        answers = transport.exchange(dict.fromkeys(site_ids, ask), timeout_s=timeout_s)
        reasons = {
            site: [answer.reason, answer.detail]
            if isinstance(answer, SiteFailure)
            else ["ok", ""]
            for site, answer in answers.items()
        }
    if plan.get("go_on"):
        ask = Message("echo", {}, {})
        start = time.monotonic()
        answers = transport.exchange(dict.fromkeys(site_ids, ask), timeout_s=120.0)
        (folder / "go_on.txt").write_text(f"{time.monotonic() - start:.1f} {answers}")
        for answer in answers.values():
            expect_reply(answer)
    (folder / "reasons.json").write_text(json.dumps(reasons))
