"""The accepted replies to one exchange, as a strategy sees them.

A payload is built when a strategy looks at it. Most strategies never do: they ask for
a mean over the sites, which is formed from the replies as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedmed.flat import FlatTensors, Section
from fedmed.message import Message, SiteId, State
from fedmed.payload import Payload, from_message


class Replies(Mapping[SiteId, Payload]):
    """Payloads by site, in sorted order of the sites.

    Args:
        messages: The accepted messages.
    """

    def __init__(self, messages: Mapping[SiteId, Message]) -> None:
        self._messages = {site: messages[site] for site in sorted(messages)}
        self._payloads: dict[SiteId, Payload] = {}

    def __getitem__(self, site_id: SiteId) -> Payload:
        """Build one site's payload.

        Raises:
            WireError: If its kind holds a tensor it does not declare.
        """
        if site_id not in self._payloads:
            self._payloads[site_id] = from_message(self._messages[site_id])
        return self._payloads[site_id]

    def __iter__(self) -> Iterator[SiteId]:
        """Sites in sorted order."""
        return iter(self._messages)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._messages)

    def states(self, section: str) -> SiteStates:
        """One named state of all sites: "state", "buffers", "extra/control"..."""
        return SiteStates(self._messages, section)


class SiteStates(Mapping[SiteId, State]):
    """One section of all replies: a state by site.

    Args:
        messages: In sorted order of the sites.
        section: Name of the section.
    """

    def __init__(self, messages: Mapping[SiteId, Message], section: str) -> None:
        self._messages = messages
        self._section = section
        self._states: dict[SiteId, State] = {}

    def __getitem__(self, site_id: SiteId) -> State:
        """Give one site's state."""
        if site_id not in self._states:
            self._states[site_id] = section(self._messages[site_id], self._section)
        return self._states[site_id]

    def __iter__(self) -> Iterator[SiteId]:
        """Sites in sorted order."""
        return iter(self._messages)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._messages)

    def rows(self) -> tuple[Section, dict[SiteId, FlatTensors]] | None:
        """The packed replies, if all are laid out alike; else None."""
        rows: dict[SiteId, FlatTensors] = {}
        layout = None
        for site, message in self._messages.items():
            tensors = message.tensors
            if not isinstance(tensors, FlatTensors):
                return None
            if layout is not None and tensors.layout is not layout:
                return None
            layout = tensors.layout
            rows[site] = tensors
        if layout is None or self._section not in layout.sections:
            return None
        return layout.sections[self._section], rows


def section(message: Message, name: str) -> State:
    """Give the tensors of one section of a message, under their names within it."""
    if isinstance(message.tensors, FlatTensors):
        return message.tensors.state(name)
    start = f"{name}/"
    return {
        path.removeprefix(start): tensor
        for path, tensor in message.tensors.items()
        if path.startswith(start)
    }


def states_of(replies: Mapping[SiteId, Payload], name: str) -> Mapping[SiteId, State]:
    """One state of all sites, from `Replies` or from any mapping of payloads.

    Args:
        replies: By site.
        name: "state", "buffers", or "extra/<name>".
    """
    if isinstance(replies, Replies):
        return replies.states(name)
    first, _, inner = name.partition("/")
    held = {site: getattr(reply, first) for site, reply in replies.items()}
    return {site: state[inner] for site, state in held.items()} if inner else held
