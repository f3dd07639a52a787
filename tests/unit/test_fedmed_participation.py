"""The sites of a round: a pure function of the seed and the round."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fedmed import seeds
from fedmed.errors import ConfigError
from fedmed.participation import draw

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

SITES = ("a", "b", "c")


def test_the_draw_is_what_the_seed_says() -> None:
    rng = seeds.numpy_rng(7, "participation", 4)
    expected = sorted(rng.choice(100, size=9, replace=False))
    assert list(draw(range(100), 9, seed=7, number=4)) == expected
    others = [draw(range(100), 9, seed=s, number=n) for s, n in ((8, 4), (7, 5))]
    assert tuple(expected) not in others


@pytest.mark.parametrize("count", [None, 3, 4])
def test_all_take_part_if_nothing_else_is_asked(count: int | None) -> None:
    assert draw(SITES, count, seed=0, number=1) == SITES


def test_every_subset_is_equally_likely() -> None:
    drawn = Counter(draw("abcde", 2, seed=3, number=n) for n in range(1, 2001))
    counts = [drawn[pair] for pair in combinations("abcde", 2)]
    assert sum(counts) == 2000
    assert chisquare(counts).pvalue > 1e-4  # fixed seed: no chance in this test


def _study(method: str = "scaffold", **changes: Any) -> Any:
    split = {"train": 0.6, "validation": 0.2, "test": 0.2}
    base = {"split": split, "rounds": 4, "sites_per_round": 2}
    return runs.make_study(runs.TABLE, method, **{**base, **changes})


def _expected(number: int) -> list[str]:
    return list(draw(SITES, 2, seed=0, number=number))


def test_a_run_asks_the_drawn_sites_only(tmp_path: Path) -> None:
    transport = runs.Recorder()
    result = runs.run(_study(), tmp_path, transport=transport)
    for record in result.rounds:
        number = record["round"]
        assert record["answered"] == _expected(number)
        down = [(s, m) for s, m in transport.down if m.header["round"] == number]
        trained = [site for site, m in down if m.kind == "training"]
        ended = [site for site, m in down if m.kind == "end_round"]
        assert trained == _expected(number)
        assert ended == (list(SITES) if number == 4 else _expected(number))
    assert {tuple(r["answered"]) for r in result.rounds} > {("a", "b")}


def test_the_end_of_the_draw_does_not_depend_on_the_order_of_replies(
    tmp_path: Path,
) -> None:
    one = runs.run(_study(), tmp_path / "one")
    two = runs.run(_study(), tmp_path / "two", transport=runs.Backwards())
    torch.testing.assert_close(
        one.everything(SITES), two.everything(SITES), rtol=0, atol=0
    )


def test_a_draw_of_all_sites_changes_nothing(tmp_path: Path) -> None:
    """Memory at the server, state at the sites."""
    for method in ("scaffold", "separate"):
        found = [
            runs.run(
                _study(method, sites_per_round=count, rounds=2),
                tmp_path / f"{method}-{count}",
            ).everything(SITES)
            for count in (None, 3)
        ]
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_an_interrupted_draw_goes_on_as_it_would_have(tmp_path: Path) -> None:
    whole = runs.run(_study(), tmp_path / "whole")
    stops = iter([False, False, True])
    runs.run(_study(), tmp_path / "cut", should_stop=lambda: next(stops))
    again = runs.run(_study(), tmp_path / "cut", resume=True)
    torch.testing.assert_close(
        whole.everything(SITES), again.everything(SITES), rtol=0, atol=0
    )
    assert [r["loss"] for r in whole.rounds] == [r["loss"] for r in again.rounds]


def test_the_quorum_is_of_the_drawn_sites(tmp_path: Path) -> None:
    """One of two is enough for a half; one of three would not be."""
    number = next(n for n in range(1, 5) if "b" in _expected(n))
    study = _study(tolerance={"quorum": 0.5, "retries": 0})
    transport = runs.Faulty(site="b", round=number, fault="silent")
    result = runs.run(study, tmp_path, transport=transport)
    record = result.rounds[number - 1]
    assert list(record["failed"]) == ["b"]
    assert record["answered"] == [s for s in _expected(number) if s != "b"]


def test_more_sites_than_there_are(tmp_path: Path) -> None:
    study = _study(sites_per_round=3, split={"held_out": ["b"]})
    with pytest.raises(ConfigError, match=r"sites_per_round is 3, but 2 site\(s\)"):
        runs.run(study, tmp_path)


def test_pooled_training_is_for_all_hospitals(tmp_path: Path) -> None:
    """The virtual site stands for all of them; nothing is left to draw."""
    found = [
        runs.run(
            _study("joint", sites_per_round=count, rounds=1), tmp_path / str(count)
        )
        for count in (None, 2)
    ]
    torch.testing.assert_close(found[0].shared, found[1].shared, rtol=0, atol=0)


def test_scaffold_counts_the_drawn_among_all(tmp_path: Path) -> None:
    """c <- c + (|S| / N) mean (c_k+ - c_k), with |S| = 2 and N = 3."""
    transport = runs.Recorder()
    result = runs.run(_study("scaffold", rounds=1), tmp_path, transport=transport)
    changes = [
        {n.split("/", 2)[2]: t for n, t in m.tensors.items() if "extra/control" in n}
        for _, m in transport.up
        if m.kind == "Weights"
    ]
    assert len(changes) == 2
    for name, found in result.server(1, "control").items():
        both = np.stack([np.asarray(change[name], np.float64) for change in changes])
        expected = 2 / 3 * both.mean(axis=0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-14)
