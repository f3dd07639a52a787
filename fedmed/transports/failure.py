"""From an exception inside a hospital to the one sentence that may leave it.

The text of a foreign exception is never repeated: a `FileNotFoundError` names a
patient's folder. Only `FedMedError` messages were written to be read elsewhere.
"""

from __future__ import annotations

from fedmed.errors import (
    FedMedError,
    MissingDependencyError,
    PolicyError,
    QuarantineBudgetError,
    ShadowedPackageError,
    UsageError,
    WireError,
)
from fedmed.message import SiteFailure

FATAL = (
    MissingDependencyError,
    PolicyError,
    QuarantineBudgetError,
    ShadowedPackageError,
    UsageError,
)
"""Asking again changes nothing about these."""


def describe_failure(host: object, error: BaseException) -> SiteFailure:
    """Say why a host gave no reply, in words that may leave the hospital.

    Args:
        host: The host that raised, or None if it could not even be opened. If it has
            a method `describe_failure(error) -> SiteFailure`, that one is asked.
        error: What it raised.

    Returns:
        The host's own description, else the message of a `FedMedError`, else nothing
        but the name of the exception's type.
    """
    describe = getattr(host, "describe_failure", None)
    if describe is not None:
        try:
            failure = describe(error)
        except Exception as second:
            return scrubbed(second)
        if isinstance(failure, SiteFailure):
            return failure
    return scrubbed(error)


def scrubbed(error: BaseException) -> SiteFailure:
    """Describe an exception by its type, and by its words only if they are ours."""
    if not isinstance(error, FedMedError):
        return SiteFailure("raised", f"the site raised {type(error).__name__}")
    reason = "raised"
    if isinstance(error, PolicyError):
        reason = "refused"
    elif isinstance(error, WireError):
        reason = "wire"
    return SiteFailure(reason, error.message, fatal=isinstance(error, FATAL))
