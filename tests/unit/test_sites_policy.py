"""The hospital's policy: each rule refuses, names itself, and lets the rest pass."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed import seeds
from fedmed.errors import ConfigError, PolicyError
from fedmed.message import Message
from fedmed.payload import (
    Card,
    ClassStatistic,
    Embedding,
    Gradient,
    Metrics,
    Weights,
    to_message,
)
from sites.case_names import load_pseudonym_key, pseudonym
from sites.policy import (
    NoisePolicy,
    Policy,
    PolicyContext,
    enforce,
    load_policy,
    require_pooled,
)

KINDS = ("Card", "Metrics", "Weights", "Gradient", "ClassStatistic")
CONTEXT = PolicyContext("a", round=3, pseudonym_key=b"key")


def policy(**rules: Any) -> Policy:
    return Policy.model_validate({"allowed_kinds": KINDS, **rules})


def gradient(*values: float) -> Message:
    return to_message(Gradient(num_examples=5, state={"w": torch.tensor(values)}))


def test_permissive_changes_nothing() -> None:
    message = to_message(
        Metrics(rows=({"case_id": "smith", "dice": math.nan},), values={"x": 1})
    )
    assert enforce(Policy.permissive(), message, context=CONTEXT) == message
    for payload in (Embedding(state={"e": torch.ones(2)}), ClassStatistic(), Card()):
        message = to_message(payload)
        assert (
            enforce(Policy.permissive(), message, context={"site_id": "a"}) == message
        )


def test_a_kind_that_is_not_listed_stays() -> None:
    message = to_message(Embedding(state={"e": torch.ones(2)}))
    with pytest.raises(PolicyError, match=r"an? Embedding message.*'allowed_kinds'"):
        enforce(policy(), message, context=CONTEXT)


def test_max_rounds() -> None:
    limited = policy(max_rounds=2)
    with pytest.raises(PolicyError, match=r"'max_rounds'.*round 3 is after 2"):
        enforce(limited, gradient(1.0), context=CONTEXT)
    enforce(limited, gradient(1.0), context={"site_id": "a", "round": 2})
    enforce(limited, to_message(Card()), context=CONTEXT)


def without_the_count(message: Message) -> Message:
    """How many patients have the rarest class is nobody's business outside."""
    assert message.header["min_count"] > 1
    return replace(message, header={**message.header, "min_count": 1})


@pytest.mark.parametrize(("count", "passes"), [(0, False), (9, False), (10, True)])
def test_s5_small_groups_stay(count: int, passes: bool) -> None:
    message = to_message(ClassStatistic(state={"s": torch.ones(2)}, min_count=count))
    if passes:
        left = enforce(policy(), message, context=CONTEXT)
        assert left == without_the_count(message)
    else:
        with pytest.raises(PolicyError, match=f"ClassStatistic.*'min_count'.*{count} "):
            enforce(policy(), message, context=CONTEXT)


def with_statistic(count: int) -> Message:
    told = {"class_statistic": {"rows": torch.ones(2, 2)}}
    return to_message(
        Weights(5, state={"w": torch.ones(3)}, extra=told, min_count=count)
    )


@pytest.mark.parametrize(("count", "passes"), [(0, False), (9, False), (10, True)])
def test_small_groups_stay_also_when_they_travel_with_weights(
    count: int, passes: bool
) -> None:
    message = with_statistic(count)
    if passes:
        left = enforce(policy(), message, context=CONTEXT)
        assert left == without_the_count(message)
    else:
        with pytest.raises(PolicyError, match=f"Weights.*'min_count'.*{count} "):
            enforce(policy(), message, context=CONTEXT)
    plain = to_message(Weights(5, state={"w": torch.ones(3)}))
    assert enforce(policy(), plain, context=CONTEXT) == plain


def test_weights_with_a_statistic_leave_only_if_both_kinds_may() -> None:
    for kinds in (("Weights",), ("ClassStatistic",)):
        with pytest.raises(PolicyError, match="'allowed_kinds'"):
            enforce(policy(allowed_kinds=kinds), with_statistic(50), context=CONTEXT)
    both = policy(allowed_kinds=("Weights", "ClassStatistic"))
    enforce(both, with_statistic(50), context=CONTEXT)
    other = to_message(Weights(5, extra={"control": {"w": torch.ones(3)}}))
    enforce(policy(allowed_kinds=("Weights",)), other, context=CONTEXT)


