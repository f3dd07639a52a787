"""The wire: bitwise round trips, and nothing but WireError from any bytes (U13-U18)."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed import exact_json, wire
from fedmed.errors import WireError
from fedmed.message import Message
from fedmed.wire import WireLimits, decode, encode

LIMITS = WireLimits(max_bytes=2**20, max_header_bytes=2**16, max_tensors=100)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def frame(header: bytes, body: bytes) -> bytes:
    """An attacker's frame: the layout and the checksum are right, the rest is not."""
    prefix = struct.pack("<6sHIQ", b"FEDMED", 1, len(header), len(body))
    digest = hashlib.sha256(prefix + header + body).digest()
    return prefix + digest + header + body


def tensors_file(index: Any, data: bytes = b"") -> bytes:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADER = b'{"header":{},"kind":"Gradient"}'
EMPTY = tensors_file({})


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    assert torch.equal(*as_bytes)


def some_message() -> Message:
    return Message(
        kind="Gradient",
        header={"round": 3, "loss": 0.1, "dice": [1.0, math.nan], "site": "b/rumc"},
        tensors={
            "model/conv.weight": torch.arange(12.0).reshape(4, 3),
            "model/bn.num_batches_tracked": torch.tensor(7),
            "mask": torch.tensor([True, False, True]),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_round_trip_is_bitwise(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(
        0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(1)
    ).to(torch.uint8)
    tensor = (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)
    back = decode(encode(Message("Gradient", tensors={"a": tensor})), limits=LIMITS)
    assert_same(back.tensors["a"], tensor)


def test_round_trip_of_views_leaves_and_gradients() -> None:
    base = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(5, 6),
        "leaf": base.clone().requires_grad_(),
        "special": torch.tensor([math.nan, math.inf, -0.0, 5e-324]).double(),
    }
    back = decode(encode(Message("Weights", tensors=tensors)), limits=LIMITS).tensors
    for name, tensor in tensors.items():
        assert_same(back[name], tensor.detach())


def test_decoded_tensors_are_aligned_writable_and_own_their_memory() -> None:
    data = bytearray(
        encode(
            Message(
                "Weights",
                tensors={"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5)},
            )
        )
    )
    back = decode(data, limits=LIMITS).tensors
    data[:] = bytes(len(data))
    back["a"] += 1
    assert back["b"].data_ptr() % 4 == 0
    assert back["b"].sum() == 5
    assert back["a"].sum() == 6


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_header_comes_back_exactly(view: type) -> None:
    message = some_message()
    back = decode(view(encode(message)), limits=LIMITS)
    assert back.kind == message.kind
    assert math.isnan(back.header["dice"][1])
    assert back.header["loss"] == 0.1
    assert {k: v for k, v in back.header.items() if k != "dice"} == {
        "round": 3,
        "loss": 0.1,
        "site": "b/rumc",
    }


@given(st.floats(allow_nan=False))
@settings(max_examples=50, deadline=None)
def test_floats_round_trip_bit_for_bit(value: float) -> None:
    back = exact_json.loads(exact_json.dumps({"x": value}))["x"]
    assert struct.pack("<d", back) == struct.pack("<d", value)


def test_equal_messages_give_equal_bytes() -> None:
    message = some_message()
    reordered = Message(
        message.kind,
        dict(reversed(message.header.items())),
        dict(reversed(message.tensors.items())),
    )
    assert encode(message) == encode(reordered)


def test_body_is_what_the_safetensors_library_reads() -> None:
    message = some_message()
    data = encode(message)
    (header_bytes,) = struct.unpack_from("<I", data, 8)
    theirs = safetensors.torch.load(data[wire.PREFIX_BYTES + header_bytes :])
    assert set(theirs) == set(message.tensors)
    for name, tensor in message.tensors.items():
        assert_same(theirs[name], tensor)
    ours = decode(frame(HEADER, safetensors.torch.save(theirs)), limits=LIMITS)
    for name, tensor in message.tensors.items():
        assert_same(ours.tensors[name], tensor)


@pytest.mark.parametrize(
    "header",
    [
        {"x": object()},
        {"x": {1: "x"}},
        {"$float": "nan"},
        {"x": "\ud800"},
        {"x": 2**64},
        {"x": torch.ones(2)},
        {"x": b"raw"},
    ],
)
def test_encode_refuses_a_header_that_would_not_come_back(header: Any) -> None:
    with pytest.raises(WireError):
        encode(Message("Metrics", header=header))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
)
def test_encode_refuses_a_tensor_that_would_not_come_back(
    tensor: torch.Tensor,
) -> None:
    with pytest.raises(WireError, match="'odd'"):
        encode(Message("Gradient", tensors={"odd": tensor}))


BAD_NAMES = [
    "",
    "../x",
    "a/../b",
    "/etc/passwd",
    "a//b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\u202eb",
    "x" * 10_000,
    "é" * 300,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_u16_bad_names_are_refused_both_ways(name: str) -> None:
    with pytest.raises(WireError):
        encode(Message("Gradient", tensors={name: torch.ones(1)}))
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(WireError):
        decode(frame(HEADER, tensors_file({name: entry}, bytes(4))), limits=LIMITS)


def entry(
    dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_BODIES = {
    "no index": b"",
    "index length lies": struct.pack("<Q", 2**63) + b"{}",
    "index beyond end": struct.pack("<Q", 100) + b"{}",
    "not json": tensors_file(b"nonsense"),
    "not utf8": tensors_file(b'{"\xff":1}'),
    "a list": tensors_file([]),
    "deep": tensors_file(b"[" * 60_000),
    "unknown dtype": tensors_file({"a": entry("F80")}, bytes(4)),
    "complex": tensors_file({"a": entry("C64", (1,), (0, 8))}, bytes(8)),
    "dtype of no text": tensors_file({"a": entry(["F32"])}, bytes(4)),
    "negative side": tensors_file({"a": entry(shape=(-1,))}, bytes(4)),
    "bool side": tensors_file({"a": entry(shape=(True,))}, bytes(4)),
    "float side": tensors_file({"a": entry(shape=(1.0,))}, bytes(4)),
    "many sides": tensors_file({"a": entry(shape=(1,) * 100)}, bytes(4)),
    "huge": tensors_file({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(4)),
    "huge empty": tensors_file({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}),
    "overlap": tensors_file({"a": entry(), "b": entry()}, bytes(4)),
    "gap": tensors_file({"a": entry(offsets=(4, 8))}, bytes(8)),
    "size lies": tensors_file({"a": entry(shape=(2,))}, bytes(4)),
    "reversed": tensors_file({"a": entry(shape=(0,), offsets=(4, 0))}, bytes(4)),
    "trailing": tensors_file({"a": entry()}, bytes(5)),
    "cut": tensors_file({"a": entry()}, bytes(3)),
    "extra key": tensors_file({"a": entry() | {"x": 1}}, bytes(4)),
    "duplicate": tensors_file(
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "bool of 2": tensors_file({"a": entry("BOOL", (1,), (0, 1))}, b"\x02"),
    "metadata": tensors_file({"__metadata__": {"a": "b"}}),
    "bad metadata": tensors_file({"__metadata__": {"a": 1}}),
    "huge int": tensors_file(b'{"a":' + b"9" * 5000 + b"}"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_u17_bad_bodies_are_refused_though_the_checksum_fits(name: str) -> None:
    with pytest.raises(WireError):
        decode(frame(HEADER, BAD_BODIES[name]), limits=LIMITS)


BAD_HEADERS = [
    b"",
    b"{}",
    b"[]",
    b'{"kind":"a"}',
    b'{"kind":1,"header":{}}',
    b'{"kind":"a","header":[]}',
    b'{"kind":"","header":{}}',
    b'{"kind":"a\\u0000","header":{}}',
    b'{"kind":"a","header":{},"more":1}',
    b'{"kind":"a","kind":"b","header":{}}',
    b'{"kind":"a","header":{"x":NaN}}',
    b'{"kind":"a","header":{"x":1e999}}',
    b'{"kind":"a","header":{"x":{"$float":"1"}}}',
    b'{"kind":"a","header":{"x":"\\ud800"}}',
    b'{"kind":"a","header":{"x":' + b"9" * 30 + b"}}",
    b'{"kind":"a","header":{"x":' + b"[" * 40 + b"]" * 40 + b"}}",
    b'{"kind":"a","header":' + b"[" * 50_000,
]


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_bad_headers_are_refused_though_the_checksum_fits(header: bytes) -> None:
    with pytest.raises(WireError):
        decode(frame(header, EMPTY), limits=LIMITS)


def test_the_attackers_frame_itself_is_accepted() -> None:
    """Otherwise the tests above would pass for the wrong reason."""
    body = tensors_file({"a": entry()}, struct.pack("<f", 2.0))
    assert decode(frame(HEADER, body), limits=LIMITS).tensors["a"].item() == 2.0


def test_every_truncation_and_extension_is_refused() -> None:
    data = encode(some_message())
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:size], limits=LIMITS)
    with pytest.raises(WireError, match="declares"):
        decode(data + b"\0", limits=LIMITS)


def test_every_bit_flip_is_refused() -> None:
    data = bytearray(encode(some_message()))
    for position in range(len(data)):
        data[position] ^= 1 << (position % 8)
        with pytest.raises(WireError):
            decode(bytes(data), limits=LIMITS)
        data[position] ^= 1 << (position % 8)
    decode(bytes(data), limits=LIMITS)


def test_u13_oversize_actual_and_declared() -> None:
    data = encode(Message("Weights", tensors={"a": torch.zeros(2**19)}))
    with pytest.raises(WireError, match="at most 1048576"):
        decode(data, limits=LIMITS)
    lying = struct.pack("<6sHIQ32s", b"FEDMED", 1, 2**31, 2**62, b"")
    with pytest.raises(WireError, match="header of 2147483648"):
        decode(lying, limits=LIMITS)
    lying = struct.pack("<6sHIQ32s", b"FEDMED", 1, 4, 2**62, b"")
    with pytest.raises(WireError, match="declares"):
        decode(lying, limits=LIMITS)


def test_u14_too_many_tensors() -> None:
    many = {f"t{i}": torch.empty(0) for i in range(101)}
    with pytest.raises(WireError, match="101 tensors; at most 100"):
        decode(encode(Message("Gradient", tensors=many)), limits=LIMITS)
    index = b'{"a":1' + b" " * 2**16 + b"}"
    with pytest.raises(WireError, match="tensor index of"):
        decode(frame(HEADER, tensors_file(index)), limits=LIMITS)


def test_a_strided_memoryview_is_refused() -> None:
    with pytest.raises(WireError, match="contiguous"):
        decode(memoryview(encode(some_message()) * 2)[::2], limits=LIMITS)


def decode_or_wire_error(data: bytes) -> None:
    try:
        decode(data, limits=LIMITS)
    except WireError:
        return


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_u18_random_bytes(data: bytes) -> None:
    decode_or_wire_error(data)
    decode_or_wire_error(encode(some_message())[:20] + data)
    decode_or_wire_error(frame(HEADER, data))
    decode_or_wire_error(frame(data, EMPTY))
    decode_or_wire_error(frame(HEADER, tensors_file(data)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "data_offsets", "$float", "kind"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(json_values)
@settings(max_examples=60, deadline=None)
def test_u18_any_json_with_a_right_checksum(value: Any) -> None:
    text = json.dumps(value).encode()
    decode_or_wire_error(frame(text, EMPTY))
    decode_or_wire_error(frame(HEADER, tensors_file(text)))
    decode_or_wire_error(frame(HEADER, tensors_file({"a": value}, bytes(8))))
    for key in ("dtype", "shape", "data_offsets"):
        body = tensors_file({"a": entry() | {key: value}}, bytes(4))
        decode_or_wire_error(frame(HEADER, body))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_u18_mutated_messages_with_a_right_checksum(data: st.DataObject) -> None:
    good = encode(some_message())
    (header_bytes,) = struct.unpack_from("<I", good, 8)
    content = bytearray(good[wire.PREFIX_BYTES :])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    decode_or_wire_error(
        frame(bytes(content[:header_bytes]), bytes(content[header_bytes:]))
    )


def test_u18_memory_is_bounded() -> None:
    hostile = [
        frame(HEADER, body) for body in BAD_BODIES.values() if len(body) < 2**17
    ] + [frame(b'{"kind":"a","header":{"x":[' + b"[]," * 5_000 + b"0]}}", EMPTY)]
    tracemalloc.start()
    for data in hostile:
        decode_or_wire_error(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 60 * LIMITS.max_header_bytes
