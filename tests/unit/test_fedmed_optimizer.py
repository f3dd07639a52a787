from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedmed.optimizer import OptimizerSpec, clip, descend, memory_of, restore_memory

SPECS = [
    OptimizerSpec("sgd", lr=0.1),
    OptimizerSpec("sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
    OptimizerSpec("adam", lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    OptimizerSpec("adamw", lr=0.01, weight_decay=0.1),
]


def start():
    generator = torch.Generator().manual_seed(0)
    return {
        "z": torch.randn(3, 2, generator=generator),
        "a": torch.randn(4, generator=generator),
    }


def gradients(count):
    generator = torch.Generator().manual_seed(1)
    shapes = {name: tensor.shape for name, tensor in start().items()}
    return [
        {
            name: torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_descending_step_by_step_is_torchs_optimiser_running_on(spec):
    parameters = {name: nn.Parameter(t.clone()) for name, t in start().items()}
    optimizer = spec.build(list(parameters.values()))
    weights, memory = start(), {}
    for gradient in gradients(4):
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        optimizer.step()
        weights, memory = descend(weights, gradient, spec, memory)
    for name, parameter in parameters.items():
        assert torch.equal(weights[name], parameter.detach())


@pytest.mark.parametrize("spec", SPECS)
def test_arguments_are_unchanged_and_memory_is_plain_tensors(spec):
    first, second = gradients(2)
    weights, memory = descend(start(), first, spec, {})
    noted = copy.deepcopy((weights, second, memory))
    moved, _ = descend(weights, second, spec, memory)
    for value, before in zip((weights, second, memory), noted, strict=True):
        assert list(value) == list(before)
        assert all(torch.equal(value[name], before[name]) for name in value)
    assert not torch.equal(moved["a"], weights["a"])
    assert bool(memory) == (spec.name != "sgd" or spec.momentum > 0)


def test_entries_without_a_gradient_stand_still_and_keep_their_memory():
    spec = OptimizerSpec("adam", lr=0.1)
    first, second = gradients(2)
    weights, memory = descend(start(), first, spec, {})
    moved, after = descend(weights, {"a": second["a"]}, spec, memory)
    assert torch.equal(moved["z"], weights["z"])
    assert not torch.equal(moved["a"], weights["a"])
    assert set(after) == set(memory)
    assert after["z|step"] == 1
    assert after["a|step"] == 2
    assert torch.equal(after["z|exp_avg"], memory["z|exp_avg"])


def test_memory_goes_to_the_entry_of_its_name_whatever_the_order():
    spec = OptimizerSpec("sgd", lr=0.1, momentum=0.5)
    names = ["a", "b|c"]
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = spec.build(parameters)
    for value, parameter in enumerate(parameters, start=1):
        parameter.grad = torch.full((2,), float(value))
    optimizer.step()
    memory = memory_of(optimizer, names)
    assert memory["b|c|momentum_buffer"].tolist() == [2.0, 2.0]
    turned = spec.build(parameters[::-1])
    restore_memory(turned, names[::-1], memory)
    assert turned.state[parameters[1]]["momentum_buffer"].tolist() == [2.0, 2.0]
    assert turned.state[parameters[0]]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_clipping_scales_the_global_norm():
    gradient = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])}
    clipped = clip(gradient, 1.0)
    assert clipped["a"].item() == pytest.approx(0.6)
    assert clipped["b"].tolist() == pytest.approx([0.0, 0.8])
    assert clip(gradient, 5.0) is gradient
    assert clip(gradient, None) is gradient
    assert gradient["a"].item() == 3.0
