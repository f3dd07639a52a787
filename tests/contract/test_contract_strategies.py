"""What every strategy promises; new files in `strategies` are found and held to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fedmed.checkpoint import Checkpoints
from fedmed.errors import ConfigError, QuorumError
from fedmed.payload import KINDS, from_message, to_message
from fedmed.prove import prove
from fedmed.resolve import load_strategy, strategy_class, strategy_names
from fedmed.strategy import POOLED_SITE

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

NAMES = strategy_names()
CLASSES = {name: strategy_class(name) for name in NAMES}
CASES = [(name, sync) for name in NAMES for sync in CLASSES[name].syncs]
EXACT = [name for name in NAMES if CLASSES[name].exact]
every_case = pytest.mark.parametrize(("name", "sync"), CASES)
every_name = pytest.mark.parametrize("name", NAMES)

HOSPITALS = ("a", "b", "c")


def study_of(name, sync, **changes):
    """Three hospitals, two rounds, the method's own defaults."""
    if CLASSES[name].needs_public:
        public = {"with_public": True, "public": "p"}
        changes = {**changes, "sites": {**public, **changes.get("sites", {})}}
    return runs.make_study(runs.IMAGE, name, strategy={"sync": sync}, **changes)


def sites_of(name):
    return (POOLED_SITE,) if CLASSES[name].pools_data else HOSPITALS


@functools.cache
def reference(name, sync):
    """The undisturbed run, with all messages noted."""
    recorder = runs.Recorder()
    folder = Path(tempfile.mkdtemp(dir=runs.CACHE))
    result = runs.run(study_of(name, sync), folder / "run", transport=recorder)
    return result, recorder


def flat(value, prefix=""):
    """All tensors of nested values, by path; other values as they are."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        value = {field: getattr(value, field) for field in names}
    if isinstance(value, Mapping):
        items = [flat(item, f"{prefix}/{key}") for key, item in value.items()]
        return {path: leaf for item in items for path, leaf in item.items()}
    # A method of a copied strategy is another method, of the same code.
    return {prefix: getattr(value, "__func__", value)}


def assert_same(found, expected):
    """Bitwise, names, dtypes and all."""
    found, expected = flat(found), flat(expected)
    assert list(found) == list(expected)
    for path, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[path].dtype == value.dtype, path
            assert torch.equal(found[path], value), path
        else:
            assert found[path] == value, path


def assert_same_runs(found, expected, name):
    site_ids = sites_of(name)
    assert_same(found.everything(site_ids), expected.everything(site_ids))
    last = expected.rounds[-1]["round"]
    states = [
        Checkpoints(result.folder.checkpoints).load(last).states
        for result in (found, expected)
    ]
    assert_same(*states)
    for one, other in zip(found.rounds, expected.rounds, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    cases = (found.folder.cases_file, expected.folder.cases_file)
    assert cases[0].read_text() == cases[1].read_text()


def payloads(recorder):
    """What answered the strategy's own actions."""
    return [m for _, m in recorder.up if m.kind not in {"Card", "Metrics"}]


CHEAPER_LATER = {("meta_reg", "step"): 1, ("meta_reg", "round"): 1}
"""Methods of two phases: the price of the second, in the second of two rounds."""


@every_case
def test_defaults_run_at_the_price_that_is_stated(name, sync):
    result, _ = reference(name, sync)
    assert [record["round"] for record in result.rounds] == [1, 2]
    stated = CLASSES[name].exchanges[sync]
    prices = (stated, CHEAPER_LATER.get((name, sync), stated))
    once = CLASSES[name].first_round_exchanges.get(sync, 0)
    for record, price in zip(result.rounds, prices, strict=True):
        per_round = price * (2 if sync == "step" else 1)
        per_round += once if record["round"] == 1 else 0
        assert tuple(record["answered"]) == sites_of(name)
        # The end of a round is an exchange where sites evaluate or file something.
        assert record["exchanges"] - per_round in (0, 1)
        assert all(math.isfinite(loss) for loss in record["loss"].values())
        assert set(record["loss"]) == set(sites_of(name))
    assert result.rounds[-1]["exchanges"] == per_round + 1
    entries = result.everything(sites_of(name))
    start = runs.Ward(study_of(name, sync)).benches[sites_of(name)[0]].initial
    moved = [
        path
        for path, tensor in entries.items()
        if not torch.equal(tensor, start.get(path.rpartition(":")[2], tensor))
    ]
    assert len(moved) >= len(start) / 2
    assert all(torch.isfinite(tensor).all() for tensor in entries.values())


