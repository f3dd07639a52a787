from __future__ import annotations

import hashlib

import numpy as np
import torch

from fedmed.seeds import derive, numpy_rng, torch_rng


def test_a_seed_is_a_fixed_hash_of_its_words():
    """Equal on every machine: written out here, so that a change cannot slip in."""
    text = "int:7\x1fstr:round\x1fint:3"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    assert derive(7, "round", 3) == int.from_bytes(digest, "big") >> 1
    assert 0 <= derive(7, "round", 3) < 2**63


def test_words_of_different_kinds_and_groupings_do_not_collide():
    purposes = [
        (), (1,), ("1",), ("a", "b"), ("ab",), ("b", "a"), ("a", 1), ("a1",), (1, "a"),
    ]  # fmt: skip
    seeds = {derive(root, *words) for root in (0, 1) for words in purposes}
    assert len(seeds) == 2 * len(purposes)


def test_generators_start_at_the_seed_and_leave_global_state_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    drawn = torch.rand(3, generator=torch_rng(1, "x"))
    assert torch.equal(drawn, torch.rand(3, generator=torch_rng(1, "x")))
    assert not torch.equal(drawn, torch.rand(3, generator=torch_rng(1, "y")))
    values = numpy_rng(1, "x").random(3)
    assert np.array_equal(values, numpy_rng(1, "x").random(3))
    assert not np.array_equal(values, numpy_rng(2, "x").random(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
