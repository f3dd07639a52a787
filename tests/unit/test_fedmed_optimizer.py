from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from fedmed.optimizer import (
    OptimizerSpec,
    clip,
    descend,
    memory_like,
    step_in_place,
    sum_of_squares,
)

SPECS = [
    OptimizerSpec("sgd", lr=0.1),
    OptimizerSpec("sgd", lr=0.1, weight_decay=0.01),
    OptimizerSpec("sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
    OptimizerSpec("adam", lr=0.01),
    OptimizerSpec("adam", lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    OptimizerSpec("adamw", lr=0.01, weight_decay=0.1),
]


def start(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "z": torch.randn(3, 2, generator=generator).to(dtype),
        "a": torch.randn(99, generator=generator).to(dtype),
        "kernel": torch.randn(4, 3, 2, 2, generator=generator).to(dtype),
    }


def gradients(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = {name: tensor.shape for name, tensor in start().items()}
    return [
        {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(count)
    ]


def torchs(spec, dtype, count):
    """Weights after `count` steps of the class of `torch.optim`, and its memory."""
    parameters = {name: nn.Parameter(t.clone()) for name, t in start(dtype).items()}
    optimizer = spec.build(list(parameters.values()))
    for gradient in gradients(count, dtype):
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        optimizer.step()
    memory = {
        f"{name}|{slot}": value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if value is not None
    }
    return {name: p.detach() for name, p in parameters.items()}, memory


# Fused kernels round in another order; four steps of entries near 1.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_descending_step_by_step_is_torchs_optimiser_running_on(spec, dtype):
    weights, memory = start(dtype), {}
    for gradient in gradients(4, dtype):
        weights, memory = descend(weights, gradient, spec, memory)
    expected_weights, expected_memory = torchs(spec, dtype, 4)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert set(memory) == set(expected_memory)
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, **tolerance)
    for key, expected in expected_memory.items():
        torch.testing.assert_close(memory[key], expected, **tolerance)


@pytest.mark.parametrize("spec", SPECS)
def test_stepping_in_place_is_descending(spec):
    live = {name: nn.Parameter(t.clone()) for name, t in start().items()}
    weights, memory, own = start(), {}, {}
    for gradient in gradients(3):
        step_in_place(live, gradient | {"unused": None}, spec, own)
        weights, memory = descend(weights, gradient, spec, memory)
    assert all(torch.equal(live[name], weights[name]) for name in weights)
    assert all(torch.equal(own[key], memory[key]) for key in memory)


@pytest.mark.parametrize("spec", SPECS)
def test_the_layout_in_memory_does_not_matter(spec):
    def mixed(state, entries):
        last = {"memory_format": torch.channels_last}
        return {
            name: t.contiguous(**last) if name in entries and t.ndim == 4 else t
            for name, t in state.items()
        }

    plain, turned = (start(), {}), (mixed(start(), {"kernel"}), {})
    for number, gradient in enumerate(gradients(3)):
        plain = descend(plain[0], gradient, spec, plain[1])
        # Contiguous gradients and moments for channels-last weights, and vice versa.
        memory = {key: t.contiguous() for key, t in turned[1].items()}
        turned_gradient = mixed(gradient, {"kernel"} if number % 2 else set())
        turned = descend(turned[0], turned_gradient, spec, memory)
    for expected, seen in zip(plain, turned, strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(seen[name], tensor, rtol=1e-6, atol=1e-6)


def test_no_process_loads_torchs_compiler():
    code = """
import sys, torch
from fedmed.optimizer import OptimizerSpec, descend
from fedmed.training.trainer import Trainer
from types import SimpleNamespace
from fedmed.networks.build import build_network

network = build_network("unet", in_channels=1, num_classes=2, seed=0, base_width=2)
batch = SimpleNamespace(
    images=torch.zeros(2, 1, 8, 8), labels=torch.zeros(2, 8, 8, dtype=torch.long)
)
for name in ("sgd", "adam", "adamw"):
    spec = OptimizerSpec(name)
    loss = torch.nn.functional.cross_entropy
    trainer = Trainer(loss, spec, "a", clip_norm=0.1, precision="bfloat16")
    trainer.train(network, [batch])
    gradient, _ = trainer.gradient(network, batch)
    descend({n: p.detach() for n, p in network.named_parameters()}, gradient, spec, {})
print([m for m in ("torch._dynamo", "sympy") if m in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


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
    weights = {"b|c": torch.zeros(2), "a": torch.zeros(2)}
    gradient = {"a": torch.full((2,), 1.0), "b|c": torch.full((2,), 2.0)}
    _, memory = descend(weights, gradient, spec, {})
    assert memory["b|c|momentum_buffer"].tolist() == [2.0, 2.0]
    assert memory["a|momentum_buffer"].tolist() == [1.0, 1.0]
    moved, _ = descend(weights, gradient, spec, dict(reversed(memory.items())))
    assert moved["b|c"].tolist() == pytest.approx([-0.3, -0.3])


def test_copied_memory_lies_as_its_weights_do():
    weight = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    memory = {"w|exp_avg": torch.randn(2, 3, 2, 2), "w|step": torch.tensor(3.0)}
    copied = memory_like(memory, {"w": weight})
    assert copied["w|exp_avg"].stride() == weight.stride()
    assert all(torch.equal(copied[key], memory[key]) for key in memory)
    copied["w|step"] += 1
    assert memory["w|step"] == 3


def test_clipping_scales_the_global_norm():
    gradient = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])}
    clipped = clip(gradient, 1.0)
    assert clipped["a"].item() == pytest.approx(0.6)
    assert clipped["b"].tolist() == pytest.approx([0.0, 0.8])
    assert clip(gradient, 5.0) is gradient
    assert clip(gradient, None) is gradient
    assert gradient["a"].item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measuring_a_gradient_does_not_change_it(dtype):
    gradient = {"a": torch.tensor([3.0, -4.0], dtype=dtype)}
    assert float(sum_of_squares(gradient)) == 25
    assert torch.equal(
        clip(gradient, 10.0)["a"], torch.tensor([3.0, -4.0], dtype=dtype)
    )
    assert torch.equal(gradient["a"], torch.tensor([3.0, -4.0], dtype=dtype))


def test_the_sum_of_squares_knows_neither_layout_nor_threads():
    generator = torch.Generator().manual_seed(2)
    kernel = torch.randn(64, 32, 9, 9, generator=generator)
    expected = sum_of_squares({"a": kernel})
    torch.testing.assert_close(expected, kernel.double().square().sum())
    turned = kernel.contiguous(memory_format=torch.channels_last)
    assert sum_of_squares({"a": turned}) == expected
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert sum_of_squares({"a": kernel}) == expected
    finally:
        torch.set_num_threads(threads)