@every_name
def test_it_says_where_it_comes_from_and_what_leaves(name):
    cls = CLASSES[name]
    assert len(cls.paper) > 10
    assert cls.leaves_site
    for line in cls.leaves_site:
        kind, colon, what = line.partition(": ")
        assert kind in KINDS
        assert colon
        assert len(what) > 5
    text = inspect.getdoc(cls) or ""
    for section in ("Leaves the site:", "Exchanges:", "Differs from the source:"):
        assert section in text
    assert set(cls.exchanges) == set(cls.syncs)
    assert all(count >= 1 for count in cls.exchanges.values())


@every_case
def test_only_declared_kinds_leave_and_only_shared_entries(name, sync):
    result, recorder = reference(name, sync)
    declared = {line.partition(":")[0] for line in CLASSES[name].leaves_site}
    replies = payloads(recorder)
    assert replies
    assert {message.kind for message in replies} <= declared
    shared = set(result.shared)
    model_kinds = [m for m in replies if m.kind in {"Weights", "Gradient"}]
    names = {name.split("/", 1)[1] for m in model_kinds for name in m.tensors}
    statistics = ("class_statistic/", "amplitude_statistic/")
    extra = ("control/", "signs/", "site_classifier/", *statistics)
    assert {n for n in names if not n.startswith(extra)} <= shared


@every_case
def test_what_sites_keep_is_declared(name, sync):
    result, _ = reference(name, sync)
    keeps = any(result.private(site).states for site in sites_of(name))
    if keeps:
        assert CLASSES[name].kept_by_site
        assert "Kept by the site:" in (inspect.getdoc(CLASSES[name]) or "")


@every_case
def test_replies_do_not_grow_with_the_number_of_voxels(name, sync, tmp_path):
    large = study_of(name, sync, sites={"size": 16})
    asked = iter([False, True])  # stop after the first of two rounds
    result = runs.run(large, tmp_path, should_stop=lambda: next(asked))
    bytes_up = result.rounds[0]["bytes_up"]
    expected = reference(name, sync)[0].rounds[0]["bytes_up"]
    assert {site: bytes_up[site] for site in expected} == expected


@every_case
def test_the_order_of_sites_changes_no_bit(name, sync, tmp_path):
    study = study_of(name, sync, sites={"backwards": not CLASSES[name].pools_data})
    result = runs.run(study, tmp_path, transport=runs.Backwards())
    assert_same_runs(result, reference(name, sync)[0], name)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_process_for_each_site_changes_no_bit(tmp_path):
    """One method with private state and several exchanges stands for all."""
    study = study_of(
        "scaffold", "step", transport={"name": "ray", "num_workers": len(HOSPITALS)}
    )
    result = runs.run(study, tmp_path)
    assert_same_runs(result, reference("scaffold", "step")[0], "scaffold")


@every_case
def test_a_run_that_is_stopped_and_resumed_changes_no_bit(name, sync, tmp_path):
    study = study_of(name, sync)
    asked = iter([False, True])
    runs.run(study, tmp_path, should_stop=lambda: next(asked))
    assert not (tmp_path / "summary.json").exists()
    result = runs.run(study, tmp_path, resume=True)
    assert_same_runs(result, reference(name, sync)[0], name)


