"""A hospital's process is killed between the halves of an episode; training goes on."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmed.episodes import draw_episode
from fedmed.seeds import derive

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
lost = importlib.import_module("tiny.lost")
modules_are_listed_once = runs.modules_are_listed_once

METHODS = {
    "KilledMASF": ("meta_gradient", {"min_count": 1, "clustering": "exact"}),
    "KilledSAML": ("meta_gradient", {"min_count": 1, "smoothness": "exact"}),
    "KilledMLDG": ("curvature", {"inner_lr": 0.3}),
}


def study_of(method, victim, **changes):
    options = {"sync": "step", "victim": victim, **METHODS[method][1]}
    return runs.make_study(
        runs.IMAGE,
        f"tiny.killed:{method}",
        strategy=options,
        tolerance={"quorum": 0.5, "retries": 0},
        **changes,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("role", ["meta_train", "meta_test"])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_process_costs_its_site_and_nothing_else(tmp_path, method, role):
    """Equal, to the last bit, to a site that gives no answer there."""
    action, _ = METHODS[method]
    if (method, role) == ("KilledMLDG", "meta_test"):
        pytest.skip("a meta-test site is not asked for curvature")
    plain = study_of(method, "")
    seed = derive(plain.seed, "strategy", 1)
    episode = draw_episode(replace(runs.Ward(plain).cohort(), rng_seed=seed), 0)
    victim = getattr(episode, role).site_ids[0]
    killing = study_of(method, victim, transport={"name": "workers", "num_workers": 3})
    found = runs.run(killing, tmp_path / "killed")
    silent = lost.LostAt(site=victim, action=action)
    expected = runs.run(plain, tmp_path / "silent", transport=silent)
    first = found.rounds[0]
    assert list(first["failed"]) == [victim]
    assert first["answered"] == [s for s in "abc" if s != victim]
    torch.testing.assert_close(found.server(1), expected.server(1), rtol=0, atol=0)
    torch.testing.assert_close(found.shared, expected.shared, rtol=0, atol=0)
    assert [record["round"] for record in found.rounds] == [1, 2]
    assert all(torch.isfinite(tensor).all() for tensor in found.shared.values())
