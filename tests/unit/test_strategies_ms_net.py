from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.message import SiteFailure
from strategies.ms_net import MSNet

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = ("a", "b", "c")
ALONE = {"auxiliary_weight": 0, "kd_weight": 0, "label_weight": 1}
"""No step A, no distillation."""


def study_of(sync="step", *, method="ms_net", strategy=None, **changes):
    return runs.make_study(
        runs.IMAGE, method, strategy={"sync": sync, **(strategy or {})}, **changes
    )


def kept_of(result, site):
    return result.private(site).states["kept"]


def part_of(state, part):
    return {n: t for n, t in state.items() if n.partition(".")[0] == part}


def entry_of(name):
    """`state/encoder...` -> `encoder...`."""
    return name.partition("/")[2]


@pytest.mark.parametrize("sync", ["step", "round"])
def test_nothing_of_normalisation_or_auxiliaries_travels(tmp_path, sync):
    transport = runs.Recorder()
    result = runs.run(study_of(sync), tmp_path, transport=transport)
    kept = set(kept_of(result, "a"))
    assert any(name.startswith("auxiliary.") for name in kept)
    assert any(name.startswith("decoder.") for name in kept)
    for _, message in (*transport.down, *transport.up):
        entries = {entry_of(name) for name in message.tensors}
        assert not entries & kept
        assert not [n for n in message.tensors if "auxiliary" in n or "norm" in n]
        assert not [n for n in message.header.get("values", {}) if "label" in n]


def test_what_leaves_in_each_exchange_and_how_much_it_is(tmp_path):
    transport = runs.Recorder()
    result = runs.run(study_of(), tmp_path, transport=transport)
    shared = result.shared
    encoder = part_of(shared, "encoder")
    assert 0 < len(encoder) < len(shared)
    for asked, wanted in (("auxiliary", encoder), ("universal", shared)):
        size = 4 * sum(tensor.numel() for tensor in wanted.values())
        down = [m for _, m in transport.down if m.kind == asked]
        assert len(down) == 3 * 2 * 2  # sites, rounds, steps
        for message in down:
            assert {entry_of(n) for n in message.tensors} == set(wanted)
            assert sum(t.numel() for t in message.tensors.values()) * 4 == size
    up = [m for _, m in transport.up if m.kind not in {"Card", "Metrics"}]
    assert {message.kind for message in up} == {"Gradient"}
    half = len(SITES)
    for number, message in enumerate(up):
        wanted = encoder if number // half % 2 == 0 else shared
        assert {entry_of(n) for n in message.tensors} == set(wanted)
        assert set(message.header["values"]) == {"loss"}


def test_the_server_adds_gradients_up(tmp_path):
    """Step A under SGD: the encoder moves by the learning rate times the sum."""
    ward = runs.Ward(study_of(train={"local_steps": 1}))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    replies = ward.answer(next(half))
    second = half.send(replies)
    for name, sent in second.content["weights"].items():
        moves = [reply.state[name] for reply in replies.values() if name in reply.state]
        assert len(moves) == (3 if name.startswith("encoder") else 0)
        expected = ward.server.shared[name] - 0.05 * sum(moves, torch.zeros(()))
        torch.testing.assert_close(sent, expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("sync", ["step", "round"])
def test_without_auxiliaries_it_is_dsbn_bit_for_bit(tmp_path, sync, optimizer):
    train = {"optimizer": {"name": optimizer, "lr": 0.01}}
    found = runs.run(study_of(sync, strategy=ALONE, train=train), tmp_path / "ms")
    plain = study_of(sync, method="dsbn", train=train)
    expected = runs.run(plain, tmp_path / "dsbn")
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=0)
    for site in SITES:
        own = kept_of(found, site)
        wanted = kept_of(expected, site)
        assert {n for n in own if not n.startswith("auxiliary")} == set(wanted)
        torch.testing.assert_close({n: own[n] for n in wanted}, wanted, rtol=0, atol=0)


