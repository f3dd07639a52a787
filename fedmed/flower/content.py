"""Our messages inside Flower's.

One record holds the bytes of `fedmed.wire`, one the facts that Flower's side needs
before it reads them. Flower cuts large arrays into chunks, so size is no matter.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmed.errors import WireError
from fedmed.message import Answer, Message, SiteFailure
from fedmed.wire import WireLimits, decode, encode

MESSAGE_TYPE = "query.fedmed"
ACTION = "fedmed"
WHO = "fedmed.who"
FAILURE = "fedmed.failure"


def to_records(message: Message, *, tag: str) -> RecordDict:
    """Pack a message; `tag` names the exchange it belongs to."""
    data = encode(message)
    array = Array(dtype="uint8", shape=(len(data),), stype="fedmed.wire", data=data)
    content = ArrayRecord()
    content["message"] = array
    return RecordDict({"fedmed": ConfigRecord({"tag": tag}), "content": content})


def tag_of(records: RecordDict) -> str:
    """Give the name of the exchange that records belong to.

    Raises:
        WireError: If these are not records of ours.
    """
    tag = records.config_records.get("fedmed", {}).get("tag")
    if not isinstance(tag, str):
        raise WireError("a Flower message without the record 'fedmed'")
    return tag


def from_records(records: RecordDict, limits: WireLimits) -> Message:
    """Unpack a message.

    Raises:
        WireError: If these are not records of ours, or the bytes are damaged.
    """
    content = records.array_records.get("content", {}).get("message")
    if content is None or content.stype != "fedmed.wire":
        raise WireError("a Flower message without the array 'message'")
    return decode(content.data, limits=limits)


def from_answer(answer: Answer) -> Message:
    """Make a failure a message, so that it travels as one."""
    if isinstance(answer, Message):
        return answer
    return Message(
        FAILURE,
        {"reason": answer.reason, "detail": answer.detail, "fatal": answer.fatal},
    )


def to_answer(message: Message) -> Answer:
    """Make a failure out of a message that says so."""
    if message.kind != FAILURE:
        return message
    header = message.header
    return SiteFailure(
        str(header.get("reason", "raised")),
        str(header.get("detail", "")),
        fatal=header.get("fatal") is True,
    )
