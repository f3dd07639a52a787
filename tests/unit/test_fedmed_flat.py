"""Tensors side by side in one buffer: nothing is lost, and runs are what they seem."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fedmed.flat import (
    ALIGNMENT,
    CHUNK,
    MEASURED,
    FlatTensors,
    Layout,
    lazy_clone,
    pack,
    run_of,
    section_of,
    sum_of_squares,
)

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
SHAPES = ((), (0,), (0, 3), (1,), (7,), (4, 3), (2, 3, 4, 5), (CHUNK + 3,))


def content(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(content(one), content(other))
    )


def made(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    rng = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (torch.randn(shape, generator=rng, dtype=torch.float64) * 3).to(dtype)


def all_kinds() -> dict[str, torch.Tensor]:
    named = {
        f"state/{str(dtype)[6:]}.{number}": made(dtype, shape)
        for dtype, (number, shape) in itertools.product(DTYPES, enumerate(SHAPES))
    }
    return named | {f"buffers/{n[6:]}": t for n, t in list(named.items())[:20]}


def test_every_dtype_and_shape_comes_back_as_it_was() -> None:
    tensors = all_kinds()
    packed = pack(tensors)
    assert list(packed) == sorted(tensors)
    assert len(packed) == len(tensors)
    for name, tensor in tensors.items():
        assert equal(packed[name], tensor), name
        assert packed[name].is_contiguous()
    expected = sum(t.numel() * t.element_size() for t in tensors.values())
    assert packed.content_bytes == expected


STRIDED = {
    "channels_last": torch.arange(120.0)
    .reshape(2, 3, 4, 5)
    .to(memory_format=torch.channels_last),
    "transposed": torch.arange(12.0).reshape(4, 3).T,
    "every_other": torch.arange(20.0)[::2],
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "offset": torch.arange(20.0)[7:12],
    "parameter": torch.nn.Parameter(torch.ones(5)),
    "computed": torch.nn.Parameter(torch.ones(5)) * 2,
    "large": torch.arange(4.0 * CHUNK).reshape(CHUNK, 4).T,
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_do_not_matter(name: str) -> None:
    packed = pack({f"state/{name}": STRIDED[name], "state/z": torch.ones(3)})
    found = packed[f"state/{name}"]
    assert equal(found, STRIDED[name])
    assert found.is_contiguous()
    assert not found.requires_grad
    assert equal(packed["state/z"], torch.ones(3))


def test_special_values_keep_their_bits() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38])
    values = torch.cat(
        [values, torch.tensor([-1, 2139095041], dtype=torch.int32).view(torch.float32)]
    )
    assert equal(pack({"x": values})["x"], values)


def test_a_copy_is_a_copy() -> None:
    tensor = torch.ones(3)
    packed = pack({"x": tensor})
    tensor.fill_(5.0)
    assert packed["x"].tolist() == [1.0] * 3


def test_a_given_buffer_is_filled_and_not_beyond_its_end() -> None:
    tensors = {"state/w": torch.randn(50), "state/n": torch.tensor(3)}
    size = Layout.of(tensors).num_bytes
    buffer = torch.full((size + 100,), 7, dtype=torch.uint8)
    packed = pack(tensors, buffer)
    assert packed.buffer is buffer
    assert all(equal(packed[name], tensor) for name, tensor in tensors.items())
    assert buffer[size:].tolist() == [7] * 100


def test_no_tensors_at_all() -> None:
    packed = pack({})
    assert dict(packed) == {}
    assert packed.content_bytes == 0
    assert packed.layout is Layout.of({})
    assert packed.layout.sections == {}


def test_equal_layouts_are_one_object_in_any_order() -> None:
    tensors = all_kinds()
    backwards = {name: tensors[name] for name in reversed(tensors)}
    layout = Layout.of(tensors)
    assert Layout.of(backwards) is layout
    assert Layout.interned(layout.slots) is layout
    assert Layout.of({n: torch.zeros_like(t) for n, t in tensors.items()}) is layout


@pytest.mark.parametrize(
    "other",
    [
        {"state/w": torch.ones(4, 3)},
        {"state/w": torch.ones(12, dtype=torch.float64)},
        {"state/v": torch.ones(12)},
        {"buffers/w": torch.ones(12)},
        {"state/w": torch.ones(12), "state/z": torch.ones(0)},
    ],
)
def test_other_layouts_are_other_objects(other: dict[str, torch.Tensor]) -> None:
    layout = Layout.of({"state/w": torch.ones(12)})
    assert Layout.of(other) is not layout
    assert Layout.of(other) != layout


def test_tensors_do_not_overlap_and_runs_are_aligned() -> None:
    layout = Layout.of(all_kinds())
    taken = torch.zeros(layout.num_bytes, dtype=torch.int32)
    for slot in layout.slots:
        taken[slot.offset : slot.offset + slot.num_bytes] += 1
    assert int(taken.max()) == 1
    assert all(run.offset % ALIGNMENT == 0 for run in layout.runs)


def test_runs_hold_each_number_of_a_section_and_dtype_once() -> None:
    tensors = all_kinds()
    packed = pack(tensors)
    seen = [name for run in packed.layout.runs for name in run.names]
    assert sorted(seen) == sorted(tensors)
    for run in packed.layout.runs:
        together = torch.cat([tensors[name].reshape(-1) for name in run.names])
        assert equal(run.read(packed.buffer), together)
        assert {section_of(name)[0] for name in run.names} == {run.section}


def test_names_split_into_section_and_entry() -> None:
    assert section_of("state/a/b") == ("state", "a/b")
    assert section_of("extra/control/a/b") == ("extra/control", "a/b")
    assert section_of("bare") == ("", "bare")


def test_sections_hold_what_their_names_say() -> None:
    tensors = {
        "state/w": torch.ones(3),
        "state/n": torch.tensor(4),
        "stateful/w": torch.zeros(3),
        "extra/control/w": torch.full((3,), 2.0),
        "extra/controlled/w": torch.full((3,), 3.0),
        "bare": torch.full((1,), 9.0),
    }
    packed = pack(tensors)
    assert set(packed.layout.sections) == {
        "state",
        "stateful",
        "extra/control",
        "extra/controlled",
        "",
    }
    assert {n: t.tolist() for n, t in packed.state("state").items()} == {
        "n": 4,
        "w": [1.0] * 3,
    }
    assert list(packed.state("state")) == ["n", "w"]
    assert packed.state("extra/control")["w"].tolist() == [2.0] * 3
    assert packed.state("")["bare"].tolist() == [9.0]
    assert packed.state("absent") == {}


def test_a_section_alone_has_the_same_runs() -> None:
    layout = Layout.of(all_kinds())
    for section in layout.sections.values():
        alone = section.alone
        assert [(r.dtype, r.numel) for r in alone.runs] == [
            (r.dtype, r.numel) for r in section.runs
        ]
        assert alone.num_bytes <= layout.num_bytes


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_neighbours_are_viewed_as_one_run() -> None:
    packed = pack({"state/a": torch.arange(3.0), "state/b": torch.arange(4.0)})
    state = packed.state("state")
    run = run_of(state, ("a", "b"))
    assert shares_memory(run, packed.buffer)
    assert run.tolist() == [0, 1, 2, 0, 1, 2, 3]


def strangers() -> dict[str, dict[str, torch.Tensor]]:
    whole = torch.arange(20.0)
    return {
        "apart": {"a": torch.arange(3.0), "b": torch.arange(4.0)},
        "backwards": {"a": whole[5:8], "b": whole[1:5]},
        "gap": {"a": whole[0:3], "b": whole[4:8]},
        "overlap": {"a": whole[0:3], "b": whole[2:6]},
        "strided": {"a": whole[0:6:2], "b": whole[3:7]},
        "turned": {"a": whole[:6].reshape(2, 3).T, "b": whole[6:9]},
        "empty first": {"a": whole[0:0], "b": whole[0:4]},
        "empty last": {"a": whole[0:4], "b": whole[4:4]},
        "parameters": {"a": torch.nn.Parameter(torch.ones(2)), "b": whole[:2]},
    }


@pytest.mark.parametrize("name", strangers())
def test_a_run_is_right_wherever_its_tensors_lie(name: str) -> None:
    state = strangers()[name]
    together = torch.cat([tensor.detach().reshape(-1) for tensor in state.values()])
    assert equal(run_of(state, ("a", "b")), together)
    assert equal(run_of(state, ("a",)), state["a"].detach().reshape(-1))


def test_neighbours_in_memory_of_two_storages_are_no_run() -> None:
    memory = np.arange(8, dtype=np.float32)
    state = {"a": torch.from_numpy(memory[:4]), "b": torch.from_numpy(memory[4:])}
    assert run_of(state, ("a", "b")).tolist() == list(range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 1000, CHUNK, 3 * CHUNK + 17])
def test_sum_of_squares_beside_float64(dtype: torch.dtype, count: int) -> None:
    rng = np.random.default_rng()
    values, origin = (rng.normal(size=count) * 3 for _ in range(2))
    one, other = (torch.from_numpy(v).to(dtype) for v in (values, origin))
    exact = one.double().numpy(), other.double().numpy()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert sum_of_squares(one) == pytest.approx(
        float(np.sum(exact[0] ** 2)), rel=tolerance, abs=0
    )
    assert sum_of_squares(one, other) == pytest.approx(
        float(np.sum((exact[0] - exact[1]) ** 2)), rel=tolerance, abs=0
    )


@pytest.mark.parametrize("where", [0, CHUNK - 1, CHUNK, 2 * CHUNK])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_anywhere_shows_in_the_sum(where: int, bad: float) -> None:
    values = torch.ones(2 * CHUNK + 1)
    values[where] = bad
    assert not math.isfinite(sum_of_squares(values))
    assert not math.isfinite(sum_of_squares(values, torch.ones_like(values)))
    both = sum_of_squares(values, values.clone())
    assert math.isnan(both)  # inf - inf as well


def test_squares_out_of_range_are_infinite_and_not_nan() -> None:
    assert sum_of_squares(torch.tensor([3e38, 1.0])) == math.inf
    assert sum_of_squares(torch.full((4,), 1.0), torch.full((4,), -3e38)) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sum_of_squares_of_half_precision(dtype: torch.dtype) -> None:
    values = torch.full((3 * CHUNK,), 2.0, dtype=dtype)
    assert sum_of_squares(values) == pytest.approx(4.0 * 3 * CHUNK, rel=1e-6)
    small = torch.full((3 * CHUNK,), 1e-3, dtype=dtype)
    expected = 3 * CHUNK * float(small[0]) ** 2
    assert sum_of_squares(small) == pytest.approx(expected, rel=1e-5)


def test_a_lazy_clone_is_separate_from_the_original() -> None:
    owned, foreign = torch.ones(3), torch.from_numpy(np.ones(3, np.float32))
    for tensor in (owned, foreign, owned[1:], pack({"x": owned})["x"]):
        before = tensor.clone()
        copy = lazy_clone(tensor)
        copy.add_(1.0)
        assert torch.equal(tensor, before)
        copy = lazy_clone(tensor)
        tensor.add_(1.0)
        assert torch.equal(copy, before)


def test_a_view_is_made_once_and_writes_through() -> None:
    packed = pack({"state/a": torch.zeros(3)})
    assert isinstance(packed, FlatTensors)
    packed["state/a"].fill_(2.0)
    assert packed.state("state")["a"].tolist() == [2.0] * 3
    assert packed["state/a"] is packed["state/a"]
    with pytest.raises(KeyError):
        packed["state/b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("measured_from", ["zero", "origin"])
def test_what_is_measured_while_it_is_packed_keeps_its_bits(
    dtype: torch.dtype, measured_from: str
) -> None:
    """Differences are formed where the copy is to lie; the copy must win."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"state/a": 2 * MEASURED + 5, "state/b": 3, "state/c": MEASURED}
    tensors = {
        name: torch.randn(size, generator=generator).to(dtype)
        for name, size in sizes.items()
    }
    tensors["state/a"][MEASURED - 1] = -0.0
    total = sum(sizes.values())
    origin = torch.randn(total, generator=generator).to(dtype)
    before = origin.clone()
    packed = pack(
        tensors, origin=lambda _: origin if measured_from == "origin" else None
    )
    for name, tensor in tensors.items():
        assert equal(packed[name], tensor)
    assert torch.equal(origin, before)
    ((run, squares),) = packed.squares.items()
    values = torch.cat([tensors[name] for name in run.names])
    if measured_from == "origin":
        values = values - origin
    expected = float(np.square(values.double().numpy()).sum())
    assert squares == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("where", [0, MEASURED, 2 * MEASURED + 4])
def test_a_bad_number_shows_while_it_is_packed(where: int) -> None:
    values = torch.zeros(2 * MEASURED + 5)
    values[where] = math.nan
    origin = torch.ones(len(values))
    for start in (None, origin):
        packed = pack({"state/a": values}, origin=lambda _, start=start: start)
        (found,) = packed.squares.values()
        assert math.isnan(found)
        assert bool(packed["state/a"][where].isnan())