def test_without_distillation_the_auxiliaries_still_move_the_encoder(tmp_path):
    one = runs.run(
        study_of("round", strategy={**ALONE, "auxiliary_weight": 1}), tmp_path / "1"
    )
    none = runs.run(study_of("round", strategy=ALONE), tmp_path / "0")
    name = "encoder.levels.0.conv1.weight"
    assert not torch.equal(one.shared[name], none.shared[name])


@pytest.mark.parametrize("sync", ["step", "round"])
def test_the_warm_up_counts_steps_over_all_rounds(tmp_path, sync):
    """Two steps a round, three of warm-up: the second round trains one step of B."""
    study = study_of(sync, strategy={"warmup_steps": 3}, checkpoint={"every": 1})
    result = runs.run(study, tmp_path)
    start = runs.Ward(study).server.shared
    decoder = set(part_of(start, "decoder")) | set(part_of(start, "head"))
    for number, moved in ((1, set()), (2, decoder)):
        after = result.server(number)
        names = {n for n in decoder if not torch.equal(after[n], start[n])}
        assert names == moved
        assert not torch.equal(
            after["encoder.levels.0.conv1.weight"],
            start["encoder.levels.0.conv1.weight"],
        )
    if sync == "step":
        assert [record["exchanges"] for record in result.rounds] == [2 + 1, 3 + 1]
    counts = {
        part: {
            int(t)
            for n, t in part_of(kept_of(result, "a"), part).items()
            if "num_" in n
        }
        for part in ("encoder", "auxiliary", "decoder")
    }
    # Both forwards of a step update the statistics of what they pass through.
    assert counts == {"encoder": {4 + 1}, "auxiliary": {4 + 1}, "decoder": {1}}


def test_a_warm_up_that_never_ends_leaves_the_decoder_alone(tmp_path):
    study = study_of("round", strategy={"warmup_steps": 99, "auxiliary_weight": 0})
    result = runs.run(study, tmp_path)
    start = runs.Ward(study).server.shared
    # The mean of three equal numbers may differ in the last bit.
    torch.testing.assert_close(result.shared, dict(start))


@pytest.mark.parametrize("sync", ["step", "round"])
def test_auxiliaries_start_equal_and_go_their_own_ways(tmp_path, sync):
    study = study_of(sync)
    start = runs.Ward(study).benches["a"].initial
    auxiliary = "auxiliary.decoder.levels.0.conv1.weight"
    assert not torch.equal(start[auxiliary], start["decoder.levels.0.conv1.weight"])
    for bench in runs.Ward(study).benches.values():
        assert torch.equal(bench.initial[auxiliary], start[auxiliary])
    result = runs.run(study, tmp_path)
    ends = [kept_of(result, site)[auxiliary] for site in SITES]
    assert not torch.equal(ends[0], ends[1])
    assert not any(torch.equal(end, start[auxiliary]) for end in ends)


def test_both_optimisers_remember_the_encoder_at_server_and_site(tmp_path):
    train = {"optimizer": {"name": "adam", "lr": 0.01}}
    result = runs.run(study_of(train=train), tmp_path)
    steps = {}
    for phase in ("auxiliary_optimizer", "universal_optimizer"):
        memory = result.server(2, phase)
        steps[phase] = {n for n in memory if n.endswith("|step")}
        assert {float(memory[name]) for name in steps[phase]} == {4.0}
        own = result.private("b").states[phase]
        assert {n for n in own if n.startswith("encoder")}
        assert any("auxiliary." in n for n in own) == (phase == "auxiliary_optimizer")
    assert steps["auxiliary_optimizer"] == {
        n for n in steps["universal_optimizer"] if n.startswith("encoder")
    }


