"""Named tensors as bytes: the safetensors layout, written alike and read strictly.

The bytes are a valid safetensors file that any reader of that format opens. This
module writes them so that equal content gives equal bytes (the reference library
shuffles metadata), and reads them from a stranger: everything is checked against
the true length before anything is allocated.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch

from fedmed.exact_json import loads_strict
from fedmed.message import State

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Every dtype that travels or is stored, by its safetensors name."""

MAX_NAME_BYTES = 512

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_MAX_DIMS = 16
_MAX_ELEMENTS = 2**60

Chunk = bytes | memoryview


def check_name(name: str) -> None:
    """Refuse a tensor name that could harm a log, a file system or a person's eye.

    Raises:
        ValueError: If the name is empty, longer than 512 bytes, not printable, or
            has an empty, "." or ".." part between its slashes.
    """
    if not name.isprintable() or "\\" in name:
        raise ValueError(f"tensor name {name[:40]!a} holds a forbidden character")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"tensor name {name[:40]!r}... is over {MAX_NAME_BYTES} bytes")
    if {"", ".", ".."} & set(name.split("/")) or name == _METADATA:
        raise ValueError(f"tensor name {name!r} is not allowed")


def pack(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> list[Chunk]:
    """Give the chunks of bytes whose concatenation is a safetensors file.

    Args:
        tensors: Any shapes, strides and devices; dtypes of `DTYPES`.
        metadata: Texts kept with them.

    Returns:
        Chunks, the tensors' ones without a copy where they are contiguous on the CPU.

    Raises:
        ValueError: If a name or a tensor cannot be written; the message names it.
    """
    index: dict[str, Any] = {}
    if metadata:
        index[_METADATA] = dict(sorted(metadata.items()))
    for name, tensor in tensors.items():
        check_name(name)
        _check_tensor(name, tensor)
    # Wide dtypes first, as the reference library does: every tensor stays aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    data: list[Chunk] = []
    end = 0
    for name in order:
        begin, chunk = end, _bytes_of(tensors[name])
        end += chunk.nbytes
        data.append(chunk)
        index[name] = {
            "dtype": _CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *data]


def unpack(
    data: memoryview, *, max_tensors: int, max_index_bytes: int
) -> tuple[State, dict[str, str]]:
    """Read a safetensors file from bytes that may be anything.

    Args:
        data: The whole file; copied once, after all checks.
        max_tensors: More are refused.
        max_index_bytes: A longer index (names, shapes, metadata) is refused unread.

    Returns:
        Writable CPU tensors in sorted order of names, and the metadata.

    Raises:
        ValueError: If the bytes are not exactly such a file.
    """
    index, start = _read_index(data, max_index_bytes)
    metadata = _read_metadata(index.pop(_METADATA, {}))
    if len(index) > max_tensors:
        raise ValueError(f"{len(index)} tensors; at most {max_tensors} are allowed")
    spans = {name: _read_entry(name, entry) for name, entry in index.items()}
    _check_spans(spans, len(data) - start)
    buffer = bytearray(data[start:])
    return {name: _tensor(buffer, *spans[name]) for name in sorted(spans)}, metadata


_Span = tuple[torch.dtype, tuple[int, ...], int, int]


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in _CODES:
        raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot go")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"tensor {name!r} is not a dense tensor with values")
    if tensor.ndim > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has more than {_MAX_DIMS} dimensions")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _read_index(data: memoryview, max_index_bytes: int) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are too few for tensors")
    (size,) = struct.unpack_from("<Q", data)
    if size > max_index_bytes:
        raise ValueError(f"tensor index of {size} bytes; at most {max_index_bytes}")
    if 8 + size > len(data):
        raise ValueError("the tensor index is cut off")
    index = loads_strict(bytes(data[8 : 8 + size]).decode("utf-8"))
    if not isinstance(index, dict):
        raise ValueError("the tensor index is not a JSON object")
    return index, 8 + size


def _read_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("the metadata is not a JSON object")
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError("the metadata holds something other than texts")
    return value


def _read_entry(name: str, entry: Any) -> _Span:
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: not a dtype, a shape and two offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {name!r}: unknown dtype")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise ValueError(f"tensor {name!r}: impossible shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: impossible offsets")
    dtype = DTYPES[code]
    # An empty tensor may still claim sides whose product overflows strides.
    if math.prod(max(side, 1) for side in shape) > _MAX_ELEMENTS:
        raise ValueError(f"tensor {name!r}: impossible shape")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r}: shape and offsets disagree")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _check_spans(spans: Mapping[str, _Span], size: int) -> None:
    end = 0
    for begin, stop in sorted((span[2], span[3]) for span in spans.values()):
        if begin != end:
            raise ValueError("tensors overlap or leave a gap")
        end = stop
    if end != size:
        raise ValueError(f"tensors claim {end} bytes, {size} are there")


def _tensor(
    buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int
) -> torch.Tensor:
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    count = (end - begin) // dtype.itemsize
    if dtype == torch.bool:
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=begin)
        if int(raw.max()) > 1:
            raise ValueError("a boolean tensor holds something other than 0 and 1")
    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin)
    aligned = begin % dtype.itemsize == 0
    return (flat if aligned else flat.clone()).reshape(shape)
