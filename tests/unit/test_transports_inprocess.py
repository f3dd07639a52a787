"""The in-process transport: order, isolation, scrubbed failures, fixed threads."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from fedmed.errors import DataError, FedMedError, PolicyError, WireError
from fedmed.message import Message, SiteFailure, State
from fedmed.transports.failure import describe_failure
from fedmed.transports.inprocess import InProcessTransport
from fedmed.transports.transport import Host, HostSpec

LOG: list[tuple[str, str]] = []
THREADS: list[int] = []
NAMES: list[str] = []
KEPT: list[torch.Tensor] = []
HEADERS: list[Mapping[str, Any]] = []


class Toy:
    """Adds what it is sent to its own tensor, and misbehaves on request."""

    def __init__(self, site_id: str) -> None:
        self.site_id = site_id
        self.total = torch.zeros(3)

    def handle(self, message: Message) -> Message:
        LOG.append((self.site_id, message.kind))
        THREADS.append(torch.get_num_threads())
        if message.kind == "keep":
            KEPT.append(message.tensors["x"])
            HEADERS.append(message.header)
            NAMES.extend(message.tensors)
            return Message("ok")
        if message.kind == "foreign":
            raise FileNotFoundError("/data/DOE_JANE/scan.nii.gz")
        if message.kind == "policy":
            raise PolicyError("kind Weights is not allowed here")
        if message.kind == "exit":
            raise SystemExit(1)
        if message.kind == "interrupt":
            raise KeyboardInterrupt
        if message.kind == "vandal":
            for tensor in message.tensors.values():
                tensor.fill_(99.0)
            return Message("done")
        self.total += message.tensors["x"]
        return Message("total", {"site": self.site_id}, {"total": self.total})

    def close(self) -> None:
        LOG.append((self.site_id, "close"))
        if self.site_id == "bad_closer":
            raise OSError("/data/DOE_JANE")


class TalkingToy(Toy):
    def describe_failure(self, error: BaseException) -> SiteFailure:
        if isinstance(error, PolicyError):
            raise RuntimeError("/data/DOE_JANE")
        return SiteFailure("lost_state", "round 3 is gone", fatal=True)


def open_toy(site_id: str, options: Mapping[str, Any]) -> Host:
    if site_id == "empty":
        raise DataError("site empty has no cases")
    return TalkingToy(site_id) if options.get("talking") else Toy(site_id)


SITES = ("b", "a", "empty", "bad_closer")


@pytest.fixture
def transport() -> Iterator[InProcessTransport]:
    for record in (LOG, THREADS, KEPT, HEADERS, NAMES):
        record.clear()
    with InProcessTransport() as opened:
        opened.open(HostSpec(f"{__name__}:open_toy", {}), SITES)
        yield opened


def ask(kind: str, value: float = 1.0) -> Message:
    return Message(kind, {}, {"x": torch.full((3,), value)})


def failure(answer: object) -> SiteFailure:
    assert isinstance(answer, SiteFailure)
    return answer


def total(answer: object) -> State:
    assert isinstance(answer, Message)
    return dict(answer.tensors)


def test_answers_come_in_sorted_order_and_hosts_keep_state(
    transport: InProcessTransport,
) -> None:
    transport.exchange({"b": ask("add"), "a": ask("add", 2.0)})
    answers = transport.exchange({"b": ask("add"), "a": ask("add", 2.0)})
    assert list(answers) == ["a", "b"]
    assert [site for site, _ in LOG] == ["a", "b", "a", "b"]
    assert total(answers["a"])["total"].tolist() == [4.0] * 3
    assert total(answers["b"])["total"].tolist() == [2.0] * 3


def test_host_cannot_alter_what_the_server_or_another_site_holds(
    transport: InProcessTransport,
) -> None:
    owned, foreign = torch.ones(3), torch.from_numpy(torch.ones(3).numpy().copy())
    message = Message("vandal", {}, {"owned": owned, "foreign": foreign})
    transport.exchange({"a": message, "b": message})
    assert owned.tolist() == [1.0] * 3
    assert foreign.tolist() == [1.0] * 3


def test_replies_do_not_change_when_the_host_works_on(
    transport: InProcessTransport,
) -> None:
    first = total(transport.exchange({"a": ask("add")})["a"])["total"]
    transport.exchange({"a": ask("add")})
    assert first.tolist() == [1.0] * 3
    first.fill_(50.0)
    third = transport.exchange({"a": ask("add")})["a"]
    assert total(third)["total"].tolist() == [3.0] * 3


def test_sent_tensor_may_be_changed_afterwards() -> None:
    KEPT.clear()
    weights = torch.nn.Parameter(torch.ones(3))
    with InProcessTransport() as transport:
        transport.open(HostSpec(f"{__name__}:open_toy", {}), ("a",))
        transport.exchange({"a": Message("keep", {}, {"x": weights})})
    with torch.no_grad():
        weights.sub_(1.0)
    assert KEPT[0].tolist() == [1.0] * 3
    assert not KEPT[0].requires_grad


def test_message_arrives_as_it_would_from_another_machine(
    transport: InProcessTransport,
) -> None:
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    image = image.to(memory_format=torch.channels_last)
    header = {"steps": (1, 2), "loss": float("nan"), "a": None}
    message = Message("keep", header, {"x": image, "b": image})
    transport.exchange({"a": message})
    assert KEPT[0].is_contiguous()
    assert torch.equal(KEPT[0], image)
    assert NAMES == ["b", "x"]
    assert list(HEADERS[0]) == ["a", "loss", "steps"]
    assert HEADERS[0]["steps"] == [1, 2]
    with pytest.raises(WireError, match="cannot send"):
        transport.exchange({"a": Message("keep", {"when": object()})})


def test_foreign_exception_text_stays_inside(transport: InProcessTransport) -> None:
    answers = transport.exchange({"a": ask("foreign"), "b": ask("add")})
    assert failure(answers["a"]) == SiteFailure(
        "raised", "the site raised FileNotFoundError"
    )
    assert total(answers["b"])["total"].tolist() == [1.0] * 3


def test_own_errors_keep_their_words(transport: InProcessTransport) -> None:
    answers = transport.exchange({"a": ask("policy"), "empty": ask("add")})
    assert failure(answers["a"]) == SiteFailure(
        "refused", "kind Weights is not allowed here", fatal=True
    )
    assert failure(answers["empty"]) == SiteFailure("raised", "site empty has no cases")


def test_system_exit_is_the_sites_fault_and_interrupt_is_not(
    transport: InProcessTransport,
) -> None:
    assert failure(transport.exchange({"a": ask("exit")})["a"]).reason == "raised"
    with pytest.raises(KeyboardInterrupt):
        transport.exchange({"a": ask("interrupt")})


def test_host_describes_its_own_failure() -> None:
    spec = HostSpec(f"{__name__}:open_toy", {"talking": True})
    with InProcessTransport() as transport:
        transport.open(spec, ("a",))
        answer = transport.exchange({"a": ask("foreign")})["a"]
        assert answer == SiteFailure("lost_state", "round 3 is gone", fatal=True)
        again = failure(transport.exchange({"a": ask("policy")})["a"])
    assert again.detail == "the site raised RuntimeError"


def test_without_a_host_the_error_speaks() -> None:
    assert describe_failure(None, ValueError("DOE_JANE")).detail == (
        "the site raised ValueError"
    )


def test_threads_are_fixed_and_restored(transport: InProcessTransport) -> None:
    before = torch.get_num_threads()
    transport.open(HostSpec(f"{__name__}:open_toy", {}, threads=3), SITES)
    transport.exchange({"a": ask("add")})
    assert THREADS == [3]
    assert torch.get_num_threads() == before


def test_stranger_is_refused(transport: InProcessTransport) -> None:
    with pytest.raises(FedMedError, match="zoo"):
        transport.exchange({"zoo": ask("add")})


def test_close_twice_closes_every_host_once(
    transport: InProcessTransport, caplog: pytest.LogCaptureFixture
) -> None:
    transport.exchange({site: ask("add") for site in ("a", "b", "bad_closer")})
    transport.close()
    transport.close()
    assert sorted(site for site, what in LOG if what == "close") == [
        "a",
        "b",
        "bad_closer",
    ]
    assert "DOE_JANE" not in caplog.text
    with pytest.raises(FedMedError, match="not open"):
        transport.exchange({"a": ask("add")})