@pytest.mark.parametrize("keep", ["keep", "reset"])
def test_optimisers_of_rounds_are_kept_if_the_study_says_so(tmp_path, keep):
    adam = {"name": "adam", "lr": 0.01}
    train = {"optimizer": adam, "optimizer_state": keep}
    result = runs.run(study_of("round", train=train), tmp_path)
    states = result.private("b").states
    found = {name for name in states if name.endswith("optimizer")}
    if keep == "reset":
        assert not found
        return
    assert found == {"auxiliary_optimizer", "universal_optimizer"}
    memory = states["universal_optimizer"]
    assert float(memory["encoder.levels.0.conv1.weight|step"]) == 4.0


class LostInB(runs.InProcessTransport):
    """Site b does not answer step B of the first round."""

    def exchange(self, messages, **how):
        answers = super().exchange(messages, **how)
        sent = messages.get("b")
        if sent is not None and sent.kind == "universal" and sent.header["round"] == 1:
            answers["b"] = SiteFailure("died", "it was switched off")
        return answers


def test_a_site_lost_between_the_exchanges(tmp_path):
    """Its part of step A stays, step B is the others' sum, its round is dropped."""
    study = study_of(
        train={"local_steps": 1},
        rounds=1,
        tolerance={"quorum": 0.5, "retries": 0},
    )
    result = runs.run(study, tmp_path, transport=LostInB())
    assert list(result.rounds[0]["failed"]) == ["b"]
    assert result.rounds[0]["answered"] == ["a", "c"]
    ward = runs.Ward(study)
    half = ward.strategy.run_round(ward.server, ward.cohort())
    request = half.send(ward.answer(next(half)))
    replies = ward.answer(request)
    replies.pop("b")
    with pytest.raises(StopIteration) as end:
        half.send(replies)
    expected = dict(end.value.value.shared)
    torch.testing.assert_close(result.shared, expected, rtol=0, atol=0)
    assert not result.private("b").states
    assert result.private("a").states


def test_a_site_lost_between_the_exchanges_comes_back(tmp_path):
    study = study_of(tolerance={"quorum": 0.5, "retries": 0})
    result = runs.run(study, tmp_path, transport=LostInB())
    assert result.rounds[1]["answered"] == ["a", "b", "c"]
    counts = {
        site: int(kept_of(result, site)["encoder.levels.0.norm1.num_batches_tracked"])
        for site in SITES
    }
    assert counts == {"a": 8, "b": 4, "c": 8}


def test_too_few_sites_in_b_start_the_round_again(tmp_path):
    """Nothing of the failed attempt is left: neither at the server nor at a site."""

    class OnlyOnce(LostInB):
        calls = 0

        def exchange(self, messages, **how):
            if {m.kind for m in messages.values()} == {"universal"}:
                self.calls += 1
                if self.calls > 1:
                    return runs.InProcessTransport.exchange(self, messages, **how)
            return super().exchange(messages, **how)

    study = study_of(tolerance={"quorum": 1.0, "retries": 1})
    again = runs.run(study, tmp_path / "again", transport=OnlyOnce())
    assert again.rounds[0]["retries"] == 1
    undisturbed = runs.run(study, tmp_path / "once")
    torch.testing.assert_close(
        again.everything(SITES), undisturbed.everything(SITES), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be >= 0"),
        ({"kd_weight": -0.5}, "kd_weight must be >= 0"),
        ({"auxiliary_weight": float("nan")}, "auxiliary_weight must be >= 0"),
        ({"label_weight": 0, "kd_weight": 0}, "both 0"),
    ],
)
def test_impossible_constants_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MSNet(**options)


def test_a_network_without_decoder_is_refused():
    study = runs.make_study(runs.TABLE, "ms_net")
    with pytest.raises(ConfigError, match="encoder, decoder, head"):
        runs.Ward(study)


def test_distilling_alone_is_allowed_and_uses_no_label_in_step_b():
    strategy = MSNet(label_weight=0, kd_weight=1)
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    loss = torch.nn.functional.cross_entropy
    values = {
        float(strategy.universal_loss(logits, logits, torch.tensor(y), loss=loss))
        for y in ([0, 1], [1, 0])
    }
    assert len(values) == 1
