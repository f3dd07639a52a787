from __future__ import annotations

import pickle

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.losses.build import build_loss, loss_names
from fedmed.losses.cross_entropy import cross_entropy
from fedmed.losses.dice_linear import dice_linear

LOGITS = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))


def test_the_losses_are_found():
    assert loss_names() == [
        "cross_entropy",
        "cross_entropy_by_frequency",
        "dice_linear",
        "dice_quadratic",
    ]


def test_a_sum_is_the_sum_and_options_go_where_they_belong():
    weights = [1.0, 2.0, 3.0]
    loss = build_loss(
        "dice_linear + cross_entropy", smooth_numerator=1.0, class_weights=weights
    )
    expected = dice_linear(LOGITS, LABELS, smooth_numerator=1.0) + cross_entropy(
        LOGITS, LABELS, class_weights=weights
    )
    assert torch.equal(loss(LOGITS, LABELS), expected)


def test_a_loss_survives_a_pickle():
    loss = build_loss("dice_linear+cross_entropy", smooth_denominator=1.0)
    copy = pickle.loads(pickle.dumps(loss))
    assert torch.equal(loss(LOGITS, LABELS), copy(LOGITS, LABELS))


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("dice_liner", {}, "Did you mean 'dice_linear'"),
        ("build", {}, "Known: cross_entropy"),
        ("", {}, "Known: cross_entropy"),
        ("dice_linear+", {}, "Known: cross_entropy"),
        ("dice_linear+dice_linear", {}, "once"),
        ("dice_linear", {"smooth_numerater": 1.0}, "Did you mean 'smooth_numerator'"),
        ("dice_linear", {"class_weights": [1.0]}, "Known: smooth_denominator"),
        ("dice_linear", {"logits_BL": 1.0}, "Known: smooth_denominator"),
    ],
)
def test_wrong_names_and_options_are_refused_with_a_hint(name, options, hint):
    with pytest.raises(ConfigError) as caught:
        build_loss(name, **options)
    assert hint in caught.value.hint
