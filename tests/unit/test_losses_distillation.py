from __future__ import annotations

import pytest
import torch

from fedmed.errors import ConfigError, DataError
from fedmed.losses.build import loss_names
from fedmed.losses.distillation import (
    class_logit_sums,
    hard_labels,
    shared_classes,
    soft_confusion,
    softened_kl,
    symmetric_kl,
)


def test_hard_labels_have_no_gradient_and_stay_unknown_where_labels_are():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0, 1, 2] = 255
    found = hard_labels(logits, labels)
    assert not found.requires_grad
    assert found[0, 1, 2] == 255
    everywhere = hard_labels(logits)
    assert torch.equal(everywhere, logits.argmax(1))
    assert ((found != everywhere).sum()) == 1
    with pytest.raises(DataError):
        hard_labels(logits, labels[:1])


def test_sums_of_batches_add_up_to_those_of_all():
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, 5, 5, 2, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 3, (4, 5, 5, 2), generator=rng)
    whole = class_logit_sums(logits, labels, 3)
    parts = [class_logit_sums(logits[n : n + 2], labels[n : n + 2], 3) for n in (0, 2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    assert torch.equal(parts[0][1] + parts[1][1], whole[1])


def test_sums_take_features_of_any_number_of_channels():
    features, labels = torch.ones(2, 7, 3), torch.tensor([[0, 1, 1], [1, 1, 255]])
    sums, counts = class_logit_sums(features, labels, 2)
    assert sums.shape == (2, 7)
    assert counts.tolist() == [1, 4]
    assert sums[:, 0].tolist() == [1.0, 4.0]


def test_half_precision_is_summed_in_float32():
    logits = torch.full((1, 2, 3000), 1.0, dtype=torch.bfloat16)
    sums, _ = class_logit_sums(logits, torch.zeros(1, 3000, dtype=torch.uint8), 2)
    assert sums.dtype == torch.float32
    assert sums[0].tolist() == [3000.0, 3000.0]  # bfloat16 would have stopped at 256


def test_a_class_seen_too_rarely_is_not_shared():
    counts = torch.tensor([100, 99, 0])
    assert shared_classes(counts, min_count=100).tolist() == [True, False, False]
    assert shared_classes(counts, min_count=0).tolist() == [True, True, False]


def test_what_does_not_fit_is_refused():
    rows = torch.zeros(2, 2)
    with pytest.raises(DataError, match="cannot be compared"):
        symmetric_kl(rows, torch.zeros(3, 3))
    with pytest.raises(DataError, match="cannot be compared"):
        softened_kl(rows, torch.zeros(2, 3))
    for temperature in (0.0, -1.0):
        with pytest.raises(ConfigError, match="temperature"):
            soft_confusion(rows, torch.ones(2, dtype=torch.int64), temperature)
        with pytest.raises(ConfigError, match="temperature"):
            softened_kl(rows, rows, temperature=temperature)


def test_none_of_them_is_a_loss_of_a_study():
    assert "distillation" not in loss_names()


def test_no_voxel_no_disagreement():
    nothing = torch.zeros(2, dtype=torch.bool)
    student, teacher = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    assert softened_kl(student, teacher, known_B=nothing) == 0