@every_case
def test_values_come_in_and_go_out_unchanged(name, sync):
    """Nothing that a strategy is given is written to, and nothing stays on it."""
    ward = runs.Ward(study_of(name, sync))
    cohort, server = ward.cohort(), ward.server
    half = ward.strategy.run_round(server, cohort)
    before = copy.deepcopy((flat(server), flat(cohort)))
    attributes = copy.deepcopy(vars(ward.strategy))
    at_sites = {s: copy.deepcopy(vars(b.strategy)) for s, b in ward.benches.items()}
    request = next(half)
    while True:
        given = copy.deepcopy((flat(request), flat(ward.privates)))
        privates = dict(ward.privates)
        replies = ward.answer(request)
        assert_same(
            dict(enumerate((flat(request), flat(privates)))), dict(enumerate(given))
        )
        received = copy.deepcopy(flat(replies))
        try:
            request = half.send(replies)
        except StopIteration as end:
            assert_same(flat(replies), received)
            after = end.value
            break
        assert_same(flat(replies), received)
    assert_same(dict(enumerate((flat(server), flat(cohort)))), dict(enumerate(before)))
    assert vars(ward.strategy) == attributes
    assert {s: vars(b.strategy) for s, b in ward.benches.items()} == at_sites
    assert flat(after).keys() >= flat(server).keys()


@every_name
def test_it_is_a_final_frozen_value(name):
    cls = CLASSES[name]
    assert dataclasses.is_dataclass(cls)
    strategy = load_strategy(name, {})
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(strategy, field, "other")
    assert [base.__module__ for base in cls.__mro__[1:3]] == ["fedmed.strategy", "abc"]
    assert strategy == load_strategy(name, {})


@every_case
def test_private_values_are_told_apart_from_the_live_network(name, sync):
    """Training on does not change what an earlier answer holds."""
    ward = runs.Ward(study_of(name, sync))
    request = next(ward.strategy.run_round(ward.server, ward.cohort()))
    first = ward.answer(request)
    kept = dict(ward.privates)
    noted = copy.deepcopy((flat(first), flat(kept)))
    ward.answer(request, number=2)
    assert_same({"r": flat(first), "p": flat(kept)}, {"r": noted[0], "p": noted[1]})


PARTS_SETTLED_BEFORE = {("ms_net", "step")}
"""Sites move what they keep in the first of two exchanges, by parts of the pooled loss
that were settled before anybody could be dropped."""


@every_case
def test_a_dropped_site_is_a_site_of_weight_zero(name, sync):
    if CLASSES[name].pools_data:
        pytest.skip("there is one virtual site, which cannot be dropped")
    after = {}
    for how in ("dropped", "weightless"):
        study = study_of(name, sync, train={"local_steps": 1})
        options = {"weighting": "examples"}
        ward = runs.Ward(
            study.model_copy(
                update={
                    "strategy": study.strategy.model_copy(
                        update=options | study.strategy.options
                    )
                }
            )
        )
        is_settled = (name, sync) in PARTS_SETTLED_BEFORE
        claims = {"c": 0} if is_settled or how == "weightless" else {}
        half = ward.strategy.run_round(ward.server, ward.cohort(**claims))
        after[how] = ward.finish(half, drop="c" if how == "dropped" else "")
    assert after["dropped"].shared.keys() == after["weightless"].shared.keys()
    # Shared entries only: SCAFFOLD counts |S| / N in its control variate.
    assert_same(after["dropped"].shared, after["weightless"].shared)


