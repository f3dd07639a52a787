"""Every error that fedmed raises for a person to read.

    FedMedError                 exit code  1
    ├── UsageError                         2   wrong option or value on the command line
    │   └── ConfigError                    2   the study file is wrong
    │       └── StateMismatchError         2   names or shapes of two states differ
    ├── DataError                          3   a scan, a label or a folder is wrong
    │   ├── CaseError                      3   one case is unusable: quarantined
    │   └── QuarantineBudgetError          3   too many cases are unusable
    ├── SiteError                          4   a site raised, died, hung or was refused
    │   ├── PolicyError                    4   the site's policy refuses what is asked
    │   └── QuorumError                    4   too few sites are left to go on
    ├── WireError                          5   bytes that are not a message of ours
    ├── StorageError                       6   disk full, folder read-only, file damaged
    │   ├── RunLockedError                 6   another process works on this run folder
    │   └── ResumeError                    6   the folder does not fit the study
    ├── MissingDependencyError             7   an optional package is not installed
    └── ShadowedPackageError               7   the packages do not lie side by side

A message says what was seen, what was expected, where, and what to do. It never
holds a patient's name or a path inside a hospital.
"""

from __future__ import annotations


class FedMedError(Exception):
    """Root of every error meant for a person; `hint` says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        """Keep `hint` when an error crosses a process boundary."""
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[FedMedError], message: str, hint: str) -> FedMedError:
    return kind(message, hint=hint)


class UsageError(FedMedError):
    """A wrong option or value on the command line."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """The study is wrong: unknown key, impossible value."""


class StateMismatchError(ConfigError):
    """Two model states differ in names, shapes or dtypes."""


class DataError(FedMedError):
    """A scan, a label, a table or a folder is wrong."""

    exit_code = 3


class CaseError(DataError):
    """One case cannot be used; it is quarantined and counted."""


class QuarantineBudgetError(DataError):
    """More cases are unusable than the study allows."""


class SiteError(FedMedError):
    """A site raised, died, hung, or its reply was refused."""

    exit_code = 4


class PolicyError(SiteError):
    """The site's policy does not allow this to leave."""


class QuorumError(SiteError):
    """Fewer usable sites than the study's quorum."""


class WireError(FedMedError):
    """Bytes that are not a well-formed message."""

    exit_code = 5


class StorageError(FedMedError):
    """Disk full, folder not writable, file damaged."""

    exit_code = 6


class RunLockedError(StorageError):
    """Another process works on this run folder."""


class ResumeError(StorageError):
    """The run folder does not fit the study that should resume it."""


class MissingDependencyError(FedMedError):
    """An optional package is needed and not installed."""

    exit_code = 7


class ShadowedPackageError(FedMedError):
    """`fedmed`, `sites` and `strategies` do not come from one installation."""

    exit_code = 7