def test_max_update_norm() -> None:
    bounded = policy(max_update_norm=5.0)
    enforce(bounded, gradient(3.0, 4.0), context=CONTEXT)
    for values in [(3.0, 4.1), (math.nan, 0.0), (math.inf, 0.0)]:
        with pytest.raises(PolicyError, match=r"Gradient.*'max_update_norm'"):
            enforce(bounded, gradient(*values), context=CONTEXT)


def test_weights_are_measured_from_what_was_received() -> None:
    bounded = policy(max_update_norm=5.0)
    message = to_message(
        Weights(num_examples=5, state={"w": torch.tensor([1003.0, 4.0])})
    )
    context = PolicyContext("a", received={"w": torch.tensor([1000.0, 0.0])})
    enforce(bounded, message, context=context)
    with pytest.raises(PolicyError, match=r"its norm is 1e"):
        enforce(bounded, message, context=PolicyContext("a"))


def test_max_message_bytes_counts_header_and_tensors() -> None:
    small = policy(max_message_bytes=100)
    enforce(small, gradient(1.0), context=CONTEXT)
    with pytest.raises(PolicyError, match=r"'max_message_bytes'"):
        enforce(small, gradient(*[1.0] * 26), context=CONTEXT)
    with pytest.raises(PolicyError, match=r"'max_message_bytes'"):
        enforce(small, Message("Metrics", {"x": "y" * 100}), context=CONTEXT)


ROWS = ({"case_id": "smith_john", "dice": 0.5}, {"case_id": "7", "dice": 0.6})
TELLING = to_message(
    Card(
        values={
            "quarantined": {"smith_john": "smith_john has no mask", "7": "empty"},
            "note": "worst: smith_john",
            "nested": [{"subject_ids": ["7"]}],
        }
    )
)


@pytest.mark.parametrize("rule", ["pseudonym", "drop"])
def test_s1_case_names_do_not_leave(rule: str) -> None:
    context = PolicyContext(
        "a", case_ids=frozenset({"smith_john", "7"}), pseudonym_key=b"key"
    )
    for message in (to_message(Metrics(rows=ROWS)), TELLING):
        out = enforce(policy(case_ids=rule), message, context=context)
        text = json.dumps(dict(out.header))
        assert "smith" not in text
        assert '"7"' not in text
        assert (pseudonym("smith_john", b"key") in text) == (rule == "pseudonym")
    assert [row["dice"] for row in to_message(Metrics(rows=ROWS)).header["rows"]] == [
        0.5,
        0.6,
    ]


def test_pseudonyms_are_stable_and_differ_between_cases() -> None:
    out = enforce(policy(), to_message(Metrics(rows=ROWS * 2)), context=CONTEXT)
    names = [row["case_id"] for row in out.header["rows"]]
    assert names[:2] == names[2:]
    assert names[0] != names[1]


def test_drop_numbers_the_cases_of_a_message() -> None:
    rows = ({"case_id": "b", "dice": 0.1}, {"case_id": "a"}, {"case_id": "b"})
    context = PolicyContext("a", case_ids=frozenset({"a", "b"}))
    out = enforce(
        policy(case_ids="drop"), to_message(Metrics(rows=rows)), context=context
    )
    assert [r["case_id"] for r in out.header["rows"]] == ["case-1", "case-2", "case-1"]
    assert out.header["rows"][0]["dice"] == 0.1


def test_a_number_is_not_mistaken_for_the_name_of_another_case() -> None:
    context = PolicyContext("a", case_ids=frozenset({"case-1", "case-22"}))
    message = to_message(Card(values={"note": "case-22, case-1, case-22"}))
    out = enforce(policy(case_ids="drop"), message, context=context)
    assert "case-1, case-2, case-1" in json.dumps(dict(out.header))


