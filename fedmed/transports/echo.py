"""The smallest host there is: it sends back what it gets.

For examples, and for measuring what a transport costs when the work costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmed.message import Message, SiteId
from fedmed.transports.transport import Host


class EchoHost:
    """Answers every message with itself."""

    def handle(self, message: Message) -> Message:
        """Return the message."""
        return message

    def close(self) -> None:
        """Nothing to release."""


def open_host(site_id: SiteId, options: Mapping[str, Any]) -> Host:
    """Open the host; the site and the options make no difference."""
    del site_id, options
    return EchoHost()
