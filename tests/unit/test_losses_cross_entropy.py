from __future__ import annotations

import pytest
import torch

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError
from fedmed.losses.cross_entropy import cross_entropy


def test_weights_multiply_and_do_not_normalise():
    logits = torch.zeros(1, 2, 2, 2)
    labels = torch.tensor([[[0, 0], [0, 1]]])
    plain = cross_entropy(logits, labels)
    weighted = cross_entropy(logits, labels, class_weights=[1.0, 3.0])
    torch.testing.assert_close(weighted, plain * (3 * 1.0 + 3.0) / 4)


def test_a_class_that_the_model_excludes_does_no_harm():
    logits = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert not gradient.any()


def test_the_mean_is_over_known_voxels():
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.full((1, 4, 4), UNKNOWN_LABEL)
    labels[0, 0, 0] = 2
    expected = -torch.log_softmax(logits[:, :, 0, 0], dim=1)[0, 2]
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def test_confident_and_wrong_stays_finite_with_a_gradient():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 2e4
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]]
)
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigError, match="class_weights"):
        cross_entropy(torch.zeros(1, 2), torch.tensor([0]), class_weights=weights)