def test_pseudonyms_without_a_key_are_refused_only_if_needed() -> None:
    bare = PolicyContext("a")
    with pytest.raises(PolicyError, match=r"secret key"):
        enforce(policy(), to_message(Metrics(rows=ROWS)), context=bare)
    assert enforce(policy(), gradient(1.0), context=bare).kind == "Gradient"


def test_the_pseudonym_key_is_made_once_and_closed(tmp_path: Path) -> None:
    key = load_pseudonym_key(tmp_path)
    assert len(key) == 32
    assert load_pseudonym_key(tmp_path) == key
    assert (tmp_path / "pseudonym.key").stat().st_mode & 0o777 == 0o600


def test_two_processes_that_make_the_key_at_once_have_one(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "site"
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(load_pseudonym_key, [folder] * 8))
    assert len(set(keys)) == 1
    assert [path.name for path in folder.iterdir()] == ["pseudonym.key"]


def test_noise_clips_to_the_norm_without_noise() -> None:
    clipping = policy(noise={"clip_norm": 1.0, "noise_multiplier": 0.0})
    out = enforce(clipping, gradient(3.0, 4.0), context=CONTEXT)
    torch.testing.assert_close(out.tensors["state/w"], torch.tensor([0.6, 0.8]))
    out = enforce(clipping, gradient(0.3, 0.4), context=CONTEXT)
    assert torch.equal(out.tensors["state/w"], torch.tensor([0.3, 0.4]))


def test_noise_equals_the_mechanism_in_numpy() -> None:
    noisy = policy(noise={"clip_norm": 2.0, "noise_multiplier": 0.5})
    context = PolicyContext("a", 3, "3.0.1", simulation_seed=9)
    out = enforce(noisy, gradient(3.0, 4.0), context=context)
    draw = seeds.numpy_rng(9, "noise", "a", 3, "3.0.1").normal(size=2)
    expected = np.array([3.0, 4.0]) * 2.0 / 5.0 + 0.5 * 2.0 * draw
    np.testing.assert_allclose(out.tensors["state/w"].numpy(), expected, rtol=1e-6)
    assert out.tensors["state/w"].dtype == torch.float32


def test_noise_on_weights_is_on_the_update_and_spares_counters() -> None:
    noisy = policy(noise={"clip_norm": 1.0, "noise_multiplier": 0.0})
    state = {"w": torch.tensor([13.0, 4.0]), "n": torch.tensor(7)}
    message = to_message(Weights(num_examples=5, state=state))
    context = PolicyContext("a", received={"w": torch.tensor([10.0, 0.0])})
    out = enforce(noisy, message, context=context)
    torch.testing.assert_close(out.tensors["state/w"], torch.tensor([10.6, 0.8]))
    assert out.tensors["state/n"].item() == 7
    with pytest.raises(PolicyError, match=r"nothing to measure"):
        enforce(noisy, message, context=PolicyContext("a"))


def test_noise_measures_normalisation_statistics_from_the_received_ones() -> None:
    noisy = policy(noise={"clip_norm": 1.0, "noise_multiplier": 0.0})
    message = to_message(
        Gradient(
            num_examples=5,
            state={"w": torch.tensor([0.0])},
            buffers={"bn.running_var": torch.tensor([100.0, 102.0])},
        )
    )
    received = {"w": torch.tensor([5.0]), "bn.running_var": torch.full((2,), 100.0)}
    out = enforce(noisy, message, context=PolicyContext("a", received=received))
    torch.testing.assert_close(
        out.tensors["buffers/bn.running_var"], torch.tensor([100.0, 101.0])
    )


@pytest.mark.parametrize("payload", ["weights", "buffers"])
def test_noise_leaves_variances_above_zero(payload: str) -> None:
    noisy = policy(noise={"clip_norm": 1.0, "noise_multiplier": 9.0})
    values = {n: torch.ones(200) for n in ("bn.running_var", "bn.running_mean")}
    if payload == "weights":
        message = to_message(Weights(num_examples=5, state=values))
    else:
        message = to_message(Gradient(num_examples=5, buffers=values))
    context = PolicyContext("a", received=values, simulation_seed=9)
    out = enforce(noisy, message, context=context).tensors
    section = "state" if payload == "weights" else "buffers"
    variance = out[f"{section}/bn.running_var"]
    assert float(variance.min()) == pytest.approx(1e-5)
    assert float(variance.max()) > 1.0, "only what is too low is lifted"
    assert float(out[f"{section}/bn.running_mean"].min()) < 0.0


