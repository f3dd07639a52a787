from __future__ import annotations

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.networks.mlp import MLP, impute
from fedmed.networks.normalisation import Norm


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_parameters_are_as_many_as_the_docstring_says():
    model = MLP(13, 2, widths=(64, 32))
    kernels = 26 * 64 + 64 * 32
    assert num_parameters(model) == kernels + 2 * (64 + 32) + (32 * 2 + 2)
    bare = MLP(13, 2, widths=(8,), missing_indicator=False, norm=Norm("none"))
    assert num_parameters(bare) == 13 * 8 + 8 + 8 * 2 + 2


def test_missing_values_become_zero_and_are_told_apart():
    rows = torch.tensor([[1.0, torch.nan], [0.0, 0.0]])
    assert impute(rows, missing_indicator=True).tolist() == [
        [1.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert impute(rows, missing_indicator=False).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_a_missing_value_gives_finite_gradients():
    model = MLP(3, 2, widths=(4,))
    rows = torch.tensor([[1.0, torch.nan, 2.0], [torch.nan, 1.0, 0.5]])
    model(rows).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_without_hidden_layer_it_is_logistic_regression():
    model = MLP(3, 2, widths=(), missing_indicator=False)
    rows = torch.tensor([[1.0, 2.0, 3.0]])
    expected = rows @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(rows), expected)
    assert num_parameters(model) == 3 * 2 + 2


@pytest.mark.parametrize("kind", ["batch", "group", "none", "batch_per_site"])
def test_every_normalisation_of_a_table_works(kind):
    model = MLP(3, 2, widths=(8, 4), norm=Norm(kind, site_ids=("a", "b")))
    assert model(torch.ones(5, 3), site="b").shape == (5, 2)
    assert [n for n, _ in model.named_children()] == ["encoder", "head"]


def test_impossible_widths_are_refused():
    with pytest.raises(ConfigError, match="widths"):
        MLP(3, 2, widths=(0,))
