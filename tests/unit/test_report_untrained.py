from __future__ import annotations

from fedmed.message_size import network_size
from fedmed.report.run_folder import Comparison, Entry, Run
from fedmed.report.untrained import KEEPS_LAYERS, untrained_notes
from fedmed.resolve import load_strategy, strategy_names


def compared(name: str, *held_out: str) -> Comparison:
    study = {"strategy": {"name": name}, "held_out": list(held_out)}
    return Comparison("x", (Entry(name, 0, None, Run("x", study)),))


def test_layers_that_nobody_trained_are_confessed() -> None:
    (note,) = untrained_notes(compared("dual_stream", "b"))
    assert note.startswith("dual_stream: ")
    assert not untrained_notes(compared("dual_stream"))
    assert not untrained_notes(compared("fedbn", "b"))


def test_no_strategy_that_keeps_layers_is_forgotten() -> None:
    found = {}
    for name in strategy_names():
        strategy = load_strategy(name, {})
        if "all" not in strategy.keeps:  # else no network leaves, and none is tested
            size = network_size(strategy, {"name": "unet"})
            found[name] = {
                part.part
                for part in size.parts[:-1]
                if not part.shared_values and part.kept_values
            } - set(strategy.training_only)
    assert {name for name, parts in found.items() if parts} == set(KEEPS_LAYERS)
