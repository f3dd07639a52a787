"""A message as bytes: what crosses the border between two institutions.

Layout, little endian:

    offset  bytes  content
         0      6  b"FEDMED"
         6      2  version of this layout, now 1
         8      4  H, bytes of the header
        12      8  B, bytes of the body
        20     32  SHA-256 of bytes 0..20, header and body
        52      H  header: {"header": {...}, "kind": "..."} (`fedmed.exact_json`)
      52+H      B  body: the tensors (`fedmed.tensor_codec`, safetensors)

No pickles and no class names. Lengths are checked before anything is allocated, and
whatever bytes arrive, `decode` gives a message or raises `WireError`. The checksum
finds accidents; it does not prove who sent the bytes: that is the transport's matter.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

from fedmed import exact_json, tensor_codec
from fedmed.errors import WireError
from fedmed.message import Message, State

MAGIC = b"FEDMED"
VERSION = 1
PREFIX_BYTES = 52

_PREFIX = struct.Struct("<6sHIQ32s")
_SIGNED_PREFIX_BYTES = 20
_MAX_KIND_BYTES = 64

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class WireLimits:
    """How large a message may be before it is refused unread.

    Attributes:
        max_bytes: All of the message.
        max_header_bytes: The JSON header, and the index of tensor names and shapes.
            Parsed JSON needs at most about forty times its size in memory.
        max_tensors: Number of tensors.
    """

    max_bytes: int = 2**31
    max_header_bytes: int = 2**22
    max_tensors: int = 20_000


def encode(message: Message) -> bytes:
    """Write a message as bytes; equal messages give equal bytes.

    Args:
        message: Tensors of any stride and device; a header that
            `fedmed.exact_json.dumps` takes.

    Raises:
        WireError: If the message holds something that cannot be sent.
    """
    try:
        _check_kind(message.kind)
        header = exact_json.dumps({"kind": message.kind, "header": message.header})
        chunks = tensor_codec.pack(message.tensors)
    except ValueError as error:
        raise WireError(f"cannot send this message: {error}") from error
    return _frame(header.encode(), chunks)


def decode(data: Buffer, *, limits: WireLimits) -> Message:
    """Read a message from bytes that a stranger may have made.

    Args:
        data: Exactly one message.
        limits: What to refuse unread.

    Returns:
        The message; its tensors are writable, on the CPU, and own their memory.

    Raises:
        WireError: If `data` is anything but one whole, undamaged, allowed message.
    """
    try:
        view = memoryview(data).cast("B")
    except TypeError as error:  # a strided memoryview
        raise WireError("the bytes of a message must be contiguous") from error
    header_bytes, digest = _check_prefix(view, limits)
    if _digest([view[:_SIGNED_PREFIX_BYTES], view[PREFIX_BYTES:]]) != digest:
        raise WireError(
            "message is damaged: its checksum does not fit",
            hint="Bytes changed on the way; send it again.",
        )
    try:
        kind, header = _read_header(view[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
        tensors = _read_body(view[PREFIX_BYTES + header_bytes :], limits)
    except ValueError as error:
        raise WireError(f"message is malformed: {error}") from error
    return Message(kind=kind, header=header, tensors=tensors)


def _frame(header: bytes, chunks: list[tensor_codec.Chunk]) -> bytes:
    body_bytes = sum(len(chunk) for chunk in chunks)
    try:
        signed = _PREFIX.pack(MAGIC, VERSION, len(header), body_bytes, b"")
    except struct.error as error:
        raise WireError(f"a header of {len(header)} bytes is too large") from error
    signed = signed[:_SIGNED_PREFIX_BYTES]
    digest = _digest([signed, header, *chunks])
    return b"".join([signed, digest, header, *chunks])


def _digest(chunks: list[bytes | memoryview]) -> bytes:
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return state.digest()


def _check_prefix(view: memoryview, limits: WireLimits) -> tuple[int, bytes]:
    if len(view) > limits.max_bytes:
        raise WireError(
            f"message of {len(view)} bytes; at most {limits.max_bytes} are allowed"
        )
    if len(view) < PREFIX_BYTES:
        raise WireError(f"message is cut off: {len(view)} bytes are no message")
    magic, version, header_bytes, body_bytes, digest = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise WireError("these bytes are no fedmed message: they start otherwise")
    if version != VERSION:
        raise WireError(
            f"message has layout version {version}; this fedmed reads {VERSION}",
            hint="Install the same fedmed version on the server and at every site.",
        )
    if header_bytes > limits.max_header_bytes:
        raise WireError(
            f"header of {header_bytes} bytes; at most {limits.max_header_bytes}"
        )
    declared = PREFIX_BYTES + header_bytes + body_bytes
    if declared != len(view):
        raise WireError(f"message declares {declared} bytes but has {len(view)}")
    return header_bytes, digest


def _read_header(view: memoryview) -> tuple[str, dict[str, Any]]:
    value = exact_json.loads(bytes(view))
    if not isinstance(value, dict) or set(value) != {"kind", "header"}:
        raise ValueError("the header does not hold exactly a kind and a header")
    kind, header = value["kind"], value["header"]
    if not isinstance(kind, str) or not isinstance(header, dict):
        raise ValueError("the header's kind is no text or its header no object")
    _check_kind(kind)
    return kind, header


def _check_kind(kind: str) -> None:
    if not kind or not kind.isprintable() or len(kind.encode()) > _MAX_KIND_BYTES:
        raise ValueError(f"kind must be 1-{_MAX_KIND_BYTES} bytes of printable text")


def _read_body(view: memoryview, limits: WireLimits) -> State:
    tensors, metadata = tensor_codec.unpack(
        view,
        max_tensors=limits.max_tensors,
        max_index_bytes=limits.max_header_bytes,
    )
    if metadata:
        raise ValueError("the tensors carry metadata; a message has none")
    return tensors
