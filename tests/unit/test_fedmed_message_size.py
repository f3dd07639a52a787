from __future__ import annotations

import pytest

from fedmed.errors import ConfigError
from fedmed.message_size import network_size
from fedmed.resolve import load_strategy

KERNELS, SCALES = 17_272_224, 9_920


def size_of(name, model=None, **options):
    strategy = load_strategy(name, options)
    return network_size(strategy, model or strategy.published_model)


def all_of(name, **options):
    return size_of(name, **options).parts[-1]


def test_dsbn_shares_the_published_kernels_and_keeps_the_published_normalisation():
    whole = all_of("dsbn")
    assert (whole.shared_values, whole.kept_values) == (KERNELS, SCALES)
    assert whole.shared_bytes == 4 * KERNELS
    # 42 layers have a counter of 8 bytes each
    assert (whole.kept_bytes - 2 * 4 * SCALES) % 8 == 0


@pytest.mark.parametrize(
    ("name", "shared", "kept"),
    [
        ("use_net", KERNELS + SCALES + 56_320, 0),
        ("parallel_adapter", KERNELS, SCALES + KERNELS // 9),
        ("series_adapter", KERNELS, SCALES + 1_931_848),
        ("dual_stream", 15_637_504, KERNELS + SCALES - 15_637_504),
        ("ms_net", KERNELS, SCALES + 4_704_640),
    ],
)
def test_the_other_rows_share_and_keep_what_their_docstrings_say(name, shared, kept):
    whole = all_of(name)
    assert (whole.shared_values, whole.kept_values) == (shared, kept)
    text = type(load_strategy(name, {})).__doc__
    assert f"{shared:,}" in text


def test_use_net_with_the_published_gates():
    assert all_of("use_net", least_hidden=1).shared_values == KERNELS + SCALES + 54_528


def test_parts_add_up():
    *parts, whole = size_of("dual_stream").parts
    assert [part.part for part in parts] == ["encoder", "decoder", "head"]
    for value in ("shared_values", "kept_values", "shared_bytes", "kept_bytes"):
        assert sum(getattr(p, value) for p in parts) == getattr(whole, value)
    assert parts[2].shared_bytes == 0


def test_sizes_follow_from_the_layers():
    """A U-Net of one level, counted by hand."""
    model = {"name": "unet", "base_width": 2, "levels": 1}
    whole = size_of("fedavg", model).parts[-1]
    kernels, scales, head = 9 * 2 + 9 * 4, 2 * 4, 2 * 2 + 2
    assert whole.shared_values == kernels + scales + head
    assert whole.shared_bytes == 4 * (kernels + 2 * scales + head) + 2 * 8


def test_a_network_that_the_strategy_cannot_use_is_refused():
    with pytest.raises(ConfigError, match="dual_stream needs"):
        size_of("dual_stream", {"name": "dilated_residual"})
