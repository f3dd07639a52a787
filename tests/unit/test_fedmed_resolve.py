from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import strategies
from fedmed.errors import ConfigError, ShadowedPackageError
from fedmed.resolve import (
    _convert,
    load_strategy,
    require_own_packages,
    strategy_class,
    strategy_names,
)
from fedmed.strategy import Strategy

sys.path.insert(0, str(Path(__file__).parents[1]))
odd = importlib.import_module("tiny.odd_strategies")


@dataclass(frozen=True)
class Typed(Strategy):
    rate: float = 1.0
    count: int = 1
    flag: bool = False
    pair: tuple[int, ...] = ()
    limit: float | int | None = None
    most: int | None = None
    parts: tuple[str, ...] = ()
    paper: ClassVar[str] = "none"


def test_every_file_is_a_strategy_and_loads_with_defaults():
    files = {path.stem for path in Path(strategies.__path__[0]).glob("*.py")}
    assert set(strategy_names()) == files - {"__init__", "server_app"}
    assert list(strategy_names()) == sorted(strategy_names())
    for name in strategy_names():
        assert type(load_strategy(name, {})) is strategy_class(name)


def test_a_strategy_from_anywhere_is_loaded_by_its_full_name():
    found = load_strategy("tiny.odd_strategies:DoubledSite", {"sync": "step"})
    assert type(found) is odd.DoubledSite


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fedavgg", "did you mean 'fedavg'"),
        ("zzz", ", fedadam, fedavg"),
        ("no_such_package.module:Class", "cannot be imported"),
        ("tiny.odd_strategies:Missing", "cannot be imported"),
        ("tiny.odd_strategies:NO_STRATEGY", "not a subclass"),
        ("fedmed.study:Study", "not a subclass"),
    ],
)
def test_a_wrong_name_is_explained(name, told):
    with pytest.raises(ConfigError, match=told):
        strategy_class(name)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("fedprox", {"mus": 1}, "unknown key 'strategy.mus'.*'mu'"),
        ("fedprox", {"mu": "a lot"}, r"strategy\.mu must be a number.*'a lot'"),
        ("fedprox", {"mu": True}, r"strategy\.mu must be a number"),
        ("fedprox", {"mu": float("nan")}, r"strategy\.mu must be a number"),
        ("fedavg", {"weighting": "cases"}, "examples, uniform.*'cases'"),
        ("fedavg", {"sync": "epoch"}, "step, round.*'epoch'"),
        ("joint", {"sync": "step"}, "no sync: step; it has round"),
        ("masf", {"tensor_clip": "much"}, r"tensor_clip must be a number.*'much'"),
        ("masf", {"num_meta_test": "two"}, r"num_meta_test must be a whole number"),
        ("mldg", {"num_meta_test": 1.5}, r"num_meta_test must be a whole number"),
        ("mldg", {"num_meta_test": True}, r"num_meta_test must be a whole number"),
        ("mldg", {"num_meta_test": 0}, r"num_meta_test must be >= 1"),
        ("saml", {"num_meta_train": -1}, r"num_meta_train must be >= 1"),
        ("meta_reg", {"num_meta_test": 0}, r"num_meta_test must be >= 1"),
        ("meta_reg", {"phase_one_rounds": 1.5}, "phase_one_rounds must be a whole"),
        ("masf", {"metric_widths": "24,16"}, r"metric_widths must be a whole number"),
        ("epi_fcr", {"head": 5}, r"head must be a list of names.*5"),
    ],
)
def test_a_wrong_option_is_explained(name, options, told):
    with pytest.raises(ConfigError, match=told):
        load_strategy(name, options)


def test_numbers_are_taken_as_yaml_gives_them():
    given = {"rate": "1e-3", "count": 4.0, "flag": True, "pair": [1, 2]}
    converted = _convert(Typed, given)
    assert converted == {"rate": 0.001, "count": 4, "flag": True, "pair": (1, 2)}
    assert type(converted["count"]) is int
    several = {"limit": "1e1", "most": "3", "parts": "head", "pair": 7}
    wanted = {"limit": 10.0, "most": 3, "parts": ("head",), "pair": (7,)}
    assert _convert(Typed, several) == wanted
    assert _convert(Typed, {"limit": None, "most": None}) == {
        "limit": None,
        "most": None,
    }
    assert type(_convert(Typed, {"limit": 2})["limit"]) is int
    assert type(_convert(Typed, {"rate": 1})["rate"]) is float
    for wrong in ({"count": 2.5}, {"count": "inf"}, {"count": None}, {"flag": "yes"}):
        with pytest.raises(ConfigError, match="must be"):
            _convert(Typed, wrong)


def test_a_folder_that_shadows_a_package_is_noticed(tmp_path):
    require_own_packages()
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "__init__.py").touch()
    code = (
        "from fedmed.resolve import require_own_packages\n"
        f"from fedmed.errors import {ShadowedPackageError.__name__} as Shadowed\n"
        "try:\n    require_own_packages()\nexcept Shadowed as error:\n"
        "    assert \"'sites'\" in str(error)\n    raise SystemExit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 7
