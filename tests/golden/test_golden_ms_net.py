"""MS-Net's losses and one site's training from its equations, without our engine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedmed.losses.dice_linear import dice_linear
from fedmed.networks.build import build_network
from strategies.ms_net import MSNet

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def dice(z_NL, y_N):
    """1 - (1/C) sum_c 2 sum p y / (sum p + sum y + 1e-7)."""
    p, y = softmax(z_NL), np.eye(z_NL.shape[1])[y_N]
    terms = 2 * (p * y).sum(axis=0) / (p.sum(axis=0) + y.sum(axis=0) + 1e-7)
    return 1 - terms.mean()


def test_the_loss_of_step_b():
    """Half the Dice loss at the labels, half at the auxiliary's likeliest classes."""
    rng = np.random.default_rng(2)
    z, teacher = (rng.normal(size=(2, 2, 4, 3)) for _ in range(2))
    y = rng.integers(0, 2, (2, 4, 3))
    flat = [np.moveaxis(a, 1, -1).reshape(-1, 2) for a in (z, teacher)]
    hard = flat[1].argmax(axis=1)
    assert (hard != y.ravel()).any()
    expected = 0.5 * dice(flat[0], y.ravel()) + 0.5 * dice(flat[0], hard)
    logits, of_teacher = (torch.tensor(a, requires_grad=True) for a in (z, teacher))
    found = MSNet().universal_loss(
        logits, of_teacher, torch.tensor(y), loss=dice_linear
    )
    np.testing.assert_allclose(found.item(), expected, rtol=0, atol=1e-12)
    found.backward()
    assert logits.grad is not None
    assert of_teacher.grad is None
    halves = MSNet(label_weight=0.2, kd_weight=3).universal_loss(
        logits, of_teacher, torch.tensor(y), loss=dice_linear
    )
    other = 0.2 * dice(flat[0], y.ravel()) + 3 * dice(flat[0], hard)
    np.testing.assert_allclose(halves.item(), other, rtol=0, atol=1e-12)


OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sync", ["step", "round"])
def test_one_site_is_the_published_schedule(tmp_path, sync, name):
    """Two rounds of two steps with one of warm-up: A, then A B A B A B."""
    make, options = OPTIMIZERS[name]
    study = runs.make_study(
        runs.IMAGE,
        "ms_net",
        strategy={"sync": sync, "warmup_steps": 1},
        sites={"include": ["b"]},
        train={
            "loss": "dice_linear",
            "precision": "float64",
            "optimizer": {"name": name, **options},
            "optimizer_state": "keep",
        },
    )
    result = runs.run(study, tmp_path)
    found = result.shared | result.private("b").states["kept"]
    bench = runs.Ward(study).benches["b"]
    start, plain = bench.initial, plain_networks(bench)
    encoder, decoder, branch = plain
    first = make([*encoder.parameters(), *branch.parameters()], **options)
    second = make([*encoder.parameters(), *decoder.parameters()], **options)
    for step in range(4):
        batch = bench.batch(1 + step // 2, step % 2)
        x, y = batch.images.double(), batch.labels.long()
        first.zero_grad()
        dice_of(decoded(branch, encoder(x)), y).backward()
        first.step()
        if step >= 1:
            second.zero_grad()
            features = encoder(x)  # fresh: step A has moved the encoder
            pseudo = decoded(branch, features).argmax(1)
            logits = decoded(decoder, features)
            (0.5 * dice_of(logits, y) + 0.5 * dice_of(logits, pseudo)).backward()
            second.step()
    expected = {f"encoder.{n}": t for n, t in encoder.state_dict().items()}
    expected |= decoder.state_dict()
    expected |= {f"auxiliary.{n}": t for n, t in branch.state_dict().items()}
    assert set(found) == set(expected) == set(start)
    for entry, tensor in expected.items():
        # A sum of a few hundred float64 steps of arithmetic.
        torch.testing.assert_close(found[entry], tensor, rtol=0, atol=1e-12)
        assert not torch.equal(tensor, start[entry]), entry


def plain_networks(bench):
    """Encoder, decoder with head, and auxiliary, from their initial entries."""
    parts = {"in_channels": 1, "num_classes": 2, "base_width": 2, "levels": 2}
    unets = [build_network("unet", **parts, seed=0).double() for _ in range(2)]
    start = bench.initial
    own = {n: t for n, t in start.items() if not n.startswith("auxiliary")}
    unets[0].load_state_dict(own)
    pairs = [
        torch.nn.ModuleDict({"decoder": unet.decoder, "head": unet.head})
        for unet in unets
    ]
    cut = len("auxiliary.")
    pairs[1].load_state_dict(
        {n[cut:]: t for n, t in start.items() if n.startswith("auxiliary")}
    )
    return unets[0].encoder, *pairs


def decoded(pair, features):
    return pair["head"](pair["decoder"](features))


def dice_of(logits, y):
    p, one_hot = logits.softmax(1), functional.one_hot(y, 2).movedim(-1, 1)
    axes = (0, 2, 3)
    overlap = 2 * (p * one_hot).sum(axes)
    return 1 - (overlap / (p.sum(axes) + one_hot.sum(axes) + 1e-7)).mean()