@every_case
def test_a_site_that_sends_nan_is_named_and_left_out(name, sync, tmp_path):
    study = study_of(
        name, sync, rounds=1, tolerance={"quorum": 0.5, "retries": 0}
    )  # fmt: skip
    site = sites_of(name)[len(sites_of(name)) // 2]
    if not any(message.tensors for message in payloads(reference(name, sync)[1])):
        pytest.skip("its replies hold no tensor")
    if CLASSES[name].pools_data:
        with pytest.raises(QuorumError, match=r"pooled.*NaN"):
            runs.run(study, tmp_path / "nan", transport=runs.Faulty(site=site))
        return
    nan = runs.run(study, tmp_path / "nan", transport=runs.Faulty(site=site))
    record = nan.rounds[0]
    assert list(record["refused"]) == [site]
    assert "NaN" in record["refused"][site]
    assert record["answered"] == [s for s in sites_of(name) if s != site]
    assert all(torch.isfinite(tensor).all() for tensor in nan.shared.values())
    silent = runs.Faulty(site=site, fault="silent")
    without = runs.run(study, tmp_path / "silent", transport=silent)
    assert list(without.rounds[0]["failed"]) == [site]
    assert_same(nan.everything(HOSPITALS), without.everything(HOSPITALS))


@every_case
def test_payloads_survive_the_wire(name, sync):
    ward = runs.Ward(study_of(name, sync))
    half = ward.strategy.run_round(ward.server, ward.cohort())
    for payload in ward.answer(next(half)).values():
        assert_same(from_message(to_message(payload)), payload)


def test_a_network_that_drops_values_cannot_be_compared():
    dropping = "model={name: tiny.dropping:Dropping, mode: slice}"
    with pytest.raises(ConfigError, match=r"without dropout \(seen: 0\.5\)"):
        proof("fedavg", dropping)


def proof(name, *more):
    return prove(
        name,
        steps=3,
        overrides=(
            f"cache={runs.CACHE}",
            "sites={dataset: tiny.hospitals, kind: image}",
            "preprocess={size: [8, 8], intensity: none}",
            "model={name: unet, base_width: 2, levels: 2, norm: batch}",
            "train.batch_size=2",
            *more,
        ),
    )


SETTINGS = {
    "batch": (),
    "group": ("model.norm=group",),
    "adam": ("train.optimizer={name: adam, lr: 0.01}",),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", EXACT)
def test_what_claims_to_equal_its_pooled_method_does(name, setting):
    if (name, setting) == ("scaffold", "adam"):
        with pytest.raises(ConfigError, match="plain SGD"):
            proof(name, *SETTINGS[setting])
        return
    more = SETTINGS[setting]
    if (name, setting) == ("series_adapter", "adam"):
        # With V at zero, the diagonal of its gradient is zero but for rounding (what
        # follows is normalised); Adam divides that by itself, up to its epsilon.
        more = ("train.optimizer={name: adam, lr: 0.01, eps: 1.0e-6}",)
    found = proof(name, *more)
    assert found.max_abs_diff <= 1e-12, found.where
    assert found.moved > 1e-3
    assert found.num_compared > 200


UMMKD = [
    ("ummkd", "min_count=1"),
    ("ummkd", "{weighting: examples, min_count: 1, kd_weight: 3.0, half: true}"),
    ("ummkd", "{site_reduction: mean, min_count: 20, divide_by: all}"),
]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("scaffold", "server_lr=0.5"),
        ("scaffold", "weighting=examples"),
        ("fedavgm", "beta=0.5"),
        ("fedadam", "tau=1.0"),
        ("fedbn", "weighting=examples"),
        *UMMKD,
        ("ms_net", "warmup_steps=1"),
        ("ms_net", "kd_weight=0"),
        ("ms_net", "{weighting: examples, auxiliary_weight: 0.3, warmup_steps: 2}"),
    ],
)
def test_the_proof_holds_for_other_constants(name, option):
    changed = f"strategy.{option}"
    if option.startswith("{"):
        changed = f"strategy={option}".replace("{", f"{{name: {name}, sync: step, ")
    found = proof(name, changed, "train.optimizer.weight_decay=0.1")
    assert found.max_abs_diff <= 1e-12, found.where


@pytest.mark.parametrize("name", ["fedavgm", "fedbn", "scaffold", "ms_net", "ummkd"])
def test_the_proof_holds_while_the_learning_rate_falls(name):
    found = proof(name, "train.lr_decay={factor: 0.5, every_steps: 1}")
    assert found.max_abs_diff <= 1e-12, found.where


@pytest.mark.parametrize("wrong", ["DoubledSite", "OneBatchLate"])
def test_the_proof_catches_a_method_that_is_wrong(wrong):
    found = proof(f"tiny.odd_strategies:{wrong}")
    assert found.max_abs_diff > 1e-6
    assert found.where


def test_the_proof_refuses_what_it_cannot_compare():
    for override in (
        "rounds=2",
        "strategy.sync=round",
        "train.local_steps=7",
        "train.clip_norm=1.0",
        "split.held_out=[a]",
    ):
        with pytest.raises(ConfigError, match=override.partition("=")[0]):
            proof("fedavg", override)