def test_noise_leaves_a_gradient_as_it_is_drawn() -> None:
    noisy = policy(noise={"clip_norm": 1.0, "noise_multiplier": 9.0})
    state = {"bn.running_var": torch.zeros(200)}
    message = to_message(Gradient(num_examples=5, state=state))
    out = enforce(noisy, message, context=CONTEXT).tensors
    assert float(out["state/bn.running_var"].min()) < 0.0


def test_real_noise_has_the_right_size_and_never_repeats() -> None:
    noisy = policy(noise={"clip_norm": 1.0, "noise_multiplier": 2.0})
    message = gradient(*[0.0] * 4000)
    one, two = (
        enforce(noisy, message, context=CONTEXT).tensors["state/w"] for _ in range(2)
    )
    assert not torch.equal(one, two)
    # 4000 draws: the standard error of the deviation is 2 / sqrt(8000) = 0.022.
    assert abs(float(one.std()) - 2.0) < 0.15
    assert torch.equal(message.tensors["state/w"], torch.zeros(4000))


def test_nothing_slips_past_the_noise() -> None:
    noisy = policy(noise={"clip_norm": 1.0, "noise_multiplier": 1.0})
    statistic = to_message(ClassStatistic(state={"s": torch.ones(2)}, min_count=50))
    with pytest.raises(PolicyError, match=r"'noise'.*without noise"):
        enforce(noisy, statistic, context=CONTEXT)
    with pytest.raises(PolicyError, match=r"not finite"):
        enforce(noisy, gradient(math.nan), context=CONTEXT)
    assert enforce(noisy, to_message(Metrics()), context=CONTEXT).kind == "Metrics"


def test_pooling_needs_consent() -> None:
    require_pooled(Policy.permissive(), "a")
    with pytest.raises(PolicyError, match=r"site a: rule 'pooled'"):
        require_pooled(policy(), "a")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return path


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    import sites.policy

    text = (sites.policy.__doc__ or "").split("every key:\n")[1].split("What noise")[0]
    read = load_policy(write(tmp_path, text))
    assert set(Policy.model_fields) == read.model_fields_set
    assert read.allowed_kinds == ("Card", "Metrics", "Weights", "Gradient")
    assert read.noise == NoisePolicy(clip_norm=1.0, noise_multiplier=0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "allowed_kinds: []\nmin_cuont: 3",
            r"unknown key 'min_cuont'(.|\n)*'min_count'",
        ),
        (
            "allowed_kinds: []\nnoise: {clip: 1, noise_multiplier: 1}",
            r"noise\.clip",
        ),
        ("allowed_kinds: [Weight]", r"unknown kind 'Weight'(.|\n)*'Weights'"),
        ("min_count: 3", "allowed_kinds"),
        ("allowed_kinds: []\nmin_count: -1", "min_count"),
        ("allowed_kinds: []\nmax_update_norm: .nan", "max_update_norm"),
        ("allowed_kinds: []\ncase_ids: keeep", "case_ids"),
        ("allowed_kinds: []\nmin_count: 3\nmin_count: 0", "given twice"),
        ("- a", "holds no keys"),
        ("", "holds no keys"),
        ("a: [", "no YAML"),
        ("a: !!python/object/apply:os.getcwd []", "no YAML"),
    ],
)
def test_a_wrong_file_is_a_config_error(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(write(tmp_path, text))
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy none\.yaml"):
        load_policy(tmp_path / "none.yaml")


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_clipped_update_never_exceeds_the_norm(values: list[float]) -> None:
    clipping = policy(noise={"clip_norm": 1.0, "noise_multiplier": 0.0})
    out = enforce(clipping, gradient(*values), context=CONTEXT)
    # Rounding to float32 may add half a unit in the last place per entry.
    assert float(out.tensors["state/w"].double().norm()) <= 1.0 + 1e-6
